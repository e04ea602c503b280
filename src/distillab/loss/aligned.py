"""分词器不同时的损失，按行分块：``[P, V]`` 从不整个存在。数学的可读版本在 ``across.py``。

``alm`` 与交叉熵只要每行标签处的 log 概率：先不带梯度地走一遍各块，由它们得出值与对每一行的导数 w，
再走一遍，每块的交叉熵梯度乘上 -w。多做一次 head 大小的乘法，换来的是反向之前梯度已经齐了：权重分片
的引擎只在前向里有完整的 head。其余的逐行由 autograd 求导，一次几行。
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..batch import Alignment
from ..config.schema import LossConfig
from ..targets import Head, HiddenTargets
from ..vocabulary import SharedTokens, Vocabulary
from .across import alm_total, first_tokens
from .buffers import Chunks, default_budget
from .chunking import PAIR_BYTES
from .kept_gradients import keep_gradients, take_gradients
from .losses import LossSums, log_softmax
from .products import HeadProducts, compute_dtype, head_products
from .rows import RowSpec

_CROSS_ENTROPY = LossConfig(alpha=0.0, temperature=1.0)


class _Settings(NamedTuple):
    """不求导的部分；``objective`` 由标签处的 log 概率 ``[P]`` 得到要最小化的标量。"""

    head: Head
    vocab: int
    budget: int | None
    objective: Callable[..., Any]


def aligned_distillation_loss(
    student_hidden: Tensor,
    student_head: Head,
    labels: Tensor,
    targets: HiddenTargets | None,
    alignment: Alignment,
    loss: LossConfig,
    vocabulary: Vocabulary,
    *,
    shared: SharedTokens | None = None,
    memory_budget: int | None = None,
    label_metrics: bool = False,
) -> LossSums:
    """``across.aligned_loss`` 的分块版本，值与梯度相同。

    Args:
        student_hidden: ``[P, H_s]``。
        student_head: 学生的整个 head；``vocabulary`` 之外的没有概率，梯度为 0。
        labels: ``[P]``，int64。
        targets: 教师的 ``hidden [P_t, H_t]`` 与它的 head；``alpha`` 为 0 时可以是 ``None``。
        alignment: 教师的标签与各段。
        loss: ``divergence`` 在 ``ACROSS`` 之中的。
        vocabulary: 学生的分词器定义的 token。
        shared: ``projected_kl`` 与 ``gold`` 要的、两边的 token 怎样相配。
        memory_budget: 块缓冲区的字节数，见 ``fused_distillation_loss``。
        label_metrics: ``alm`` 之外的也给出教师的交叉熵；``alm`` 总是给。

    Returns:
        ``LossSums``；``total`` 对 ``student_hidden`` 与 head 的 ``weight``、``bias`` 可导一次。
    """
    device = student_hidden.device
    within = vocabulary.within(len(student_head.weight))
    head = replace(student_head, excluded=within.excluded(device))
    zero = torch.zeros((), dtype=torch.float64, device=device)
    theirs = torch.zeros(0, device=device)
    distils, by_likelihood = loss.alpha > 0 and targets is not None, loss.divergence == "alm"
    if targets is not None and (label_metrics or (distils and by_likelihood)):
        theirs = label_log_probs(
            targets.hidden, targets.head, alignment.teacher_labels, memory_budget
        )

    def objective(log_q: Tensor) -> tuple[Tensor, Tensor]:
        cross_entropy, divergence = -log_q.sum(dtype=torch.float64), zero
        if distils and by_likelihood:
            divergence = alm_total(theirs, log_q, alignment, loss.tau or 1.0)
        total = loss.alpha * divergence + (1 - loss.alpha) * cross_entropy
        return total, torch.stack([divergence, cross_entropy]).detach()

    settings = _Settings(head, within.limit, memory_budget, objective)
    total, (divergence, cross_entropy) = _OfLabels.apply(  # type: ignore[no-untyped-call]
        student_hidden, head.weight, head.bias, labels, settings
    )
    if distils and not by_likelihood:
        assert targets is not None
        value = _OfPairs.apply(  # type: ignore[no-untyped-call]
            student_hidden[alignment.student_first],
            head.weight,
            head.bias,
            HiddenTargets(targets.hidden[alignment.teacher_first], targets.head),
            settings._replace(
                objective=lambda log_p, log_q: first_tokens(log_p, log_q, loss, shared)
            ),
        )
        divergence = value.detach()
        total = total + loss.alpha * value
    rest = (divergence, cross_entropy, -theirs.sum(dtype=torch.float64), zero, zero)
    return LossSums(total, *(part.to(total.dtype) for part in rest))


@torch.no_grad()
def label_log_probs(
    hidden: Tensor, head: Head, labels: Tensor, memory_budget: int | None = None
) -> Tensor:
    """每行标签处的 log 概率 ``[P]``，float32，没有梯度；``hidden [P, H]``，``labels [P]``。"""
    with head_products(hidden.device.type, compute_dtype(hidden)) as products:
        settings = _Settings(head, len(head.weight), memory_budget, torch.sum)
        return _label_log_probs(hidden, labels, products, settings)


def _chunks(
    hidden: Tensor, labels: Tensor, products: HeadProducts, settings: _Settings, gradient: bool
) -> Chunks:
    head = settings.head
    spec = RowSpec.of(_CROSS_ENTROPY, settings.vocab)._replace(
        scale=head.scale,
        softcap=head.softcap,
        excluded=0 if head.excluded is None else len(head.excluded),
        gradient=gradient,
    )
    return Chunks(
        hidden, products, None, spec, settings.budget, labels, head.bias, head.excluded
    )  # fmt: skip


def _label_log_probs(
    hidden: Tensor, labels: Tensor, products: HeadProducts, settings: _Settings
) -> Tensor:
    chunks = _chunks(hidden, labels, products, settings, gradient=False)
    weight = products.weight(settings.head.weight[: settings.vocab])
    found = torch.zeros(len(hidden), dtype=products.dtype, device=hidden.device)
    for rows in chunks:
        count = rows.stop - rows.start
        products.logits(products.rows(hidden.detach()[rows]), weight, chunks.student[:count])
        found[rows] = -chunks.each_row(rows)[1]
    return found


class _OfLabels(torch.autograd.Function):
    """``settings.objective`` 作用于标签处的 log 概率。"""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor]:
        inputs = (hidden, weight, bias)
        with head_products(hidden.device.type, compute_dtype(hidden)) as products:
            found = _label_log_probs(hidden, labels, products, settings)
            with torch.enable_grad():
                leaf = found.requires_grad_()
                total, sums = settings.objective(leaf)
            d_hidden, d_weight, d_bias = keep_gradients(ctx, inputs, products)
            if any(part is not None for part in ctx.gradients):
                (of_rows,) = torch.autograd.grad(total, leaf)
                # 乘进半精度的行之前缩到 1 以内，全部乘完再放大回来。
                largest = of_rows.abs().amax().clamp_min(1e-30) if len(hidden) else of_rows.sum()
                shares = (-of_rows / largest)[:, None]
                chunks = _chunks(hidden, labels, products, settings, gradient=True)
                head = products.weight(weight[: settings.vocab])
                for rows in chunks:
                    count = rows.stop - rows.start
                    own = products.rows(hidden.detach()[rows])
                    products.logits(own, head, chunks.student[:count])
                    chunks.each_row(rows)
                    complete = chunks.complete(rows)
                    if complete is None:
                        continue
                    group, d_logits = complete
                    if d_hidden is not None:
                        d_hidden[group] = shares[group] * products.d_rows(d_logits, head)
                    if d_weight is not None:
                        own = products.rows(shares[group] * hidden.detach()[group])
                        products.add_d_weight(d_weight[: settings.vocab], d_logits, own)
                    if d_bias is not None:
                        d_bias[: settings.vocab] += products.d_bias(d_logits * shares[group])
                for part in ctx.gradients:
                    if part is not None:
                        part.mul_(largest)
        ctx.mark_non_differentiable(sums)
        return total.detach().to(products.dtype), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return (*take_gradients(ctx, upstream), None, None)


class _OfPairs(torch.autograd.Function):
    """Σ ``settings.objective(log_p, log_q)``：``hidden [C, H_s]`` 与 ``targets [C, H_t]`` 逐行。"""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: HiddenTargets,
        settings: _Settings,
    ) -> Tensor:
        inputs, head, vocab = (hidden, weight, bias), settings.head, settings.vocab
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        with head_products(hidden.device.type, compute_dtype(hidden)) as products:
            d_hidden, d_weight, d_bias = keep_gradients(ctx, inputs, products)
            theirs = targets.head
            widest = max(vocab, len(theirs.weight))
            budget = settings.budget or default_budget(hidden.device)
            size = max(1, budget // (PAIR_BYTES * widest))
            own_weight, their_weight = (
                products.weight(part) for part in (weight[:vocab], theirs.weight)
            )
            cut = Head(
                weight, None if bias is None else bias.detach()[:vocab], head.scale, head.softcap,
                head.excluded,
            )  # fmt: skip
            for start in range(0, len(hidden), size):
                rows = slice(start, start + size)
                own, other = (
                    products.rows(part[rows]) for part in (hidden.detach(), targets.hidden)
                )
                product = hidden.new_empty(len(own), vocab, dtype=products.dtype)
                products.logits(own, own_weight, product)
                logits = hidden.new_empty(len(own), len(theirs.weight), dtype=products.dtype)
                products.logits(other, their_weight, logits)
                with torch.enable_grad():
                    leaf = product.requires_grad_()
                    log_q = log_softmax(cut.finish(leaf))
                    value = settings.objective(log_softmax(theirs.finish(logits)), log_q).sum()
                total += value.detach()
                if d_hidden is None and d_weight is None and d_bias is None:
                    continue
                d_logits = products.d_logits(torch.autograd.grad(value, leaf)[0])
                if d_hidden is not None:
                    d_hidden[rows] = products.d_rows(d_logits, own_weight)
                if d_weight is not None:
                    products.add_d_weight(d_weight[:vocab], d_logits, own)
                if d_bias is not None:
                    d_bias[:vocab] += products.d_bias(d_logits)
        return total.to(products.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (*take_gradients(ctx, upstream), None, None)
