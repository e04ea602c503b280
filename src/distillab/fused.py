"""从 hidden state 与 head 直接算出损失和梯度：按行分块，``[P, V]`` 从不整个存在。

每块在前向时就把梯度算完：四次 head 大小的矩阵乘（学生 logits、教师 logits、对 hidden 的梯度、
对 weight 的梯度），没有一次重算；反向只乘上游梯度。数学在 ``losses.py``。
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .config import LossConfig
from .losses import LossSums, distillation_loss
from .targets import Head, HiddenTargets

CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}
"""一块 float32 logits 的大小，单位字节；块内同时存在的同样大小的张量约五个。

CPU 上更大的块每次都要向系统要内存，缺页的时间比省下的多：510 行、词表 49,152，64 MiB 的块
0.75 s，16 MiB 的 0.46 s。GPU 上每块都要读写一遍整个 weight 的梯度，块宜大。
"""


def row_chunks(rows: int, vocab_size: int, device: str) -> Iterator[slice]:
    """把 ``rows`` 行切成每块 logits 不超过 ``CHUNK_BYTES`` 的切片。"""
    budget = CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"])
    size = max(1, budget // (4 * vocab_size))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def fused_distillation_loss(
    student_hidden: Tensor,
    student_head: Head,
    labels: Tensor,
    targets: HiddenTargets | None,
    loss: LossConfig,
) -> LossSums:
    """``losses.distillation_loss`` 的分块版本，值与梯度相同。

    logits 总是 float32；输入与梯度只在进入矩阵乘时取整到计算精度（autocast 的 dtype，或 hidden
    的 dtype）。``P = 0`` 时损失为 0 而仍有计算图。

    Args:
        student_hidden: ``[P, H_s]``。
        student_head: 学生的 head，``weight [V, H_s]``。
        labels: ``[P]``，int64。
        targets: 教师的 ``[P, H_t]`` 与 head；``alpha`` 为 0 时不看，可以是 ``None``。
        loss: 目标函数。

    Returns:
        ``LossSums``；``total`` 对 ``student_hidden``、``student_head`` 的 weight 与 bias 可导。

    Raises:
        ValueError: ``alpha > 0`` 而没有 ``targets``，或两个 head 的词表不同。
    """
    if loss.alpha == 0:
        targets = None
    elif targets is None:
        raise ValueError(f"loss.alpha={loss.alpha:g} needs teacher targets")
    elif len(targets.head.weight) != len(student_head.weight):
        raise ValueError(
            f"teacher head has {len(targets.head.weight)} rows, student head has "
            f"{len(student_head.weight)}; cut both to the shared vocabulary"
        )
    return LossSums(
        *_FusedLoss.apply(  # type: ignore[no-untyped-call]
            student_hidden,
            student_head.weight,
            student_head.bias,
            student_head,
            labels,
            targets,
            loss,
        )
    )


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        labels: Tensor,
        targets: HiddenTargets | None,
        loss: LossConfig,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = hidden.device.type
        compute = compute_dtype(hidden)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        d_weight = torch.zeros(weight.shape, device=weight.device) if need_weight else None
        d_bias = torch.zeros(len(weight), device=weight.device) if need_bias else None
        sums = torch.zeros(3, device=hidden.device)
        with torch.autocast(device, enabled=False), products(device, compute) as product:
            student_weight = product.prepare(weight)
            if targets is not None:
                teacher, teacher_weight = targets.head, product.prepare(targets.head.weight)
            for rows in row_chunks(len(hidden), len(weight), device):
                student_rows, teacher_logits = product.prepare(hidden[rows]), None
                if targets is not None:
                    teacher_rows = product.prepare(targets.hidden[rows])
                    teacher_logits = teacher.finish(product(teacher_rows, teacher_weight.T))
                logits = product(student_rows, student_weight.T)
                with torch.enable_grad():
                    logits.requires_grad_()
                    part = distillation_loss(
                        head.finish(logits), teacher_logits, labels[rows], loss
                    )
                    (d_logits,) = torch.autograd.grad(part.total, logits)
                sums += torch.stack([part.total.detach(), part.divergence, part.cross_entropy])
                if d_bias is not None:
                    d_bias += d_logits.sum(0)
                d_logits = product.prepare(d_logits)
                if d_hidden is not None:
                    d_hidden[rows] = product(d_logits, student_weight).to(hidden.dtype)
                if d_weight is not None:
                    product.add_to(d_weight, d_logits.T, student_rows)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.weight_dtype = weight.dtype
        total, divergence, cross_entropy = sums.unbind()
        ctx.mark_non_differentiable(divergence, cross_entropy)
        return total.clone(), divergence.clone(), cross_entropy.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = (
            None if gradient is None else gradient * upstream for gradient in ctx.saved_tensors
        )
        if d_weight is not None:
            d_weight = d_weight.to(ctx.weight_dtype)
        return d_hidden, d_weight, d_bias, None, None, None, None


class Product:
    """结果总是 float32 的矩阵乘；输入只在进入乘法时取整到 ``dtype``。"""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def prepare(self, tensor: Tensor) -> Tensor:
        """取整到 ``dtype``，供 ``__call__`` 与 ``add_to`` 使用。"""
        return tensor.to(self.dtype)

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        """``left @ right``，float32。"""
        if self.dtype == torch.float32:
            return left @ right
        return torch.mm(left, right, out_dtype=torch.float32)

    def add_to(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """``total += left @ right``，``total`` 是 float32，就地累加。"""
        if self.dtype == torch.float32:
            total.addmm_(left, right)
        else:
            total += torch.mm(left, right, out_dtype=torch.float32)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """矩阵乘的计算精度：autocast 的 dtype，没有 autocast 则是 ``hidden`` 的。"""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


@contextmanager
def products(device: str, compute: torch.dtype) -> Iterator[Product]:
    """GPU 上半精度输入、float32 结果；CPU 没有这样的算子，改由 oneDNN 在内部取整。

    Args:
        device: ``cpu`` 或 ``cuda``。
        compute: 输入取整到的 dtype。

    Yields:
        ``Product``；在这个 with 之内有效。
    """
    if device == "cuda":
        yield Product(compute)
        return
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    previous = matmul.fp32_precision
    if compute == torch.bfloat16:  # oneDNN 的 bf16 模式：float32 进、float32 出
        matmul.fp32_precision = "bf16"
    try:
        yield Product(torch.float32)
    finally:
        matmul.fp32_precision = previous
