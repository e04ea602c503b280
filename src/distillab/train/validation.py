"""验证：交叉熵、困惑度、与教师的 KL 和 top-1 一致率，都由 token 上的总和得出。"""

from __future__ import annotations

import math
from typing import TypedDict

from ..config.schema import LossConfig
from ..loss.losses import LossSums

WITH_TEACHER = LossConfig(divergence="forward_kl", alpha=0.5, temperature=1.0)
"""验证用的目标函数：T = 1 的 KL(教师||学生)，外加交叉熵；它的 ``total`` 没有人看。"""

WITHOUT_TEACHER = LossConfig(alpha=0.0, temperature=1.0)


class Metrics(TypedDict):
    """一个模型在验证集上的成绩；单位 nat/token。没有教师时 ``kl`` 与一致率为 ``None``。"""

    perplexity: float
    cross_entropy: float
    kl: float | None
    top1_agreement: float | None


def student_metrics(sums: LossSums, tokens: int, has_teacher: bool) -> Metrics:
    """由总和得出学生的成绩；困惑度是 ``exp(总 nat / 总 token)``。

    Args:
        sums: 整个验证集的总和，目标函数是 ``WITH_TEACHER`` 或 ``WITHOUT_TEACHER``。
        tokens: 整个验证集的 token 数。
        has_teacher: 有没有教师。
    """
    cross_entropy = float(sums.cross_entropy) / tokens
    return Metrics(
        perplexity=perplexity(cross_entropy),
        cross_entropy=cross_entropy,
        kl=float(sums.divergence) / tokens if has_teacher else None,
        top1_agreement=float(sums.top1_agreement) / tokens if has_teacher else None,
    )


def teacher_metrics(sums: LossSums, tokens: int) -> Metrics:
    """由同一次总和得出教师自己的成绩：与自己的 KL 为 0，一致率为 1。"""
    cross_entropy = float(sums.teacher_cross_entropy) / tokens
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
