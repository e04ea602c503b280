"""从 hidden state 与 head 直接算出损失和梯度：按行分块，``[P, V]`` 从不整个存在。

每块在前向时就把梯度算完：四次 head 大小的矩阵乘（学生 logits、教师 logits、对 hidden 的梯度、
对 weight 的梯度），没有一次重算；反向只乘上游梯度。数学的可读版本在 ``losses.py``，逐行算术在
``rows.py`` 与 ``sparse.py``；GPU 的半精度走 ``kernels.py``。
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..config.schema import LossConfig
from ..targets import DenseTargets, HiddenTargets, Targets
from .buffers import Chunks
from .kept_gradients import keep_gradients, take_gradients
from .losses import LossSums, check_targets
from .products import compute_dtype, head_products
from .rows import RowSpec, RowValues


def fused_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor | None,
    targets: Targets | None,
    objective: LossConfig,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    vocab_limit: int | None = None,
    excluded: Tensor | None = None,
    memory_budget: int | None = None,
    reduction: Literal["sum", "mean"] = "sum",
    label_metrics: bool = False,
) -> LossSums:
    """``losses.distillation_loss`` 的分块版本，值与梯度相同。

    logits 总是 float32；输入与梯度只在进入矩阵乘时取整到计算精度（autocast 的 dtype，或 hidden
    的 dtype）。对 weight 的梯度以 float32 累积；weight 不需要梯度时不算。``P = 0`` 时损失为 0 而
    仍有计算图。全程没有主机与设备之间的同步。

    Args:
        student_hidden: ``[P, H_s]``。
        student_weight: ``[V, H_s]``，学生的 head。
        labels: ``[P]``，int64；``alpha`` 为 1 时可以是 ``None``。
        targets: 教师目标；``alpha`` 为 0 时不看，可以是 ``None``。
        objective: 目标函数。
        bias: 学生 head 的 ``[V]``。
        scale: 学生 logits 的倍数；教师的在它的 ``Head`` 里。
        softcap: 学生 logits 的 ``c * tanh(logits / c)``。
        vocab_limit: 两个 head 都只看前若干行；其余没有概率，梯度为 0。
        excluded: ``[E]``，int64，其中同样没有概率、梯度为 0 的行，互不相同；标签与
            ``SparseTargets`` 的 ids 不得在其中。
        memory_budget: 块缓冲区的字节数；缺省为空闲内存的 10% 与 ``budget_bytes`` 中较小的。
        reduction: ``sum``，或除以 P 的 ``mean``。
        label_metrics: ``alpha`` 为 1 时也给出两个交叉熵（不带梯度）；缺省不看标签。

    Returns:
        ``LossSums``；``total`` 对 ``student_hidden``、``student_weight`` 与 ``bias`` 可导一次。

    Raises:
        ValueError: 缺少 ``alpha`` 所要的 ``labels`` 或 ``targets``；目标与学生的行数或词表不合；
            教师需要梯度；``tail`` 不支持这种 divergence 或温度；``reduction`` 或
            ``memory_budget`` 不合法。
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction is {reduction!r}, expected 'sum' or 'mean'")
    if memory_budget is not None and memory_budget < 1:
        raise ValueError(f"memory_budget is {memory_budget} bytes, expected at least 1")
    vocab = len(student_weight) if vocab_limit is None else vocab_limit
    if not 1 <= vocab <= len(student_weight):
        raise ValueError(
            f"vocab_limit is {vocab}, expected 1 to {len(student_weight)}, the rows of the head"
        )
    if objective.alpha == 1 and not label_metrics:
        labels = None
    elif labels is None:
        raise ValueError(f"loss.alpha={objective.alpha:g} needs labels")
    if objective.alpha == 0:
        targets = None
    elif targets is None:
        raise ValueError(f"loss.alpha={objective.alpha:g} needs teacher targets")
    else:
        cut = vocab_limit is not None
        check_targets(targets, objective, len(student_hidden), vocab, cut, excluded)
    spec = RowSpec.of(objective, vocab)._replace(
        scale=scale, softcap=softcap, excluded=0 if excluded is None else len(excluded)
    )
    total, sums = _FusedLoss.apply(  # type: ignore[no-untyped-call]
        student_hidden, student_weight, bias, labels, targets, excluded, spec, memory_budget
    )
    if reduction == "mean":
        rows = max(len(student_hidden), 1)
        total, sums = total / rows, sums / rows
    return LossSums(total, *sums.unbind())


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor | None,
        targets: Targets | None,
        excluded: Tensor | None,
        spec: RowSpec,
        memory_budget: int | None,
    ) -> tuple[Tensor, Tensor]:
        """``(total, 其余五项 [5])``；逐块把梯度也算完，留给 ``backward``。"""
        inputs, vocab = (hidden, weight, bias), spec.vocab
        spec = spec._replace(gradient=any(ctx.needs_input_grad[:3]))
        sums = torch.zeros(len(RowValues._fields), dtype=torch.float64, device=hidden.device)
        with head_products(hidden.device.type, compute_dtype(hidden)) as products:
            d_hidden, d_weight, d_bias = keep_gradients(ctx, inputs, products)
            chunks = Chunks(hidden, products, targets, spec, memory_budget, labels, bias, excluded)
            student_weight = products.weight(weight[:vocab])
            if isinstance(targets, HiddenTargets):
                head = targets.head.weight[:vocab]
                # 教师就是关掉 adapter 的学生时，只转换一份
                shared = head.is_set_to(weight[:vocab])
                teacher_weight = student_weight if shared else products.weight(head)
            for rows in chunks:
                count = rows.stop - rows.start
                student, teacher = chunks.student[:count], chunks.teacher[:count]
                products.logits(products.rows(hidden.detach()[rows]), student_weight, student)
                if isinstance(targets, HiddenTargets):
                    products.logits(products.rows(targets.hidden[rows]), teacher_weight, teacher)
                elif isinstance(targets, DenseTargets):
                    teacher.copy_(targets.logits[rows, :vocab])
                sums += chunks.row_values(rows)
                complete = chunks.complete(rows)
                if complete is None:
                    continue
                group, d_logits = complete
                if d_bias is not None:
                    d_bias[:vocab] += products.d_bias(d_logits)
                if d_hidden is not None:
                    d_hidden[group] = products.d_rows(d_logits, student_weight)
                if d_weight is not None:
                    group_rows = products.rows(hidden.detach()[group])
                    products.add_d_weight(d_weight[:vocab], d_logits, group_rows)
        divergence, cross_entropy = sums[:2]
        total = (1 - spec.alpha) * cross_entropy
        if spec.alpha > 0:
            total = spec.alpha * spec.temperature**2 * divergence + total
        sums = sums.to(products.dtype)
        ctx.mark_non_differentiable(sums)
        return total.to(products.dtype), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return (*take_gradients(ctx, upstream), None, None, None, None, None)
