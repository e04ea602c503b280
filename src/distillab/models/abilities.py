"""一个模型的缓存与填充可不可信：用几个 token 试出来，不按名字列举。

线性注意力与循环的模型各有各的缓存，有的不看 ``attention_mask``，有的悄悄不用缓存。
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import reason
from .head_fit import relative_error, tolerance
from .kv_cache import autocast_dtype

PROMPT, NEW = 8, 4
"""试的时候 prompt 与其后各几个 token。"""


class Abilities(NamedTuple):
    """生成时可以倚靠什么。

    ``cached``：接着缓存算的与从头算的相同，丢掉几行之后也是；不然 ``why_uncached`` 是一行原因。
    ``pads_left``：左边的填充不影响真实的 token。
    """

    cached: bool
    pads_left: bool
    why_uncached: str = ""


@torch.no_grad()
def find_abilities(model: Any, new_cache: Callable[[], Any]) -> Abilities:
    """试出 ``model`` 的缓存（``new_cache()``）与左填充可不可信；它处于 eval，权重是完整的。"""
    ids, expected, allowed = _trial(model)
    why = _cache_error(model, new_cache, ids, expected, allowed)
    pads = _pads_left(model, new_cache if not why else None, ids, expected, allowed)
    return Abilities(not why, pads, why)


@torch.no_grad()
def static_error(model: Any, static_cache: Callable[[int], Any], pads_left: bool) -> str:
    """形状固定的缓存（``static_cache(room)``）不可信的原因；可信是空串。"""
    ids, expected, allowed = _trial(model)
    gone = PROMPT // 2
    mask = torch.ones_like(ids[:, :PROMPT])
    mask[0, :gone] = 0
    alone = model(ids[:1, gone:]) if pads_left else expected[:1]
    try:
        for seen, first in ((None, expected[:1]), (mask, alone))[: 1 + pads_left]:
            cache = static_cache(PROMPT + NEW + 1)  # 多一个空着的位置
            model(ids[:, :PROMPT], seen, cache)
            cache.places.begin(PROMPT, seen, ids.device)
            steps = []
            for t in range(PROMPT, PROMPT + NEW):
                steps.append(model(ids[:, t : t + 1], None, cache))
                cache.places.at.add_(1)
            found = torch.cat(steps, 1)
            wanted = torch.cat((first[:, -NEW:], expected[1:, -NEW:]))
            if any(_differs(f, w, allowed) for f, w in zip(found, wanted, strict=True)):
                return "what follows a static cache is not what follows the tokens themselves"
    except Exception as error:  # 见 _cache_error
        return reason(error)
    return ""


def _trial(model: Any) -> tuple[Tensor, Tensor, float]:
    """试的两行 token、从头算的隐状态与允许的相对误差。"""
    head = model.head
    size, device = head.weight.shape[0], head.weight.device
    # 两行互不相同，行与行之间串了也看得出来。
    ids = torch.arange(1, 2 * (PROMPT + NEW) + 1, device=device).view(2, -1) % size
    # 逐位相同不可求：半精度里换一种形状就换一种舍入，专家的取舍也可能翻转。
    # autocast 不能关掉：采样用的拷贝里，线性层可能已经是半精度的。
    return ids, model(ids), 4 * tolerance(autocast_dtype(device) or head.weight.dtype)


def unmasked_right(model: Any, ids: Tensor, hidden: Tensor) -> bool:
    """右边补齐的两行不给 mask，真实的 token 与给了的是否相同；``hidden`` 是 ``ids`` 不给 mask 的。

    专家有容量、频率随长度而变之类的，mask 可能另有用处；个别位置不同也算不同，只是慢些。
    """
    length = ids.shape[1]
    real = torch.arange(length, device=ids.device) < ids.new_tensor([[length - 2], [length // 2]])
    try:
        masked = model(ids, real.long())
    except Exception:  # 不认 mask 的，没有 mask 就是它本来的样子
        return True
    allowed = 4 * tolerance(model.head.weight.dtype)
    return bool((relative_error(hidden, masked, dim=-1)[real] <= allowed).all())


def _cache_error(
    model: Any, new_cache: Callable[[], Any], ids: Tensor, expected: Tensor, allowed: float
) -> str:
    """缓存不可信的原因；可信是空串。"""
    try:
        cache = new_cache()
        model(ids[:, :PROMPT], None, cache)
        whole = [model(ids[:, t : t + 1], None, cache) for t in range(PROMPT, PROMPT + NEW // 2)]
        cache.batch_select_indices(torch.tensor([1], device=ids.device))
        rest = [
            model(ids[1:, t : t + 1], None, cache) for t in range(PROMPT + NEW // 2, PROMPT + NEW)
        ]
    except Exception as error:  # 别人的缓存抛出什么没有定数，不用它就是
        return reason(error)
    places = expected[:, PROMPT:]
    if _differs(torch.cat(whole, 1), places[:, : NEW // 2], allowed):
        return "what follows a cache is not what follows the tokens themselves"
    if _differs(torch.cat(rest, 1), places[1:, NEW // 2 :], allowed):
        return "dropping rows changes the others"
    return ""


def _pads_left(
    model: Any, new_cache: Callable[[], Any] | None, ids: Tensor, expected: Tensor, allowed: float
) -> bool:
    """第一行去掉开头的几个 token 再补齐，与它单独算的是否相同。"""
    gone = PROMPT // 2
    mask = torch.ones_like(ids)
    mask[0, :gone] = 0
    alone = model(ids[:1, gone:])
    first, second = (ids.clone() for _ in range(2))
    first[0, :gone], second[0, :gone] = 0, 17 % model.head.weight.shape[0]
    try:
        padded, other = (model(rows, mask) for rows in (first, second))
        found = [padded[:1, gone:]]
        if new_cache is not None:
            cache = new_cache()
            model(first[:, :PROMPT], mask[:, :PROMPT], cache)
            steps = [
                model(first[:, t : t + 1], mask[:, : t + 1], cache)
                for t in range(PROMPT, PROMPT + NEW)
            ]
            found.append(torch.cat(steps, 1)[:1])
    except Exception:  # 见 _cache_error
        return False
    if any(_differs(part, alone[:, -part.shape[1] :], allowed) for part in found):
        return False
    # 换一种填充，同样的形状：看得见填充的，离它最近的 token 变得最多。
    changed = relative_error(padded[:1, gone:], other[:1, gone:], dim=-1)
    return bool((changed <= allowed).all()) and not _differs(padded[1:], expected[1:], allowed)


def _differs(found: Tensor, expected: Tensor, allowed: float) -> bool:
    """每个位置都不同才算：舍入与专家的翻转只在个别位置，缓存错了则处处都错。"""
    if found.shape != expected.shape:
        return True
    return not bool((relative_error(found, expected, dim=-1) <= allowed).any())
