"""``loss_head.py`` 测的东西：输入、各家的损失、矩阵乘的下限，以及 float64 的准确答案。"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

LOGIT_STD = 4.0
"""logits 的标准差：词表 151,936 时 softmax 的熵约 4 nat，与真实模型同一量级；太小则近乎均匀。"""

NEAR_STD = 0.1
"""``--near`` 时两份 logits 之差的标准差，KL 约 0.005 nat：梯度是两个几乎相等的数之差。"""

BETA = 0.5
"""jsd 的 β。各家 β 的含义在 0.5 处一致：m 是两个分布的平均。"""

PEERS = {"liger": "liger-kernel", "liger-compiled": "liger-kernel", "trl": "trl"}
"""需要另外安装的实现，以及它的发行包。"""


@dataclass(frozen=True)
class Cell:
    """一格：同一份输入、同一个目标函数，所有实现都在它上面测。"""

    rows: int
    dtype: str
    objective: str
    near: bool
    vocab: int
    student_width: int
    teacher_width: int
    liger_chunk: int
    device: str
    seed: int

    def __str__(self) -> str:
        return f"{self.dtype} {self.objective}{' near' if self.near else ''}"


class Inputs(NamedTuple):
    """一格的输入；``student_*`` 需要梯度。

    Attributes:
        student_hidden: ``[P, H_s]``。
        student_weight: ``[V, H_s]``。
        teacher_hidden: ``[P, H_t]``。
        teacher_weight: ``[V, H_t]``。
        labels: ``[P]``，α = 1 时没有人看，但各家的签名都要。
    """

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor


class Answer(NamedTuple):
    """一次计算的结果：标量值与两个梯度 ``[P, H_s]``、``[V, H_s]``。"""

    value: Tensor
    d_hidden: Tensor
    d_weight: Tensor


def make_inputs(cell: Cell) -> Inputs:
    """由 ``cell.seed`` 造出输入：先在 CPU 上以 float32 生成，各进程、各设备因而相同。

    ``near`` 时教师的 weight 前 ``H_s`` 列就是学生的，hidden 加一点噪声：宽度不同，logits 几乎相同。
    """
    generator = torch.Generator().manual_seed(cell.seed)

    def normal(rows: int, columns: int, std: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(std)

    width, wider = cell.student_width, cell.teacher_width
    hidden = normal(cell.rows, width)
    weight = normal(cell.vocab, width, LOGIT_STD / math.sqrt(width))
    if cell.near:
        teacher_hidden = normal(cell.rows, wider, NEAR_STD / LOGIT_STD * math.sqrt(width / wider))
        teacher_weight = normal(cell.vocab, wider, LOGIT_STD / math.sqrt(width))
        teacher_hidden[:, :width] += hidden
        teacher_weight[:, :width] = weight
    else:
        teacher_hidden = normal(cell.rows, wider)
        teacher_weight = normal(cell.vocab, wider, LOGIT_STD / math.sqrt(wider))
    labels = torch.randint(cell.vocab, (cell.rows,), generator=generator)
    dtype = getattr(torch, cell.dtype)
    hidden, weight, teacher_hidden, teacher_weight = (
        tensor.to(cell.device, dtype) for tensor in (hidden, weight, teacher_hidden, teacher_weight)
    )
    return Inputs(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        teacher_hidden,
        teacher_weight,
        labels.to(cell.device),
    )


# 各家的损失：由 (cell, inputs) 给出一个无参数的函数，返回可求导的标量。


def distillab_loss(cell: Cell, inputs: Inputs) -> Callable[[], Tensor]:
    """``distillab.loss.fused``：按行分块，前向里就把梯度算完。"""
    from distillab.config.schema import LossConfig
    from distillab.loss.fused import fused_distillation_loss
    from distillab.targets import Head, HiddenTargets

    objective: Any = cell.objective
    loss = LossConfig(divergence=objective, alpha=1.0, temperature=1.0)
    targets = HiddenTargets(inputs.teacher_hidden, Head(inputs.teacher_weight))
    hidden, weight = inputs.student_hidden, inputs.student_weight
    return lambda: fused_distillation_loss(hidden, weight, None, targets, loss).total


def dense_loss(cell: Cell, inputs: Inputs) -> Callable[[], Tensor]:
    """两份 ``[P, V]`` 都在：logits 是输入的 dtype，与模型的 ``lm_head`` 一样，之后转 float32。"""
    from distillab.config.schema import LossConfig
    from distillab.loss.losses import distillation_loss
    from distillab.targets import DenseTargets

    objective: Any = cell.objective
    loss = LossConfig(divergence=objective, alpha=1.0, temperature=1.0)

    def call() -> Tensor:
        logits = inputs.student_hidden @ inputs.student_weight.T
        teacher_logits = inputs.teacher_hidden @ inputs.teacher_weight.T
        return distillation_loss(logits, DenseTargets(teacher_logits), None, loss).total

    return call


def liger_loss(cell: Cell, inputs: Inputs, compiled: bool = False) -> Callable[[], Tensor]:
    """Liger 的分块 JSD；它的 ``beta=0`` 就是 KL(教师||学生)，返回的是平均。

    ``chunk_size`` 默认 1024 行：1,024 行就是一整块，等于没有分块，所以由 ``--liger-chunk`` 给。
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=0.0 if cell.objective == "forward_kl" else BETA,
        compiled=compiled,
        chunk_size=cell.liger_chunk,
    )
    return lambda: module(*inputs)


def liger_compiled_loss(cell: Cell, inputs: Inputs) -> Callable[[], Tensor]:
    """同上，块内经过 ``torch.compile``；编译的时间不计。"""
    return liger_loss(cell, inputs, compiled=True)


def trl_loss(cell: Cell, inputs: Inputs) -> Callable[[], Tensor]:
    """TRL 的分块散度；``beta=0`` 是 KL(教师||学生)。它同时算学生的熵，无法关掉。"""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    hidden, weight, teacher_hidden, teacher_weight, _ = inputs
    beta = 0.0 if cell.objective == "forward_kl" else BETA

    def call() -> Tensor:
        per_token, _ = ChunkedDivergenceFunction.apply(
            hidden, weight, None, teacher_hidden, teacher_weight, None, beta
        )
        return per_token.sum()

    return call


LOSSES: dict[str, Callable[[Cell, Inputs], Callable[[], Tensor]]] = {
    "distillab": distillab_loss,
    "dense": dense_loss,
    "liger": liger_loss,
    "liger-compiled": liger_compiled_loss,
    "trl": trl_loss,
}
IMPLEMENTATIONS = ["floor", *LOSSES]


def factor_to_sum(implementation: str, cell: Cell) -> float:
    """乘上它之后，值与梯度都是对 token 的和：Liger 返回的是平均，其余已经是和。"""
    return float(cell.rows) if implementation.startswith("liger") else 1.0


def floor(inputs: Inputs) -> Callable[[], None]:
    """四次 head 大小的矩阵乘，写进预先分配的张量：没有 softmax，没有缺页，谁都绕不过去。"""
    hidden, weight, teacher_hidden, teacher_weight = (tensor.detach() for tensor in inputs[:4])
    logits = torch.zeros(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
    teacher_logits = torch.zeros_like(logits)
    d_hidden, d_weight = torch.zeros_like(hidden), torch.zeros_like(weight)

    def call() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(teacher_hidden, teacher_weight.T, out=teacher_logits)
        torch.mm(logits, weight, out=d_hidden)
        torch.mm(logits.T, hidden, out=d_weight)

    return call


def exact_answer(cell: Cell, chunk: int = 64) -> Answer:
    """float64 的值与梯度，按行分块；梯度用手推的公式，不经过任何被测的代码。

    对 logits 的梯度，p 是教师、q 是学生、m = βp + (1-β)q：
    ``forward_kl``: q - p；``jsd``: (1-β) q (log(q/m) - KL(q||m))。
    """
    inputs = make_inputs(cell)
    hidden, weight, teacher_hidden, teacher_weight = (
        tensor.detach().double() for tensor in inputs[:4]
    )
    value, d_hidden, d_weight = 0.0, torch.zeros_like(hidden), torch.zeros_like(weight)
    for start in range(0, cell.rows, chunk):
        rows = slice(start, start + chunk)
        log_q = torch.log_softmax(hidden[rows] @ weight.T, dim=-1)
        log_p = torch.log_softmax(teacher_hidden[rows] @ teacher_weight.T, dim=-1)
        p, q = log_p.exp(), log_q.exp()
        if cell.objective == "forward_kl":
            value += (p * (log_p - log_q)).sum().item()
            d_logits = q - p
        else:
            log_m = torch.logaddexp(log_p + math.log(BETA), log_q + math.log1p(-BETA))
            kl_q = (q * (log_q - log_m)).sum(-1, keepdim=True)
            value += BETA * (p * (log_p - log_m)).sum().item() + (1 - BETA) * kl_q.sum().item()
            d_logits = (1 - BETA) * q * (log_q - log_m - kl_q)
        d_hidden[rows] = d_logits @ weight
        d_weight.addmm_(d_logits.T, hidden[rows])
    return Answer(torch.tensor(value, dtype=torch.float64), d_hidden.cpu(), d_weight.cpu())


def relative_error(gradient: Tensor, exact: Tensor, factor: float, chunk: int = 8192) -> float:
    """``||factor * gradient - exact|| / ||exact||``，按行分块，float64。"""
    difference = norm = 0.0
    for start in range(0, len(exact), chunk):
        part = exact[start : start + chunk]
        got = gradient[start : start + chunk].cpu().double() * factor
        difference += (got - part).square().sum().item()
        norm += part.square().sum().item()
    return math.sqrt(difference / norm)
