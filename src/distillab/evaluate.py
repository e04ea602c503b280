"""验证：交叉熵、困惑度、与教师的 KL 和 top-1 一致率，都由 token 上的总和得出。"""

from __future__ import annotations

import math
from typing import NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused import compute_dtype, products, row_chunks
from .losses import forward_kl
from .targets import Head, HiddenTargets


class Metrics(TypedDict):
    """一个模型在验证集上的成绩；单位 nat/token。没有教师时 ``kl`` 与一致率为 ``None``。"""

    perplexity: float
    cross_entropy: float
    kl: float | None
    top1_agreement: float | None


class EvaluationSums(NamedTuple):
    """对 token 求和的验证量，float64 标量；跨批次、跨进程直接相加。

    Attributes:
        tokens: token 数。
        cross_entropy: 学生的 ΣCE。
        kl: ΣKL(教师||学生)，T = 1。
        agreement: 学生与教师 top-1 相同的 token 数。
        teacher_cross_entropy: 教师的 ΣCE。
    """

    tokens: Tensor
    cross_entropy: Tensor
    kl: Tensor
    agreement: Tensor
    teacher_cross_entropy: Tensor


@torch.no_grad()
def evaluation_sums(
    hidden: Tensor, head: Head, labels: Tensor, targets: HiddenTargets | None
) -> EvaluationSums:
    """分块求和，``[P, V]`` 从不整个存在。

    Args:
        hidden: 学生的 ``[P, H_s]``。
        head: 学生的 head。
        labels: ``[P]``，int64。
        targets: 教师的目标；``None`` 时与教师有关的三项为 0。

    Returns:
        ``EvaluationSums``。
    """
    sums = torch.zeros(5, dtype=torch.float64, device=hidden.device)
    sums[0] = len(labels)
    compute = compute_dtype(hidden)
    device = hidden.device.type
    with torch.autocast(device, enabled=False), products(device, compute) as product:
        weight = product.prepare(head.weight)
        if targets is not None:
            teacher, teacher_weight = targets.head, product.prepare(targets.head.weight)
        for rows in row_chunks(len(hidden), len(head.weight), device):
            log_q = _log_softmax(head, product(product.prepare(hidden[rows]), weight.T))
            sums[1] += F.nll_loss(log_q, labels[rows], reduction="sum")
            if targets is not None:
                teacher_rows = product.prepare(targets.hidden[rows])
                log_p = _log_softmax(teacher, product(teacher_rows, teacher_weight.T))
                sums[2] += forward_kl(log_p, log_q).sum()
                sums[3] += (log_p.argmax(-1) == log_q.argmax(-1)).sum()
                sums[4] += F.nll_loss(log_p, labels[rows], reduction="sum")
    return EvaluationSums(*sums.unbind())


def _log_softmax(head: Head, product: Tensor) -> Tensor:
    return F.log_softmax(head.finish(product), dim=-1)


def student_metrics(sums: EvaluationSums, has_teacher: bool) -> Metrics:
    """由总和得出学生的成绩；困惑度是 ``exp(总 nat / 总 token)``。"""
    tokens = sums.tokens.item()
    return Metrics(
        perplexity=perplexity(sums.cross_entropy.item() / tokens),
        cross_entropy=sums.cross_entropy.item() / tokens,
        kl=sums.kl.item() / tokens if has_teacher else None,
        top1_agreement=sums.agreement.item() / tokens if has_teacher else None,
    )


def teacher_metrics(sums: EvaluationSums) -> Metrics:
    """由同一次总和得出教师自己的成绩：与自己的 KL 为 0，一致率为 1。"""
    cross_entropy = sums.teacher_cross_entropy.item() / sums.tokens.item()
    return Metrics(
        perplexity=perplexity(cross_entropy),
        cross_entropy=cross_entropy,
        kl=0.0,
        top1_agreement=1.0,
    )


def perplexity(cross_entropy: float) -> float:
    """``exp(cross_entropy)``；大到 float 装不下时为无穷。"""
    try:
        return math.exp(cross_entropy)
    except OverflowError:
        return math.inf
