"""目标函数的数学，稠密而可读：每种 divergence 一个函数，旁边是它的公式与出处。

约定：p 是教师，q 是学生；参数都是 log 概率 ``[..., V]``，返回 ``[...]``，单位 nat。
``fused.py`` 用同样的数学，但不让 ``[P, V]`` 整个存在。
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import LossConfig


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p||q) = Σ p (log p - log q)。Hinton et al. 2015, arXiv:1503.02531。"""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q||p) = Σ q (log q - log p)。MiniLLM, Gu et al. 2023, arXiv:2306.08543。"""
    return forward_kl(log_q, log_p)


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """广义 Jensen-Shannon 散度：β KL(p||m) + (1-β) KL(q||m)，m = β p + (1-β) q。

    GKD, Agarwal et al. 2023, arXiv:2306.13649，式 (1)。
    """
    log_m = mixture(log_p, log_q, beta)
    return beta * forward_kl(log_p, log_m) + (1 - beta) * forward_kl(log_q, log_m)


def skew_forward_kl(log_p: Tensor, log_q: Tensor, skew: float) -> Tensor:
    """KL(p || s p + (1-s) q)。DistiLLM, Ko et al. 2024, arXiv:2402.03898，式 (3)。"""
    return forward_kl(log_p, mixture(log_p, log_q, skew))


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, skew: float) -> Tensor:
    """KL(q || (1-s) p + s q)。DistiLLM, Ko et al. 2024, arXiv:2402.03898，式 (4)。"""
    return forward_kl(log_q, mixture(log_q, log_p, skew))


def mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """log(w a + (1-w) b)，``0 < w < 1``；用 logaddexp，概率下溢时仍然准确。"""
    return torch.logaddexp(log_a + math.log(weight), log_b + math.log1p(-weight))


def divergence(log_p: Tensor, log_q: Tensor, loss: LossConfig) -> Tensor:
    """按 ``loss.divergence`` 选一种，逐行给出 D(p, q) ``[...]``。"""
    match loss.divergence:
        case "forward_kl":
            return forward_kl(log_p, log_q)
        case "reverse_kl":
            return reverse_kl(log_p, log_q)
        case "jsd":
            assert loss.beta is not None  # LossConfig 已补上
            return jsd(log_p, log_q, loss.beta)
        case "skew_forward_kl":
            assert loss.skew is not None
            return skew_forward_kl(log_p, log_q, loss.skew)
        case "skew_reverse_kl":
            assert loss.skew is not None
            return skew_reverse_kl(log_p, log_q, loss.skew)


class LossSums(NamedTuple):
    """对 token 求和（不是平均）的标量，float32；只有训练循环做除法。

    Attributes:
        total: α T² ΣD + (1-α) ΣCE，唯一带梯度的一项。
        divergence: ΣD(p_T, q_T)，不含 α 与 T²；α = 0 时为 0。
        cross_entropy: ΣCE(label, q_1)；α = 1 时不计算，为 0。
    """

    total: Tensor
    divergence: Tensor
    cross_entropy: Tensor


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, loss: LossConfig
) -> LossSums:
    """``Σ_tokens α T² D(p_T, q_T) + (1-α) CE(label, q_1)``，稠密参考实现。

    T² 同时乘在值与梯度上，使软标签的梯度不随 T 缩小（Hinton et al. 2015，第 2 节）。

    Args:
        student_logits: ``[P, V]``，在 float32 里计算。
        teacher_logits: ``[P, V]``，``alpha`` 为 0 时不看，可以是 ``None``。
        labels: ``[P]``，int64；``alpha`` 为 1 时不看。
        loss: 目标函数。

    Returns:
        ``LossSums``，三个标量。

    Raises:
        ValueError: ``alpha > 0`` 而没有教师。
    """
    student_logits = student_logits.float()
    zero = student_logits.new_zeros(())
    total, divergence_sum, cross_entropy = zero, zero, zero
    if loss.alpha > 0:
        if teacher_logits is None:
            raise ValueError(f"loss.alpha={loss.alpha:g} needs teacher logits")
        log_q = F.log_softmax(student_logits / loss.temperature, dim=-1)
        log_p = F.log_softmax(teacher_logits.float() / loss.temperature, dim=-1)
        divergence_sum = divergence(log_p, log_q, loss).sum()
        total = total + loss.alpha * loss.temperature**2 * divergence_sum
    if loss.alpha < 1:
        cross_entropy = F.cross_entropy(student_logits, labels, reduction="sum")
        total = total + (1 - loss.alpha) * cross_entropy
    return LossSums(total, divergence_sum.detach(), cross_entropy.detach())
