"""形状固定的 KV cache：解码的每一步都是同样的张量、同样的地址，CUDA graph 才录得下来。

写到了哪里记在设备上，主机不必知道。不用 ``transformers.StaticCache``：它读 prompt 时就在全部 S 个
位置上做注意力，每层又各数一遍位置。
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kv_cache import KVCache, LayerCache, autocast_dtype, dynamic_cache


class Places:
    """``room`` 个位置里哪些有 token，下一个写在哪里；各层共用。

    prompt 读完、``begin`` 之后才有 ``at``，从此每次只来一个 token。
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.at: Tensor | None = None  # (1,)，int64
        self.dtype = torch.float32  # 键值的
        self._slots: Tensor | None = None  # (S,)
        self._real: Tensor | None = None  # (B, S)，填充为假；没有填充是 None
        self._padding: Tensor | None = None  # (B, 1)，各行的填充数

    @property
    def started(self) -> bool:
        """Prompt 已经读完。"""
        return self.at is not None

    def begin(self, width: int, attention_mask: Tensor | None, device: torch.device) -> None:
        """Prompt ``[B, width]`` 已经写进各层；``attention_mask`` 与它同形状，左填充。"""
        self.at = torch.full((1,), width, device=device)
        self._slots = torch.arange(self.room, device=device)
        if attention_mask is not None:
            real = attention_mask.bool()
            self._real = F.pad(real, (0, self.room - width), value=True)
            self._padding = (~real).sum(-1, keepdim=True)

    def step(self) -> tuple[Tensor, Tensor]:
        """这个 token 的位置 ``[B 或 1, 1]``，与加在注意力分数上的 mask ``[B 或 1, 1, 1, S]``。

        看不见的是 ``-inf``。不给 bool：SDPA 要在每一层各转成浮点一遍。
        """
        assert self.at is not None
        assert self._slots is not None
        visible, positions = self._slots <= self.at, self.at[None]
        if self._real is not None and self._padding is not None:
            visible, positions = visible & self._real, positions - self._padding
        else:
            visible = visible[None]
        mask = visible.new_full(visible.shape, -torch.inf, dtype=self.dtype)
        return positions, mask.masked_fill_(visible, 0.0)[:, None, None]

    def recent(self, mask: Tensor, window: int) -> Tensor:
        """``step`` 的 mask 里只留最近 ``window`` 个的；填充都在左边，数位置就是数 token。"""
        assert self.at is not None
        assert self._slots is not None
        return mask.masked_fill(self._slots <= self.at - window, -torch.inf)

    def batch_select_indices(self, indices: Tensor) -> None:
        """只留这些行。"""
        if self._real is not None and self._padding is not None:
            self._real, self._padding = self._real[indices], self._padding[indices]


class FixedLayer(LayerCache):
    """一层的键与值，各 ``[B, nkv, S, hd]``，写在 ``places.at``。"""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self._places = places

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """写入本次的键值；读 prompt 时返回它们自己，其后返回全部 S 个位置。"""
        at = self._places.at
        if at is None or self.keys is None or self.values is None:
            self.keys, self.values = (_placed(new, self._places.room) for new in (key, value))
            self._places.dtype = self.keys.dtype
            return key, value
        self.keys.index_copy_(2, at, key.to(self.keys.dtype))
        self.values.index_copy_(2, at, value.to(self.values.dtype))
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """只留这些行。"""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[indices], self.values[indices]


def _placed(new: Tensor, room: int) -> Tensor:
    """``new`` 与其后的零：还没有 token 的位置权重为 0，乘上 NaN 却还是 NaN。"""
    *outer, length, width = new.shape
    dtype = autocast_dtype(new.device) or new.dtype
    result = new.new_zeros(*outer, room, width, dtype=dtype)
    result[..., :length, :] = new
    return result


class StaticKVCache(KVCache):
    """``StudentModel`` 与同样结构的教师用的。"""

    length = 0
    """读 prompt 时还是空的；其后的位置问 ``places``。"""

    def __init__(self, num_layers: int, room: int) -> None:
        self.places = Places(room)
        self.layers = [FixedLayer(self.places) for _ in range(num_layers)]

    def batch_select_indices(self, indices: Tensor) -> None:
        """只留这些行。"""
        super().batch_select_indices(indices)
        self.places.batch_select_indices(indices)


def places_of(cache: Any) -> Places | None:
    """``cache`` 是形状固定的、prompt 也读完了，才有。"""
    places: Places | None = getattr(cache, "places", None)
    return places if places is not None and places.started else None


def static_cache(config: Any, room: int) -> Any:
    """Transformers 的模型用的；``ValueError``：有的层不是完整注意力，它们的状态各有各的形状。"""
    layer_class, cache_class = _cache_classes()
    found = dynamic_cache(config)
    if not found.layers or not all(isinstance(layer, LayerCache) for layer in found.layers):
        raise ValueError("not all of its layers are full attention")
    result = cache_class(config=config)
    result.places = Places(room)
    result.layers = [layer_class(result.places) for _ in found.layers]
    return result


@cache
def _cache_classes() -> tuple[Any, Any]:
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class FixedDynamicLayer(FixedLayer, DynamicLayer):  # type: ignore[misc]
        def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            self.is_initialized = True
            return super().update(key, value)

    class FixedCache(DynamicCache):  # type: ignore[misc]
        length = 0  # 读 prompt 时累加的一方要有它

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self.places.batch_select_indices(indices)

    return FixedDynamicLayer, FixedCache
