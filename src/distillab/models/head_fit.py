"""由模型自己的 logits 定出 ``Head``：配置里的名字只是线索，各家不同，算出来相同才算数。"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import DistillabError
from ..targets import Head

ROWS = 8192
"""至多比较词表里均匀的这么多行：大词表的 float32 拷贝有好几 GB。"""


def relative_error(found: Tensor, expected: Tensor, dim: int | None = None) -> Tensor:
    """``|found - expected| / |expected|``（均方根），整体的或 ``dim`` 上的；有 NaN 则是 NaN。"""
    found, expected = found.double(), expected.double()
    error: Tensor = (found - expected).norm(dim=dim) / expected.norm(dim=dim).clamp(min=1e-30)
    return error


def tolerance(dtype: torch.dtype) -> float:
    """同一个模型的两种算法，相对误差不超过它：半精度在矩阵乘与其后的每一步各舍入一次。"""
    return max(1e-3, 4 * torch.finfo(dtype).eps)


def fit_head(head: Head, hidden: Tensor, logits: Tensor, values: Mapping[str, Any]) -> Head:
    """给 ``head`` 补上 scale 与 softcap，使它由 ``hidden [N, H]`` 算出模型的 ``logits [N, V]``。

    scale 由最小二乘得出；配置 ``values`` 里有这个数（或它的倒数），就取准确的那个。没有这样的 scale
    与 softcap，或 logits 不是有限的，是 ``DistillabError``。
    """
    size = head.weight.shape[0]
    if hidden.shape[-1] != head.weight.shape[1] or logits.shape[-1] != size:
        raise DistillabError(
            f"its hidden states have width {hidden.shape[-1]} and its logits {logits.shape[-1]}, "
            f"expected those of its output layer, {head.weight.shape[1]} and {size}"
        )
    rows = torch.linspace(0, size - 1, min(size, ROWS), device=hidden.device).long()
    own = logits[:, rows].float()
    if not bool(own.isfinite().all()):
        raise DistillabError(
            f"its logits are not finite in {str(head.weight.dtype).removeprefix('torch.')}: "
            "give another dtype, or the weights are damaged"
        )
    part = Head(head.weight[rows], None if head.bias is None else head.bias[rows])
    plain = part.logits(hidden)
    numbers = _numbers(values)
    scales = [1.0, *(scale for value in numbers.values() for scale in (value, 1 / value))]
    caps = [value for name, value in numbers.items() if "cap" in name and value > 0]
    allowed = tolerance(head.weight.dtype)  # 隐状态可能是 float32 的，头仍在半精度里乘
    found: list[tuple[float, Tensor, Head]] = []
    for softcap in (*caps, None):
        scale = _scale(plain, own, softcap)
        exact = min(scales, key=lambda value: abs(value - scale))
        if abs(exact - scale) <= allowed * abs(scale):
            scale = exact
        finished = Head(part.weight, None, scale, softcap).finish(plain)
        error = float(relative_error(finished, own))
        found.append((error, finished, Head(head.weight, head.bias, scale, softcap)))
    error, finished, best = min(found, key=lambda one: one[0])
    if error > allowed:
        raise DistillabError(
            f"its logits differ from those of its last hidden states and its output layer by up "
            f"to {float((finished - own).abs().max()):.3g} (the largest is "
            f"{float(own.abs().max()):.3g}): there is a step between that is not a scale or a "
            "softcap; choose another model"
        )
    return best


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """配置里可能与 logits 有关的数。"""
    return {
        name: float(value)
        for name, value in values.items()
        if ("logit" in name or "head_multiplier" in name)
        and isinstance(value, int | float)
        and value
    }


def _scale(plain: Tensor, own: Tensor, softcap: float | None) -> float:
    """``own ≈ softcap(scale * plain)`` 的最小二乘解；``plain`` 全为 0 时是 1。"""
    if softcap is not None:
        kept = own.abs() < 0.9 * softcap  # 压平了的说不准原来多大
        own, plain = softcap * torch.atanh(own[kept] / softcap), plain[kept]
    size = float(plain.square().sum())
    return float((plain * own).sum()) / size if size else 1.0
