"""哪些层要紧：裁剪教师之前，在几千个训练 token 上量出来。

两种量法。block influence 一次前向就有各层的分数；贪心地一层一层拿掉，每次拿掉后损失最小的，慢得多，
但看得见几层一起拿掉的后果。
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bars import track
from .decoder import Decoder
from .interface import LanguageModel, evaluating


@torch.no_grad()
def block_influence(model: LanguageModel, rows: Sequence[Tensor]) -> list[float]:
    """各层的 block influence：1 - 一层输入与输出隐状态的余弦，对 ``rows`` 的全部 token 平均（Men et
    al. 2024, ShortGPT，arXiv:2403.03853，式 1）。``rows``：若干条 ``[T]``，int64。
    """
    blocks = model.blocks
    sums = [0.0] * len(blocks)

    def watch(index: int) -> Any:
        def hook(block: Any, given: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = given[0] if given else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            similar = F.cosine_similarity(before.float(), after.float(), dim=-1)  # (1, T)
            sums[index] += float((1 - similar).double().sum())

        return hook

    handles = [
        block.register_forward_hook(watch(index), with_kwargs=True)
        for index, block in enumerate(blocks)
    ]
    try:
        with evaluating(model):
            for row in track(rows, "measuring the layers", len(rows)):
                model(row[None].to(model.head.weight.device))
    finally:
        for handle in handles:
            handle.remove()
    tokens = sum(len(row) for row in rows)
    return [total / tokens for total in sums]


def most_influential(scores: Sequence[float], keep: int) -> list[int]:
    """分数最高的 ``keep`` 层的层号，升序；分数相同的取靠前的。"""
    ranked = sorted(range(len(scores)), key=lambda index: -scores[index])
    return sorted(ranked[:keep])


@torch.no_grad()
def greedy_removal(
    model: Decoder, rows: Sequence[Tensor], keep: int
) -> tuple[list[int], list[float]]:
    """每次拿掉一层，是拿掉后交叉熵最小的那层，直到剩 ``keep`` 层：依次拿掉的层，与拿掉后的损失，nat
    每 token。

    ``rows`` 同 ``block_influence``。看下一个 token 的交叉熵而不看与全模型的 KL：困惑度就是它，不必
    为每个位置留着全模型的 ``[V]``。候选层之前的隐状态各候选共用，没有近似；仍是层数的三次方。
    """
    blocks, left = list(model.layers), list(range(len(model.layers)))
    count = sum(len(row) - 1 for row in rows)
    removed: list[int] = []
    after: list[float] = []
    with evaluating(model):
        rows = [row.to(model.head.weight.device) for row in rows]
        entered = [_entered(model, row) for row in rows]
        for _ in track(range(len(left) - keep), "removing layers", len(left) - keep):
            losses = dict.fromkeys(left, 0.0)
            for row, (hidden, reach) in zip(rows, entered, strict=True):
                for place, layer in enumerate(left):
                    tried = hidden
                    for later in left[place + 1 :]:
                        tried = blocks[later](tried, *reach[later])
                    logits = model.logits(model.norm(tried))[0, :-1]
                    losses[layer] += float(F.cross_entropy(logits, row[1:], reduction="sum"))
                    hidden = blocks[layer](hidden, *reach[layer])
            best = min(left, key=losses.__getitem__)
            left.remove(best)
            removed.append(best)
            after.append(losses[best] / count)
    return removed, after


def _entered(model: Decoder, row: Tensor) -> tuple[Tensor, list[tuple[Any, ...]]]:
    """``row`` 进入第一层时的隐状态 ``[1, T, H]``，与各层另外要的（RoPE 的表与 mask）。"""
    given: list[tuple[Any, ...]] = []
    handles = [
        block.register_forward_pre_hook(lambda _, each: given.append(each))
        for block in model.layers
    ]
    try:
        model(row[None])
    finally:
        for handle in handles:
            handle.remove()
    return given[0][0], [each[1:] for each in given]
