"""由教师的完整分布到每行 K 个 token 的 ``SparseTargets``：无偏的抽样，或最可能的 K 个。"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import DistillabError
from ..loss.buffers import default_budget
from ..loss.chunking import Chunking
from ..loss.products import head_products
from ..loss.rows import NO_PROBABILITY, total
from ..targets import DenseTargets, HiddenTargets, SparseTargets

LOGIT_BYTES, ELEMENT_BYTES = 4, 24
"""一行里每个 token 的 logit，与它在全部中间结果里，一共要几个字节：CPU 上只有 logits 整块存在。"""

UNIT = 2.0**40
"""最可能的 token 的权重，其余按比例取整；2**22 个 token 的和仍在 int64 之内。"""


class _Rows(NamedTuple):
    """教师的一块：p 是 ``odds / sum``。"""

    span: slice  # 在 P 行里的哪几行
    scores: Tensor  # [R, V]，减去了最大值的 logits，没有概率的是 NO_PROBABILITY
    odds: Tensor  # [R, V]，exp(scores)
    sum: Tensor  # [R, 1]


def uniforms(seed: int, key: bytes, count: int) -> Tensor:
    """一篇 ``key`` 的前 ``count`` 个位置各自的均匀数 ``[count]``，float64，在 ``[0, 1)``。

    由计数器生成（Philox，Salmon et al. 2011），密钥是 ``seed`` 与 ``key`` 的 sha256：在哪台机器上、
    与谁同批、这次算到第几个位置，第 i 个都是同一个数。
    """
    digest = hashlib.sha256(b"%d:%b" % (seed, key)).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)
    return torch.from_numpy((words >> np.uint64(11)) * 2.0**-53)


def sampled_targets(
    targets: HiddenTargets | DenseTargets, labels: Tensor, uniforms: Tensor, samples: int
) -> SparseTargets:
    """每行系统抽样 K = ``samples`` 个 token：``ids [P, K]`` 不减、可以重复，权重都是 ``1 / K``。

    ``uniforms [P]`` 在 ``[0, 1)``：抽 CDF 在 ``(k + U) / K`` 处的 token，它的次数是 ``K p`` 的
    floor 或 ceil，平均恰好是 ``K p``；平均如此的整数里它的方差最小，所以不大于独立地抽 K 次的
    （Anshumann et al. 2025, arXiv:2503.16870）。CDF 是整数的累加，没有舍入；事先把各 token 的权重
    取整，使它的概率至多差最可能的 token 的 ``2**-41``。没有概率的 token 从不抽到。``labels [P]``
    是标签。
    """
    steps = torch.arange(samples, dtype=torch.float64, device=labels.device)
    points = (steps + uniforms.to(steps)[:, None]) / samples

    def draw(rows: _Rows) -> tuple[Tensor, ...]:
        bounds = (rows.odds * UNIT).round_().long().cumsum_(-1)
        end = bounds[:, -1:]
        wanted = (points[rows.span] * end).long().minimum(end - 1)
        ids = torch.searchsorted(bounds, wanted, right=True)
        # 教师是 NaN 的行也要有 id，由损失来报
        return ids.clamp_(max=bounds.shape[1] - 1), rows.scores.argmax(-1)

    ids, top, entropy, at_label = _by_chunks(targets, labels, draw)
    probs = torch.full(ids.shape, 1 / samples, device=ids.device)
    return SparseTargets(ids, probs, "sampled", entropy, at_label, top)


def top_k_targets(
    targets: HiddenTargets | DenseTargets,
    labels: Tensor,
    k: int,
    tail: Literal["renormalise", "bucket"],
) -> SparseTargets:
    """每行最可能的 ``k`` 个 token，概率递减，已取整到 float16 能存的数；``entropy`` 是完整分布的。

    ``labels [P]`` 是标签。``DistillabError``：教师没有 ``k`` 个有概率的 token。
    """
    vocab = _vocabulary(targets)
    if k > vocab:
        raise DistillabError(
            f"teacher.cache.k is {k}, the vocabulary has {vocab} tokens: expected at most {vocab}"
        )

    def best(rows: _Rows) -> tuple[Tensor, ...]:
        highest, ids = rows.scores.topk(k)  # odds 下溢为 0 的也分得出先后
        return ids, (highest.exp() / rows.sum).half().float()

    ids, probs, entropy, at_label = _by_chunks(targets, labels, best)
    return SparseTargets(ids, probs, tail, entropy, at_label, ids[:, 0])


def _vocabulary(targets: HiddenTargets | DenseTargets) -> int:
    """教师有概率的 token 数；``DenseTargets`` 里 ``-inf`` 的列也算。"""
    if isinstance(targets, DenseTargets):
        return targets.logits.shape[1]
    excluded = targets.head.excluded
    return len(targets.head.weight) - (0 if excluded is None else len(excluded))


@torch.no_grad()
def _by_chunks(
    targets: HiddenTargets | DenseTargets,
    labels: Tensor,
    keep: Callable[[_Rows], tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """``keep`` 的各项，其后是熵与标签的 log 概率，都是 ``[P, ...]``；``[P, V]`` 从不整个存在。"""
    if isinstance(targets, DenseTargets):
        source, head, vocab = targets.logits, None, targets.logits.shape[1]
    else:
        source, head, vocab = targets.hidden, targets.head, len(targets.head.weight)
    device, count = source.device, len(source)
    each = LOGIT_BYTES if device.type == "cpu" else ELEMENT_BYTES
    chunking = Chunking.of(count, vocab, each, 0, device.type, default_budget(device))
    parts = []
    with head_products(device.type, source.dtype) as products:
        for start in range(0, max(count, 1), chunking.size):
            chunk = source[start : start + chunking.size]
            if head is not None:
                rows = products.rows(chunk)
                chunk = rows.new_empty(len(rows), vocab, dtype=products.dtype)
                products.logits(rows, products.weight(head.weight), chunk)
            for first in range(0, max(len(chunk), 1), chunking.tile):
                logits = chunk[first : first + chunking.tile].to(products.dtype)
                span = slice(start + first, start + first + len(logits))
                logits = logits if head is None else head.finish(logits)
                scores = (logits - logits.amax(-1, keepdim=True)).clamp_(min=NO_PROBABILITY)
                odds = scores.exp()
                odds_sum = total(odds)
                log_sum = odds_sum.log()
                entropy = log_sum - total(scores * odds) / odds_sum
                at_label = scores.gather(1, labels[span, None]) - log_sum
                kept = keep(_Rows(span, scores, odds, odds_sum))
                parts.append((*kept, entropy[:, 0], at_label[:, 0]))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))
