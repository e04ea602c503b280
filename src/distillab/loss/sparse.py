"""教师只给出 K 个 token 时的逐行算术；词表上只有学生的 softmax，其余都是 ``[R, K]``。

K 个 token 之外，学生的概率总和由那些 token 自己相加得出（而不是 ``1 - Σ q_k``），K 个 token 处的
梯度在 ``[R, K]`` 上算好再写入：两个分布几乎一致时没有相近数相减。
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..targets import Tail
from .rows import (
    Logits,
    RowSpec,
    RowValues,
    elementwise,
    finish,
    label_rows,
    shifted,
    total,
    uniform_rows,
)

TINY = 1e-30


def sparse_rows(
    student: Tensor,
    id_product: Tensor,
    ids: Tensor,
    probs: Tensor,
    entropy: Tensor | None,
    label_log_prob: Tensor | None,
    top_product: Tensor | None,
    top: Tensor | None,
    label_product: Tensor | None,
    labels: Tensor | None,
    bias: Tensor | None,
    tail: Tail,
    spec: RowSpec,
) -> tuple[Tensor, ...]:
    """``[R, V]`` 与教师的 K 个概率 → ``RowValues`` 的各项；``student`` 变成其余 token 的梯度。

    ``sampled`` 之外，``student`` 在 ``ids [R, K]`` 处须已填成 ``-inf``（``id_product [R, K]`` 是填
    之前的数，``top_product [R]`` 是教师最可能的 token ``top`` 处的）；它们的梯度 ``[R, K]`` 是倒数
    第二个，由调用者写入（``sampled`` 时是加上）。标签处同 ``dense_rows``：要加的梯度 ``[R]`` 是最后
    一个。
    """
    id_logits, id_slope = finish(
        id_product, None if bias is None else bias[ids], spec.scale, spec.softcap
    )
    logits = shifted(student, bias, spec.scale, spec.softcap)
    masked = tail != "sampled"
    if masked:  # 最大值也可能在 K 个 token 之中
        highest = torch.maximum(logits.top, id_logits.amax(-1, keepdim=True))
        logits = Logits(logits.shifted + (logits.top - highest), highest, logits.slope)
    id_logits = id_logits - logits.top

    def normaliser(temperature: float) -> tuple[Tensor, Tensor]:
        """``(log Σ exp(logits / T), K 个 token 之外的概率之和)``，都是 ``[R, 1]``。"""
        rest = total((logits.shifted * (1 / temperature)).exp())
        inside = (id_logits * (1 / temperature)).exp().sum(-1, keepdim=True) if masked else 0.0
        return (rest + inside).log(), rest / (rest + inside)

    log_sum, rest = normaliser(spec.temperature)
    log_q = id_logits * (1 / spec.temperature) - log_sum
    if masked:
        divergence, id_gradient, rest_gradient, own_entropy = outcomes(
            probs, log_q, rest, tail, spec
        )
    else:
        assert entropy is not None  # SparseTargets 已检查
        divergence = -(probs * log_q).sum(-1) - entropy
        id_gradient, rest_gradient = -probs, probs.sum(-1, keepdim=True)
        own_entropy = entropy
    zero = logits.top[:, 0] * 0
    agreement = teacher_cross_entropy = zero * math.nan
    if top is not None and top_product is not None:
        top_bias = None if bias is None else bias[top]
        top_logit, _ = finish(top_product, top_bias, spec.scale, spec.softcap)
        agreement = (top_logit >= logits.top[:, 0]).to(log_q.dtype)
    if label_log_prob is not None:
        teacher_cross_entropy = zero if labels is None else -label_log_prob
    values = RowValues(
        divergence=divergence,
        cross_entropy=zero,
        teacher_cross_entropy=teacher_cross_entropy,
        teacher_entropy=own_entropy if entropy is None else entropy,
        agreement=agreement,
    )
    softened = (logits.shifted * (1 / spec.temperature) - log_sum).exp()
    gradient = spec.alpha * spec.temperature * rest_gradient * softened
    id_gradient = spec.alpha * spec.temperature * id_gradient
    label_gradient = zero
    if labels is not None and label_product is not None:
        log_sum, _ = normaliser(1.0)
        shifted_sum = zero
        if spec.smoothing:
            shifted_sum = total(logits.finite())[:, 0] + (id_logits.sum(-1) if masked else 0)
        cross_entropy, label_gradient = label_rows(
            logits, log_sum, shifted_sum, label_product, labels, bias, spec
        )
        values = values._replace(cross_entropy=cross_entropy)
        if spec.alpha < 1:
            gradient = gradient + uniform_rows(logits.shifted, log_sum, spec)
        if masked and spec.alpha < 1:
            id_gradient = id_gradient + uniform_rows(id_logits, log_sum, spec)
    if spec.gradient:
        student.copy_(gradient * logits.slope)
    return *values, id_gradient * id_slope, label_gradient


def outcomes(
    probs: Tensor, log_q: Tensor, rest: Tensor, tail: Tail, spec: RowSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``renormalise`` 与 ``bucket`` 的散度：``[R, K]`` 个结果，外加其余 token 合成的一个。

    ``probs [R, K]`` 是 T = 1 的，``log_q [R, K]`` 与其余 token 上的概率之和 ``rest [R, 1]`` 是学生
    在温度 T 下的。返回 D ``[R]``、ids 处对 ``logits/T`` 的梯度 ``[R, K]``、其余 token 处梯度与 q 之
    比 ``[R, 1]``、教师的熵 ``[R]``。
    """
    if tail == "bucket":
        # 尾部是 1 减去几乎等于 1 的数：用 float64 求和
        left = (1 - probs.double().sum(-1, keepdim=True)).to(probs.dtype)
        probs = torch.cat([probs, left.clamp(min=TINY)], -1)
        log_q = torch.cat([log_q, rest.clamp(min=TINY).log()], -1)
    present = probs > 0
    log_p = torch.where(present, probs, 1).log() * (1 / spec.temperature)
    if tail == "renormalise":
        log_p = log_p - torch.where(present, log_p, -math.inf).logsumexp(-1, keepdim=True)
    zero_h = at_zero(spec)
    q = log_q.exp()
    f, h = elementwise(log_p, log_q, spec)
    f = torch.where(present, f, zero_h * q)
    h = torch.where(present, h, q if spec.divergence == "forward_kl" else zero_h)
    entropy = -torch.where(present, log_p.exp() * log_p, 0).sum(-1)
    divergence = f.sum(-1)
    if tail == "renormalise":
        divergence = divergence + zero_h * rest[:, 0]
    forward = spec.divergence == "forward_kl"
    g = h if forward else q * h
    total_g, total_q = total(g), total(q)
    if tail == "renormalise":
        total_g, total_q = total_g + zero_h * rest, total_q + rest
        rest_h = torch.full_like(rest, zero_h)
    else:
        rest_h = h[:, -1:] / rest.clamp(min=TINY) if forward else h[:, -1:]
    middle = total_g / total_q
    gradient, rest_gradient = g - q * middle, rest_h - middle
    if tail == "bucket":
        gradient = gradient[:, :-1]
    return divergence, gradient, rest_gradient, entropy


def at_zero(spec: RowSpec) -> float:
    """教师概率为 0 处的 ``h``，也正是那里的 ``f / q``；``reverse_kl`` 在那里无穷大。"""
    keep = 1 - spec.mix
    match spec.divergence:
        case "forward_kl":
            return 1.0
        case "jsd":
            return -keep * math.log(keep)
        case "skew_forward_kl":
            return keep
        case "skew_reverse_kl":
            return -math.log(spec.mix) - keep
        case _:
            return math.inf
