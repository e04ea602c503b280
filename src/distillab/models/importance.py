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
