"""给定上文，一段文字有多大可能：选择题与 lm-evaluation-harness 共用。

同一个上文只算一遍，它的几段后文接在同一份 KV cache 后面；由长到短分批；词表投影只乘要打分的
位置，``[B, T, V]`` 从不存在。
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..loss.losses import log_softmax
from ..models.interface import LanguageModel, evaluating
from ..models.kv_cache import LayerCache
from ..targets import Head
from ..vocabulary import Vocabulary
from .generator import padded

CHUNK_BYTES = 128 * 2**20
"""一次展开这么多字节的 float32 logits。"""


class Likelihood(NamedTuple):
    """一段后文的似然。"""

    total: float  # 各 token 的 log 概率之和，单位 nat
    tokens: int
    greedy: bool  # 每个 token 都是最可能的那一个，即贪心会写出它


class _Piece(NamedTuple):
    """一个上文与它的几段后文。"""

    context: tuple[int, ...]
    rows: list[int]  # 各段后文在输入里的下标，最长的在前
    fed: int  # 最长的后文要喂给模型的 token 数：最后一个 token 只被预测


class _Places(NamedTuple):
    """一次前向里要打分的位置。"""

    hidden: Tensor  # [U, H]
    which: list[int]  # [R]，每个 label 由 hidden 的哪一行预测，不减
    labels: list[int]  # [R]
    rows: list[int]  # [R]，属于哪段后文


Requests = Sequence[tuple[Sequence[int], Sequence[int]]]
"""各 ``(上文, 后文)`` 的 token。"""


@torch.no_grad()
def likelihoods(
    model: LanguageModel, requests: Requests, *, vocabulary: Vocabulary, batch_size: int
) -> list[Likelihood]:
    """算出每段后文在它的上文之后的似然，与 ``requests`` 一一对应；只有 ``vocabulary`` 里的有概率。

    log 概率是 float32，求和用 float64。一起算 ``batch_size`` 段后文。上文与后文都不能是空的，合起来
    除最后一个 token 外不超过 ``model.max_seq_len``，否则是 ``ValueError``。
    """
    for context, continuation in requests:
        length = len(context) + len(continuation) - 1
        if not context or not continuation or length > model.max_seq_len:
            raise ValueError(
                f"context of {len(context)} and continuation of {len(continuation)} tokens: "
                f"expected at least 1 each, and {model.max_seq_len} at most without the last"
            )
    totals = torch.zeros(len(requests), dtype=torch.float64)
    greedy = torch.ones(len(requests), dtype=torch.bool)
    with evaluating(model):
        head = model.head.cut(vocabulary)
        alone, shared = _pieces(requests, batch_size, _can_share(model))
        for pieces, forward in ((shared, _after_shared), (alone, _whole)):
            for batch in _batches(pieces, batch_size, model.max_seq_len):
                for places in forward(model, requests, batch):
                    values, best = _score(head, places)
                    rows = torch.tensor(places.rows)
                    totals.index_add_(0, rows, values)
                    greedy[rows[~best]] = False
    return [
        Likelihood(total, len(continuation), is_greedy)
        for total, (_, continuation), is_greedy in zip(
            totals.tolist(), requests, greedy.tolist(), strict=True
        )
    ]


def _can_share(model: LanguageModel) -> bool:
    """算好的上文能不能一次接上几个 token：线性注意力等的状态只会一步一步地接。"""
    cache = model.new_cache()
    layers = [] if cache is None or not model.pads_left else cache.layers
    return bool(layers) and all(isinstance(layer, LayerCache) for layer in layers)


def _pieces(requests: Requests, size: int, share: bool) -> tuple[list[_Piece], list[_Piece]]:
    """``(只有一段后文的, 有几段后文的)``，都由长到短。"""
    groups: dict[object, list[int]] = {}
    for row, (context, _) in enumerate(requests):
        groups.setdefault(tuple(context) if share else row, []).append(row)
    alone: list[_Piece] = []
    shared: list[_Piece] = []
    for rows in groups.values():
        rows.sort(key=lambda row: -len(requests[row][1]))
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            context, longest = requests[part[0]]
            piece = _Piece(tuple(context), part, len(longest) - 1)
            (shared if len(part) > 1 else alone).append(piece)
    alone.sort(key=lambda piece: -len(piece.context) - piece.fed)
    shared.sort(key=lambda piece: (-len(piece.context), -piece.fed))
    return alone, shared


def _batches(pieces: list[_Piece], size: int, longest: int) -> Iterator[list[_Piece]]:
    """后文合计至多 ``size`` 段；上文与后文各自补齐之后也放得进 ``longest``。"""
    batch: list[_Piece] = []
    for piece in pieces:
        wider = max(one.fed for one in (*batch, piece))
        full = sum(len(one.rows) for one in batch) + len(piece.rows) > size
        too_wide = len(piece.rows) > 1 and bool(batch) and len(batch[0].context) + wider > longest
        if full or too_wide:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


def _whole(model: LanguageModel, requests: Requests, batch: list[_Piece]) -> Iterator[_Places]:
    """上文与后文一次算完。"""
    rows = [piece.rows[0] for piece in batch]
    texts = [[*requests[row][0], *requests[row][1][:-1]] for row in rows]
    # 右边的填充谁也看不到；左边的，循环的模型未必看不到。
    side: Literal["left", "right"] = "left" if model.pads_left else "right"
    hidden = model(*padded(texts, 0, model.head.weight.device, side))
    labels = [list(requests[row][1]) for row in rows]
    ends = [hidden.shape[1] if side == "left" else len(text) for text in texts]
    used = torch.cat(
        [
            hidden[i, end - len(part) : end]
            for i, (end, part) in enumerate(zip(ends, labels, strict=True))
        ]
    )
    flat = [label for part in labels for label in part]
    of = [row for row, part in zip(rows, labels, strict=True) for _ in part]
    yield _Places(used, list(range(len(flat))), flat, of)


def _after_shared(
    model: LanguageModel, requests: Requests, batch: list[_Piece]
) -> Iterator[_Places]:
    """先算各个上文，再把每段后文接上去。"""
    device = model.head.weight.device
    pairs = [(i, row) for i, piece in enumerate(batch) for row in piece.rows]
    longer = [(i, row) for i, row in pairs if len(requests[row][1]) > 1]
    cache = model.new_cache() if longer else None
    ids, mask = padded([piece.context for piece in batch], 0, device)
    first = [requests[row][1][0] for _, row in pairs]
    hidden = model(ids, mask, cache)[:, -1]  # (B, H)
    yield _Places(hidden, [i for i, _ in pairs], first, [row for _, row in pairs])
    if cache is None:
        return
    chosen = torch.tensor([i for i, _ in longer], device=device)
    cache.batch_select_indices(chosen)
    texts = [list(requests[row][1]) for _, row in longer]
    width = max(map(len, texts)) - 1
    # 右边的填充排在真实 token 之后，因果注意力看不到它，mask 不必管。
    fed = [[*text[:-1], *[0] * (width + 1 - len(text))] for text in texts]
    if mask is not None:
        mask = F.pad(mask[chosen], (0, width), value=1)
    hidden = model(torch.tensor(fed, device=device), mask, cache)  # (B', W, H)
    used = torch.cat([hidden[i, : len(text) - 1] for i, text in enumerate(texts)])
    flat = [label for text in texts for label in text[1:]]
    of = [row for (_, row), text in zip(longer, texts, strict=True) for _ in text[1:]]
    yield _Places(used, list(range(len(flat))), flat, of)


def _score(head: Head, places: _Places) -> tuple[Tensor, Tensor]:
    """``(各 label 的 log 概率 [R]，float64；它是不是最可能的 [R])``，在主机上。"""
    device = places.hidden.device
    which = torch.tensor(places.which, device=device)
    labels = torch.tensor(places.labels, device=device)
    size = max(1, CHUNK_BYTES // (4 * len(head.weight)))
    values, best = [], []
    for start in range(0, len(places.hidden), size):
        logits = head.logits(places.hidden[start : start + size])
        here = (which >= start) & (which < start + size)
        rows, targets = which[here] - start, labels[here]
        values.append(log_softmax(logits)[rows, targets].double().cpu())
        best.append((logits.argmax(-1)[rows] == targets).cpu())
    return torch.cat(values), torch.cat(best)
