"""分词器不同时的目标函数，稠密而可读：同样的文字在两边各是几个 token，逐段比较。

一段（chunk）是两种切法都在其两头断开的最短的文字，见 ``data/alignment.py``；段之前的文字两个模型都
读过，所以段的似然、段的第一个 token 的分布可以比。``aligned.py`` 用同样的数学，但不让 ``[P, V]`` 整
个存在。约定：p 是教师，q 是学生。
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import Alignment
from ..config.schema import LossConfig
from ..vocabulary import SharedTokens
from .losses import LossSums, log_softmax

SMALLEST = 1e-6
"""两边的 -log 似然都加上这么多 nat：似然恰为 1 的一段，``log(1 - p)`` 没有定义。"""


def log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(x))``，``x < 0``；两支各在自己准确的一边（Mächler 2012）。"""
    near = x > -math.log(2)
    return torch.where(near, (-torch.expm1(x)).log(), torch.log1p(-x.exp()))


def alm(log_p: Tensor, log_q: Tensor, tau: float) -> Tensor:
    """近似似然匹配：``τ [ f(p^(1/τ), q^(1/τ)) + f(1 - p^(1/τ), 1 - q^(1/τ)) ]``，``f(a, b)`` 是
    ``a log(a/b)``。

    ALM, Minixhofer et al. 2025, arXiv:2503.20083，第 3 节：一段要么就是这段文字，要么是别的，两个
    结果之间的 f-divergence。外面的 τ 与蒸馏的 T² 同一个道理：软化使值与梯度随 1/τ 缩小。τ 很大时
    它趋于 ``a log(a/b) + b - a``，a、b 是教师与学生的 -log 似然，与交叉熵同样大小，相等时为 0。

    Args:
        log_p: ``[C]``，教师的各段的 log 似然，不大于 0。
        log_q: ``[C]``，学生的。
        tau: τ，至少为 1。

    Returns:
        ``[C]``，单位 nat。
    """
    a, b = ((part - SMALLEST) / tau for part in (log_p, log_q))
    return tau * (a.exp() * (a - b) - torch.expm1(a) * (log1mexp(a) - log1mexp(b)))


def uld(p: Tensor, q: Tensor) -> Tensor:
    """各自由大到小排好的概率之差的绝对值之和：``Σ_i |p_(i) - q_(i)|``，短的补 0。

    ULD, Boizard et al. 2024, arXiv:2402.12030，式 (2)。哪个 token 是哪个，它不看。

    Args:
        p: ``[..., V_t]``，教师的概率。
        q: ``[..., V_s]``，学生的。

    Returns:
        ``[...]``。
    """
    width = max(p.shape[-1], q.shape[-1])
    ordered = (
        F.pad(part.sort(-1, descending=True).values, (0, width - part.shape[-1])) for part in (p, q)
    )
    return (next(ordered) - next(ordered)).abs().sum(-1)


def projected_kl(log_p: Tensor, log_q: Tensor, shared: SharedTokens) -> Tensor:
    """教师的概率挪到学生的词表上，再取前向 KL：``KL(p' || q)``，``p'_s = Σ_{first(v) = s} p_v``。

    教师的下一个 token 是 v，学生的下一个 token 多半就是 v 的文字由它来切时的第一个。同
    X-Token, Sreenivas et al. 2026, arXiv:2605.21699 的 P-KL，投影矩阵每行一个 1；没有去处的概率
    不算，其余的重新归一化。

    Args:
        log_p: ``[..., V_t]``，教师的 log 概率。
        log_q: ``[..., V_s]``，学生的。
        shared: 有 ``first`` 的。

    Returns:
        ``[...]``。
    """
    size, first = log_q.shape[-1], shared.first_ids(log_q.device)[: log_p.shape[-1]]
    columns = torch.where(first < 0, size, first)
    moved = log_p.new_zeros(*log_p.shape[:-1], size + 1).index_add(-1, columns, log_p.exp())
    moved = moved[..., :size] / moved[..., :size].sum(-1, keepdim=True)
    ratio = moved.clamp_min(torch.finfo(moved.dtype).tiny).log() - log_q
    return torch.where(moved > 0, moved * ratio, 0).sum(-1)


def gold(p: Tensor, q: Tensor, shared: SharedTokens) -> Tensor:
    """两边都有的 token 用 KL，其余的用 ``uld``，以前者占教师词表的份额 w 加权。

    ``w Σ_共有 p (log p - log q) + (1 - w) uld(其余)``；GOLD, Patiño et al. 2025，TRL 的
    ``ULDLoss``（``uld_use_hybrid_loss``，``beta: 0``）。概率不到 1e-8 的按 1e-8 取对数，与它相同。

    Args:
        p: ``[..., V_t]``，教师的概率。
        q: ``[..., V_s]``，学生的。
        shared: 同样文字的 token。

    Returns:
        ``[...]``；前一项只是一部分 token 的，可以小于 0。
    """
    ours, theirs = shared.ids(q.device)
    same = [part.index_select(-1, ids) for part, ids in ((p, theirs), (q, ours))]
    log_p, log_q = (part.clamp_min(1e-8).log() for part in same)
    matched = (log_p.exp() * (log_p - log_q)).sum(-1)
    rest = uld(p.index_fill(-1, theirs, 0), q.index_fill(-1, ours, 0))
    return shared.weight * matched + (1 - shared.weight) * rest


def first_tokens(
    log_p: Tensor, log_q: Tensor, loss: LossConfig, shared: SharedTokens | None
) -> Tensor:
    """``projected_kl``、``uld`` 或 ``gold``：各段第一个 token 的两个分布，都是 log 概率。"""
    if loss.divergence == "uld":
        return uld(log_p.exp(), log_q.exp())
    assert shared is not None  # 装配时已备好
    if loss.divergence == "projected_kl":
        return projected_kl(log_p, log_q, shared)
    return gold(log_p.exp(), log_q.exp(), shared)


def chunk_sums(rows: Tensor, chunk: Tensor, count: int) -> Tensor:
    """``rows [P]`` 按段求和 ``[C]``，float64；编号为 ``count`` 的不属于哪一段，不算。"""
    sums = torch.zeros(count + 1, dtype=torch.float64, device=rows.device)
    return sums.index_add(0, chunk, rows.double())[:count]


def alm_total(log_p: Tensor, log_q: Tensor, alignment: Alignment, tau: float) -> Tensor:
    """由逐 token 的 log 概率（教师 ``[P_t]``、学生 ``[P]``）得到 Σ alm，float64。"""
    count = len(alignment)
    of_teacher = chunk_sums(log_p, alignment.teacher_chunk, count)
    of_student = chunk_sums(log_q, alignment.student_chunk, count)
    return alm(of_teacher, of_student, tau).sum()


def aligned_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    alignment: Alignment,
    loss: LossConfig,
    shared: SharedTokens | None = None,
) -> LossSums:
    """``α Σ_段 D + (1-α) Σ_token CE``，稠密参考实现。

    Args:
        student_logits: ``[P, V_s]``。
        teacher_logits: ``[P_t, V_t]``；``alpha`` 为 0 时可以是 ``None``。
        labels: ``[P]``，int64，学生的 response token。
        alignment: 教师的标签与各段。
        loss: ``divergence`` 在 ``ACROSS`` 之中的。
        shared: ``projected_kl`` 与 ``gold`` 要的、两边的 token 怎样相配。

    Returns:
        ``LossSums``；``teacher_cross_entropy`` 是教师自己的 token 上的，教师的熵与 top-1 为 0。
    """
    log_q = log_softmax(student_logits)
    at_labels = log_q.gather(1, labels[:, None])[:, 0]
    zero = at_labels.new_zeros(())
    cross_entropy, divergence, theirs = -at_labels.sum(), zero, zero
    if loss.alpha > 0:
        assert teacher_logits is not None
        log_p = log_softmax(teacher_logits)
        their_labels = log_p.gather(1, alignment.teacher_labels[:, None])[:, 0]
        theirs = -their_labels.sum()
        if loss.divergence == "alm":
            divergence = alm_total(their_labels, at_labels, alignment, loss.tau or 1.0)
        else:
            first = log_p[alignment.teacher_first], log_q[alignment.student_first]
            divergence = first_tokens(*first, loss, shared).sum()
    total = loss.alpha * divergence + (1 - loss.alpha) * cross_entropy
    detached = (part.detach() for part in (divergence, cross_entropy, theirs, zero, zero))
    return LossSums(total, *detached)
