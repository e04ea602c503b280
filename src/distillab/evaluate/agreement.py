"""两个模型在同样的 token 上有多一致，逐个 token 算出；``[P, V]`` 从不整个存在。

logits 与 log 概率是 float32，跨 token 的总和是 float64。数学在 ``losses.py``。
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..figures import AGREEMENT
from ..loss.losses import forward_kl, log_softmax, reverse_kl
from ..loss.products import head_products
from ..targets import HiddenTargets

Rows = dict[str, NDArray[np.float64]]
"""名字 → 每个 token 一个值 ``[P]``：``nats``，有教师时还有 ``AGREEMENT`` 的各项。"""

TOP = 5

CHUNK_BYTES = 32 * 2**20
"""一次展开这么多字节的 float32 logits；算的时候另有几份同样大的中间结果。"""

BANDS = {"top 10": 10, "11-100": 100, "101-1000": 1000, "rest": None}
"""按标签 token 的频次排名分段，值是每段的最后一名。"""


@torch.no_grad()
def score_rows(
    student: HiddenTargets, labels: Tensor, teacher: HiddenTargets | None = None
) -> Rows:
    """逐个 token 的 -log 概率与同教师的一致程度，在主机上；``labels: [P]``，int64。两边的行数或词表
    不同是 ``ValueError``。
    """
    shapes = {(len(part.hidden), len(part.head.weight)) for part in (student, teacher) if part}
    if len(shapes) > 1:
        raise ValueError(f"student and teacher have (rows, vocabulary) {sorted(shapes)}")
    size = max(1, CHUNK_BYTES // (4 * len(student.head.weight)))
    chunks = []
    for start in range(0, len(labels), size):
        rows = slice(start, start + size)
        q = _logits(student, rows)
        log_q = log_softmax(q)
        values = {"nats": -log_q.gather(1, labels[rows, None])[:, 0]}
        if teacher is not None:
            p = _logits(teacher, rows)
            log_p = log_softmax(p)
            if (excluded := student.head.excluded) is not None:  # 两边都是 -inf，不能相减
                log_q, log_p = (part.index_fill(1, excluded, 0) for part in (log_q, log_p))
            values["forward_kl"] = forward_kl(log_p, log_q)
            values["reverse_kl"] = reverse_kl(log_p, log_q)
            values["top1"] = p.argmax(-1) == q.argmax(-1)
            values["top5"] = _overlap(p, q)
        chunks.append(torch.stack([value.double() for value in values.values()]))
    names = ("nats", *(AGREEMENT if teacher is not None else ()))
    return dict(zip(names, torch.cat(chunks, 1).cpu().numpy(), strict=True))


def _logits(model: HiddenTargets, rows: slice) -> Tensor:
    """几行的 float32 logits；输入是半精度时也只有结果取整。"""
    hidden, weight = model.hidden[rows], model.head.weight
    with head_products(hidden.device.type, hidden.dtype) as products:
        out = hidden.new_empty(len(hidden), len(weight), dtype=products.dtype)
        products.logits(products.rows(hidden), products.weight(weight), out)
    return model.head.finish(out)


def _overlap(p: Tensor, q: Tensor) -> Tensor:
    count = min(TOP, p.shape[-1])
    theirs, ours = p.topk(count).indices, q.topk(count).indices  # (R, 5)
    return (theirs[:, :, None] == ours[:, None, :]).any(-1).double().mean(-1)


def by_position(rows: Rows, positions: NDArray[np.int64]) -> list[dict[str, Any]]:
    """按位置（``positions: [P]``，从 1 起）分段，1、2-3、4-7……；每段
    ``{"from", "to", "tokens", ...各项的平均}``，没有 token 的段不出现。
    """
    powers = np.frexp(positions)[1] - 1  # floor(log2(position))，没有舍入
    longest = int(positions.max())
    return [
        {
            "from": 2**power,
            "to": min(2 ** (power + 1) - 1, longest),
            **_means(rows, powers == power),
        }
        for power in np.unique(powers).tolist()
    ]


def by_frequency(rows: Rows, labels: NDArray[np.int64]) -> list[dict[str, Any]]:
    """按标签 token 在 ``labels``（``[P]``）里的频次排名分段，并列时 id 小的在前；每段
    ``{"band", "tokens", ...各项的平均}``，没有 token 的段不出现。
    """
    tokens, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    rank = np.empty(len(tokens), dtype=np.int64)
    rank[np.lexsort((tokens, -counts))] = np.arange(1, len(tokens) + 1)
    ranks = rank[inverse]
    found, first = [], 1
    for band, last in BANDS.items():
        chosen = (ranks >= first) & (ranks <= (last or len(tokens)))
        if chosen.any():
            found.append({"band": band, **_means(rows, chosen)})
        first = (last or 0) + 1
    return found


def _means(rows: Rows, chosen: NDArray[np.bool_]) -> dict[str, Any]:
    count = int(chosen.sum())
    means = {name: float(rows[name][chosen].sum()) / count for name in AGREEMENT}
    return {"tokens": count, **{n: v if np.isfinite(v) else None for n, v in means.items()}}
