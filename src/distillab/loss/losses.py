"""目标函数的数学，稠密而可读：每种 divergence 一个函数，旁边是它的公式与出处。

约定：p 是教师，q 是学生；参数都是 log 概率 ``[..., V]``，返回 ``[...]``，单位 nat。
``fused.py`` 用同样的数学，但不让 ``[P, V]`` 整个存在。
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.schema import LossConfig
from ..targets import DenseTargets, SparseTargets, Targets


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """前向 KL：KL(p||q) = Σ p (log p - log q)。Hinton et al. 2015, arXiv:1503.02531。"""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """反向 KL：KL(q||p) = Σ q (log q - log p)。MiniLLM, Gu et al. 2023, arXiv:2306.08543。"""
    return forward_kl(log_q, log_p)


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """广义 Jensen-Shannon 散度：β KL(p||m) + (1-β) KL(q||m)，m = β p + (1-β) q。

    GKD, Agarwal et al. 2023, arXiv:2306.13649，式 (1)。
    """
    log_m = mixture(log_p, log_q, beta)
    return beta * forward_kl(log_p, log_m) + (1 - beta) * forward_kl(log_q, log_m)


def skew_forward_kl(log_p: Tensor, log_q: Tensor, skew: float) -> Tensor:
    """到混合分布的前向 KL：KL(p || s p + (1-s) q)。

    DistiLLM, Ko et al. 2024, arXiv:2402.03898，式 (3)。
    """
    return forward_kl(log_p, mixture(log_p, log_q, skew))


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, skew: float) -> Tensor:
    """到混合分布的反向 KL：KL(q || (1-s) p + s q)。

    DistiLLM, Ko et al. 2024, arXiv:2402.03898，式 (4)。
    """
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
        case _:
            raise ValueError(f"divergence {loss.divergence} compares chunks of text, not tokens")


class LossSums(NamedTuple):
    """对 token 求和（不是平均）的标量，float32；只有训练循环做除法。

    Attributes:
        total: α T² ΣD + (1-α) ΣCE，唯一带梯度的一项。
        divergence: ΣD(p_T, q_T)，不含 α 与 T²；α = 0 时为 0。
        cross_entropy: ΣCE(label, q_1)；α = 1 时不计算，为 0。
        teacher_cross_entropy: 教师的 ΣCE(label, p_1)；两样都有时才计算，否则为 0；没有
            ``label_log_prob`` 的 ``SparseTargets`` 不知道它，为 NaN。
        teacher_entropy: ΣH(p_T)，单位 nat；α = 0 时为 0。
        top1_agreement: 两个模型最可能的 token 相同的行数；α = 0 时为 0，没有 ``top`` 的
            ``sampled`` 为 NaN。
    """

    total: Tensor
    divergence: Tensor
    cross_entropy: Tensor
    teacher_cross_entropy: Tensor
    teacher_entropy: Tensor
    top1_agreement: Tensor


def distillation_loss(
    student_logits: Tensor,
    targets: DenseTargets | SparseTargets | None,
    labels: Tensor | None,
    loss: LossConfig,
    excluded: Tensor | None = None,
) -> LossSums:
    """``Σ_tokens α T² D(p_T, q_T) + (1-α) CE(label, q_1)``，稠密参考实现。

    T² 同时乘在值与梯度上，使软标签的梯度不随 T 缩小（Hinton et al. 2015，第 2 节）。

    Args:
        student_logits: ``[P, V]``，在 float32 里计算（float64 仍是 float64）。
        targets: 教师的 logits 或稀疏概率；``alpha`` 为 0 时不看，可以是 ``None``。
        labels: ``[P]``，int64；``alpha`` 为 1 时不看，可以是 ``None``。
        loss: 目标函数。
        excluded: ``[E]``，int64，两边都没有概率的 id；标签与稀疏的 ids 不得在其中。

    Returns:
        ``LossSums``，六个标量。

    Raises:
        ValueError: ``alpha`` 需要教师或标签而没有；``tail`` 不支持这种 divergence 或温度。
    """
    logits = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32))
    zero = logits.new_zeros(())
    sums = dict.fromkeys(LossSums._fields, zero)
    if loss.alpha < 1 and labels is None:
        raise ValueError(f"loss.alpha={loss.alpha:g} needs labels")
    if excluded is not None:
        logits, targets, labels = _without(excluded, logits, targets, labels)
    if loss.alpha > 0:
        if targets is None:
            raise ValueError(f"loss.alpha={loss.alpha:g} needs teacher targets")
        check_targets(targets, loss, *logits.shape)
        log_q = log_softmax(logits / loss.temperature)
        if isinstance(targets, SparseTargets):
            values, entropy = sparse_divergence(targets, log_q, loss)
            top, at_label = targets.likeliest(), targets.label_log_prob
            sums["top1_agreement"] = (
                zero * math.nan if top is None else (logits.argmax(-1) == top).sum()
            )
            if at_label is None:
                sums["teacher_cross_entropy"] = zero * math.nan
            elif loss.alpha < 1 and labels is not None:
                sums["teacher_cross_entropy"] = -at_label.to(logits.dtype).sum()
        else:
            teacher = targets.logits.to(logits.dtype)
            log_p = log_softmax(teacher / loss.temperature)
            values, entropy = divergence(log_p, log_q, loss), -(log_p.exp() * log_p).sum(-1)
            sums["top1_agreement"] = (logits.argmax(-1) == teacher.argmax(-1)).sum()
            if loss.alpha < 1 and labels is not None:
                sums["teacher_cross_entropy"] = F.nll_loss(
                    log_softmax(teacher), labels, reduction="sum"
                )
        sums["divergence"], sums["teacher_entropy"] = values.sum(), entropy.sum()
        sums["total"] = loss.alpha * loss.temperature**2 * sums["divergence"]
    if labels is not None and loss.alpha < 1:
        sums["cross_entropy"] = F.cross_entropy(
            logits, labels, reduction="sum", label_smoothing=loss.label_smoothing
        )
        sums["total"] = sums["total"] + (1 - loss.alpha) * sums["cross_entropy"]
    total = sums.pop("total")
    return LossSums(total, **{name: value.detach() for name, value in sums.items()})


def _without(
    excluded: Tensor,
    logits: Tensor,
    targets: DenseTargets | SparseTargets | None,
    labels: Tensor | None,
) -> tuple[Tensor, DenseTargets | SparseTargets | None, Tensor | None]:
    """去掉没有概率的列；标签与稀疏的 ids 换成剩下的各列里的编号。"""
    kept = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
    kept[excluded] = False
    place = kept.cumsum(0) - 1
    if isinstance(targets, DenseTargets):
        targets = DenseTargets(targets.logits[:, kept])
    elif targets is not None:
        top = None if targets.top is None else place[targets.top]
        targets = replace(targets, ids=place[targets.ids], top=top)
    return logits[:, kept], targets, None if labels is None else place[labels]


def log_softmax(logits: Tensor) -> Tensor:
    """同 ``torch.log_softmax``；后者在 CPU 上的归一化项，词表 151,936 时差 1.6e-5。"""
    shifted = logits - logits.amax(-1, keepdim=True).detach()
    return shifted - shifted.exp().sum(-1, keepdim=True).log()


def sparse_divergence(
    targets: SparseTargets, log_q: Tensor, loss: LossConfig
) -> tuple[Tensor, Tensor]:
    """``SparseTargets`` 的逐行散度与教师的熵，都是 ``[P]``，含义见那里的表；``log_q [P, V]`` 是学生
    在温度 T 下的。
    """
    ids, probs = targets.ids, targets.probs.to(log_q.dtype)
    if targets.tail == "sampled":
        assert targets.entropy is not None  # SparseTargets 已检查
        entropy = targets.entropy.to(log_q.dtype)
        return -(probs * log_q.gather(1, ids)).sum(-1) - entropy, entropy
    if targets.tail == "bucket":
        rest = log_q.scatter(1, ids, -math.inf).logsumexp(-1, keepdim=True)
        log_q = torch.cat([log_q.gather(1, ids), rest], -1)
        probs = torch.cat([probs, 1 - probs.sum(-1, keepdim=True)], -1)
    else:
        softened = probs ** (1 / loss.temperature)
        softened = softened / softened.sum(-1, keepdim=True)
        probs = torch.zeros_like(log_q).scatter(1, ids, softened)
    log_p = probs.clamp(min=torch.finfo(probs.dtype).tiny).log()  # 0 log 0 = 0
    own_entropy = -(probs * log_p).sum(-1)
    entropy = own_entropy if targets.entropy is None else targets.entropy
    return divergence(log_p, log_q, loss), entropy


def check_targets(
    targets: Targets,
    loss: LossConfig,
    rows: int,
    vocab: int,
    cut: bool = False,
    excluded: Tensor | None = None,
) -> None:
    """教师目标与学生、与目标函数是否相合；不合是 ``ValueError``。

    学生有 ``rows`` 行、用到 ``vocab`` 个 token；词表已按 ``vocab_limit`` 截过（``cut``）时，教师的
    可以更大。``excluded`` 是其中没有概率的 id。
    """
    tensors: tuple[Tensor | None, ...]
    if isinstance(targets, SparseTargets):
        _check_tail(targets, loss)
        count, tensors = len(targets.ids), (targets.probs,)
    elif isinstance(targets, DenseTargets):
        count, tensors = len(targets.logits), (targets.logits,)
        _check_vocabulary("logits", targets.logits.shape[1], "columns", vocab, cut)
    else:
        head = targets.head
        count, tensors = len(targets.hidden), (targets.hidden, head.weight, head.bias)
        _check_vocabulary("head", len(head.weight), "rows", vocab, cut)
        _check_excluded(head.excluded, excluded)
    if count != rows:
        raise ValueError(f"the teacher has {count} rows, the student {rows}")
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    ):
        raise ValueError(
            "teacher targets require grad, but the loss gives the teacher none: detach them, or "
            "freeze the teacher"
        )


def _check_vocabulary(what: str, size: int, unit: str, vocab: int, cut: bool) -> None:
    if size != vocab and not (cut and size > vocab):
        raise ValueError(
            f"teacher {what} has {size} {unit}, the student's vocabulary is {vocab}; "
            f"cut both to the shared vocabulary"
        )


def _check_excluded(teacher: Tensor | None, student: Tensor | None) -> None:
    theirs, ours = (0 if part is None else len(part) for part in (teacher, student))
    if theirs not in (0, ours):
        raise ValueError(
            f"the teacher head excludes {theirs} ids, the student {ours}; "
            f"cut both to the shared vocabulary"
        )


def _check_tail(targets: SparseTargets, loss: LossConfig) -> None:
    tail = targets.tail
    if tail == "renormalise":
        if loss.divergence == "reverse_kl":
            raise ValueError(
                "tail renormalise and divergence reverse_kl disagree: the teacher is 0 outside "
                "its K tokens, so KL(q||p) is infinite; use bucket, or another divergence"
            )
        return
    if tail == "sampled" and loss.divergence != "forward_kl":
        raise ValueError(
            f"tail sampled and divergence {loss.divergence} disagree: samples give an unbiased "
            f"gradient for forward_kl only"
        )
    if loss.temperature != 1:
        raise ValueError(
            f"tail {tail} and temperature {loss.temperature:g} disagree: the tail is known at "
            f"temperature 1 only; use renormalise, or temperature 1"
        )
