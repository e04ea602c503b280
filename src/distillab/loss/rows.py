"""一块 logits 上的逐行算术：值、指标，以及就地写回的、对学生 logits 的梯度。

输入是矩阵乘的原始结果，输出的梯度写在学生那块内存里，所以一块最多只有两份 ``[R, V]``。经
``torch.compile`` 后每行只读写几遍；没有编译器时逐个算子执行，数相同，只是慢。公式都避开相近数
相减：两个模型几乎一致时，KL 约为 ``(log q - log p)²``，而直接写的和式只剩舍入误差。

约定：p 是教师，q 是学生，都在温度 T 下；``d = log q - log p``，``Δ = q - p``，ΣΔ = 0。
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config.schema import LossConfig

NO_PROBABILITY = -1e30
"""没有概率的列的 log 概率：真实的 logits 到不了这里，而 exp 正好是 0。"""


class RowSpec(NamedTuple):
    """编译时就定下来的数：目标函数，两个 head 的逐元素部分，要不要梯度。"""

    divergence: str
    mix: float  # jsd 的 beta，skew_* 的 s
    alpha: float
    temperature: float
    smoothing: float
    vocab: int
    scale: float = 1.0
    softcap: float | None = None
    teacher_scale: float = 1.0
    teacher_softcap: float | None = None
    gradient: bool = True
    excluded: int = 0  # V 列里有几列是 -inf：没有概率，也不分 label smoothing

    @classmethod
    def of(cls, loss: LossConfig, vocab: int) -> RowSpec:
        """从目标函数来的部分。"""
        return cls(
            loss.divergence,
            loss.beta or loss.skew or 0.0,
            loss.alpha,
            loss.temperature,
            loss.label_smoothing,
            vocab,
        )


class RowValues(NamedTuple):
    """每行一个数，``[R]``；没有计算的是 0。"""

    divergence: Tensor
    cross_entropy: Tensor
    teacher_cross_entropy: Tensor
    teacher_entropy: Tensor
    agreement: Tensor


class Logits(NamedTuple):
    """减去了行内最大值的 logits，及其 softmax 的分母的对数。"""

    shifted: Tensor  # [R, V]，不大于 0
    top: Tensor  # [R, 1]
    slope: Tensor | float  # logits 对矩阵乘结果的导数

    def log_sum(self, temperature: float) -> Tensor:
        """归一化项 ``log Σ exp(shifted / T)``，``[R, 1]``。"""
        return total((self.shifted * (1 / temperature)).exp()).log()

    def log_softmax(self, spec: RowSpec) -> Tensor:
        """温度 T 下的 log 概率 ``[R, V]``；没有概率的列是有限的数，两份相减才不是 NaN。"""
        log_q = self.shifted * (1 / spec.temperature) - self.log_sum(spec.temperature)
        return log_q.clamp(min=NO_PROBABILITY) if spec.excluded else log_q

    def finite(self) -> Tensor:
        """``shifted``，没有概率的列换成 0。"""
        return torch.where(self.shifted == -math.inf, 0, self.shifted)


def total(values: Tensor) -> Tensor:
    """``[R, N]`` 的行和 ``[R, 1]``，以 float64 累加。

    编译后的 float32 累加在 N = 151,936 时差 7e-6；jsd 的梯度是相近数之差，会把它放大一百倍。
    """
    return values.sum(-1, keepdim=True, dtype=torch.float64).to(values.dtype)


def finish(
    product: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | float]:
    """``Head.finish`` 以及它的导数；``-inf`` 保持 ``-inf``。"""
    logits = product if bias is None else product + bias.to(product.dtype)
    if scale != 1.0:
        logits = logits * scale
    if softcap is None:
        return logits, scale
    tanh = torch.tanh(logits * (1 / softcap))
    return torch.where(logits == -math.inf, logits, softcap * tanh), scale * (1 - tanh * tanh)


def shifted(product: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Logits:
    """由矩阵乘的结果得到 ``Logits``。"""
    logits, slope = finish(product, bias, scale, softcap)
    # K 个 token 就是整个词表时，其余的全是 -inf
    top = logits.amax(-1, keepdim=True).clamp(min=NO_PROBABILITY)
    return Logits(logits - top, top, slope)


def elementwise(log_p: Tensor, log_q: Tensor, spec: RowSpec) -> tuple[Tensor, Tensor]:
    """每个元素 ``[R, N]`` 对 D 的贡献 f（``Σ f = D``），以及 h：对 log q 的导数，只差每行一个常数。

    ``forward_kl`` 的 h 是 ``Δ``，其余的是它除以 q 之后的；``project`` 由 h 得到梯度。
    """
    p, q, d = log_p.exp(), log_q.exp(), log_q - log_p
    e = torch.expm1(-d.abs())  # 在 (-1, 0]，d 多大都不溢出
    delta = torch.where(d > 0, -q * e, p * e)
    if spec.divergence == "forward_kl":
        return delta - p * d, delta
    if spec.divergence == "reverse_kl":
        return q * d - delta, d
    # m = w p + (1-w) q；a = log p - log m，b = log q - log m = a + d
    w = 1 - spec.mix if spec.divergence == "skew_reverse_kl" else spec.mix
    u = torch.log1p(torch.where(d > 0, w, 1 - w) * e)
    a = torch.where(d > 0, -d - u, -u)
    b = torch.where(d > 0, -u, d - u)
    if spec.divergence == "jsd":
        return w * p * a + (1 - w) * q * b, (1 - w) * b
    if spec.divergence == "skew_forward_kl":
        return p * a + (1 - w) * delta, (w - 1) * torch.expm1(a)
    return q * b - w * delta, b - spec.mix * torch.expm1(b)


def project(h: Tensor, q: Tensor, spec: RowSpec) -> Tensor:
    """``elementwise`` 的 h → D 对 ``logits / T`` 的梯度，都是 ``[R, N]``；每行之和为 0。

    ΣΔ 本来是 0，剩下的是 softmax 归一化的舍入，会沿 weight 的方向积累，所以减去。h 的平均则除以
    ``Σ q``，而不当它等于 1：两个分布相距很远时 h 几乎是常数，同样的舍入会盖过剩下的那一点。
    """
    if spec.divergence == "forward_kl":
        return h - q * total(h)
    return q * (h - total(q * h) / total(q))


def dense_rows(
    student: Tensor,
    teacher: Tensor | None,
    label_product: Tensor | None,
    labels: Tensor | None,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    spec: RowSpec,
) -> tuple[Tensor, ...]:
    """两份 ``[R, V]`` 的 ``hidden @ weight.T`` → ``RowValues`` 的各项；``student`` 就地变成梯度。

    返回的都是单个张量：有的 PyTorch 编译不了 ``_replace`` 出来的 namedtuple。标签处的
    ``-(1-α)(1-ε)`` 不在其中：它由调用者加上，系数是最后一个返回值 ``[R]``。α 为 0 时没有
    ``teacher``，为 1 时没有 ``labels`` 与 ``label_product``（``student`` 在标签处的数）。
    ``spec.excluded`` 的列须已填成 ``-inf``；它们的梯度没有意义，由调用者填成 0。
    """
    logits = shifted(student, bias, spec.scale, spec.softcap)
    zero = logits.top[:, 0] * 0
    values = RowValues(zero, zero, zero, zero, zero)
    gradient: Any = 0.0
    if teacher is not None:
        other = shifted(teacher, teacher_bias, spec.teacher_scale, spec.teacher_softcap)
        log_q, log_p = logits.log_softmax(spec), other.log_softmax(spec)
        # elementwise 之外再算一次 exp：编译之后，共用的 p、q 要写进内存，带标签时慢约 5%
        f, h = elementwise(log_p, log_q, spec)
        same = ((logits.shifted == 0) & (other.shifted == 0)).any(-1)
        values = values._replace(
            divergence=total(f)[:, 0],
            teacher_entropy=-total(log_p.exp() * log_p)[:, 0],
            agreement=same.to(f.dtype),
        )
        if labels is not None:
            at_label = other.shifted.gather(-1, labels[:, None])
            values = values._replace(teacher_cross_entropy=(other.log_sum(1.0) - at_label)[:, 0])
        gradient = spec.alpha * spec.temperature * project(h, log_q.exp(), spec)
    label_gradient = zero
    if labels is not None and label_product is not None:
        log_sum = logits.log_sum(1.0)
        shifted_sum = zero
        if spec.smoothing:
            shifted_sum = total(logits.finite() if spec.excluded else logits.shifted)[:, 0]
        cross_entropy, label_gradient = label_rows(
            logits, log_sum, shifted_sum, label_product, labels, bias, spec
        )
        values = values._replace(cross_entropy=cross_entropy)
        if spec.alpha < 1:
            gradient = gradient + uniform_rows(logits.shifted, log_sum, spec)
    if spec.gradient:
        student.copy_(gradient * logits.slope)
    return *values, label_gradient


def label_rows(
    logits: Logits,
    log_sum: Tensor,
    shifted_sum: Tensor,
    label_product: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    spec: RowSpec,
) -> tuple[Tensor, Tensor]:
    """硬标签的一项，ε 是 label smoothing：``CE = -Σ_v ((1-ε) 1(v = label) + ε/V) log q_v``。

    ``log_sum [R, 1]`` 是 T = 1 的，``shifted_sum [R]`` 是 ``Σ_v shifted``（ε 为 0 时不看）。返回 CE
    与对标签处矩阵乘结果的梯度 ``-(1-α)(1-ε)``，都是 ``[R]``。
    """
    label_bias = None if bias is None else bias[labels]
    logit, slope = finish(label_product, label_bias, spec.scale, spec.softcap)
    normaliser = log_sum[:, 0]
    cross_entropy = normaliser - (logit - logits.top[:, 0])
    if spec.smoothing:
        average = normaliser - shifted_sum / (spec.vocab - spec.excluded)
        cross_entropy = (1 - spec.smoothing) * cross_entropy + spec.smoothing * average
    share = (1 - spec.alpha) * (1 - spec.smoothing)
    return cross_entropy, slope * (logit * 0 - share)


def uniform_rows(shifted: Tensor, log_sum: Tensor, spec: RowSpec) -> Tensor:
    """``(1-α)(q_1 - ε/V)``：CE 的梯度里每个 token 都有的部分，``[R, N]``。"""
    smoothed = spec.smoothing / (spec.vocab - spec.excluded)
    return (1 - spec.alpha) * ((shifted - log_sum).exp() - smoothed)
