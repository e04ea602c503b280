"""生成时各层已算过的键值，使每一步只需算新 token；就地写入，不能反向。

接上新 token 不复制旧的：每层预留余地，写进空着的位置；``torch.cat`` 每步把整个缓存抄一遍，批大、
句长时比模型本身还慢。
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..limits import cache_room


class LayerCache:
    """一层的键与值，各 ``[B, nkv, S, hd]``，空时为 ``None``；只存 nkv 个头，GQA 省的就是这里。

    ``keys`` 与 ``values`` 是已写入的部分，预留空间的一个视图。
    """

    def __init__(self) -> None:
        super().__init__()
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self._store: tuple[Tensor, Tensor] | None = None  # 各 (B, nkv, S + 余地, hd)

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """接上本次的键值（已旋转），返回全部，各 ``[B, nkv, S, hd]``。"""
        start = 0 if self.keys is None else self.keys.shape[-2]
        end = start + key.shape[-2]
        store = self._store
        if store is None or end > store[0].shape[-2]:
            store = self._store = _grown(self.keys, key, end), _grown(self.values, value, end)
        for room, new in zip(store, (key, value), strict=True):
            room[..., start:end, :] = new
        self.keys, self.values = (room[..., :end, :] for room in store)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """只留这些行。"""
        if self._store is None or self.keys is None:
            return
        length = self.keys.shape[-2]
        self._store = self._store[0][indices], self._store[1][indices]
        self.keys, self.values = (room[..., :length, :] for room in self._store)


def _grown(old: Tensor | None, new: Tensor, length: int) -> Tensor:
    """够 ``length`` 个 token 的空间，外加余地；旧的抄过来。

    autocast 里存它的类型：注意力反正要转成它，不必每步把整个缓存转一遍。
    """
    *outer, _, width = new.shape
    dtype = autocast_dtype(new.device)
    room = new.new_empty(*outer, cache_room(length), width, dtype=dtype or new.dtype)
    if old is not None:
        room[..., : old.shape[-2], :] = old
    return room


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """``device`` 上此刻 autocast 的类型；没有打开是 ``None``。"""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class KVCache:
    """``StudentModel`` 的缓存。"""

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerCache() for _ in range(num_layers)]

    @property
    def length(self) -> int:
        """已缓存的 token 数（含填充）。"""
        keys = self.layers[0].keys
        return 0 if keys is None else keys.shape[-2]

    def batch_select_indices(self, indices: Tensor) -> None:
        """只留这些行；名字与 ``transformers`` 的 ``Cache`` 相同。"""
        for layer in self.layers:
            layer.batch_select_indices(indices)


def dynamic_cache(config: Any) -> Any:
    """空的 ``transformers.DynamicCache``，其中完整注意力的层换成预留余地的。

    滑动窗口、线性注意力等层的状态本来就不随长度增长，原样保留。多一项 ``length``：已缓存的 token 数
    （含填充），由使用它的一方累加，只有线性注意力的模型没有别处可数。
    """
    from transformers.cache_utils import DynamicLayer

    growing_layer, selectable_cache = _cache_classes()
    result = selectable_cache(config=config)
    result.layers = [
        growing_layer() if type(layer) is DynamicLayer else layer for layer in result.layers
    ]
    return result


@cache
def _cache_classes() -> tuple[Any, Any]:
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class GrowingLayer(LayerCache, DynamicLayer):  # type: ignore[misc]
        def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            self.is_initialized = True  # transformers 凭它判断缓存空不空
            return super().update(key, value)

        def reorder_cache(self, beam_idx: Tensor) -> None:
            self.batch_select_indices(beam_idx)

    class SelectableCache(DynamicCache):  # type: ignore[misc]
        length = 0

        def batch_select_indices(self, indices: Tensor) -> None:
            # 线性注意力的层没有 batch_select_indices，兼有两种状态的层只挑其中一种；beam search 的
            # 重排每一种层都有，给它较少的行就是挑选。
            self.reorder_cache(indices)

    return GrowingLayer, SelectableCache
