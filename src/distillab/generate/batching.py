"""许多条 prompt 分几次采样：CPU 上依次每 32 条，GPU 上由长到短、显存放得下几条就几条。"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..limits import ROWS_TOGETHER, rows_together, sampling_row_bytes
from ..loss.buffers import free_cuda_bytes
from ..models.interface import LanguageModel, evaluating
from ..models.kv_cache import autocast_dtype


def sampling_groups(
    model: LanguageModel, lengths: Sequence[int], new_tokens: int
) -> list[list[int]]:
    """各条 prompt 的长度 → 一次一起采样的是第几条；长度相近的在一起，填充才少。"""
    device = model.head.weight.device
    if device.type != "cuda":
        order, size = list(range(len(lengths))), ROWS_TOGETHER
    else:
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        row_bytes = _row_bytes(model, max(lengths, default=1), new_tokens)
        size = rows_together(max(len(order), 1), row_bytes, free_cuda_bytes(device))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _row_bytes(model: LanguageModel, prompt: int, new_tokens: int) -> int:
    weight = model.head.weight
    size = (autocast_dtype(weight.device) or weight.dtype).itemsize
    linear = (part for part in model.modules() if isinstance(part, nn.Linear))
    shapes = (part.weight.shape for part in linear if part.weight is not weight)
    widest = max((max(shape) for shape in shapes), default=weight.shape[1])
    return sampling_row_bytes(
        prompt,
        new_tokens,
        kv_bytes=_kv_bytes(model),
        wide_bytes=3 * (widest + weight.shape[1]) * size,
        vocab_size=weight.shape[0],
    )


@torch.no_grad()
def _kv_bytes(model: LanguageModel) -> int:
    """缓存里一个 token 的字节数，放一个进去看；状态不随长度增长的层不算。"""
    cache = model.new_cache()
    if cache is None:
        return 0
    with evaluating(model):
        model(torch.zeros(1, 1, dtype=torch.long, device=model.head.weight.device), None, cache)
    layers = cache.layers
    parts = (getattr(layer, name, None) for layer in layers for name in ("keys", "values"))
    return sum(part.nbytes for part in parts if part is not None)
