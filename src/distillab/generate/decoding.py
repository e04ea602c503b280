"""一批提示逐个 token 地解码：还在算的行、怎样算下一步、算到了哪里。

两种缓存，结果相同：``Decoding`` 的随长度增长；``StaticDecoding`` 的形状固定，一步里的一切都在设备
上，可以录成 CUDA graph 重放。
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..limits import fixed_room
from ..models.interface import LanguageModel
from ..models.static_cache import Places
from .cuda_graph import record, recordable

CHECK_EVERY = 16
"""CUDA 上每这么多步才问一次谁停下了：每问一次，主机要等设备把排着的都做完。"""

DROP_AT = 0.25
"""停下的行占到这么多，就不再算它们；每丢一次要把余下的 KV cache 抄一遍。"""

DROP_RECORDED_AT = 0.5
"""录好的步子要重录，所以停下的占到一半、又至少还有 ``RERECORD_STEPS`` 步才丢。"""

RERECORD_STEPS = 64
"""录一次约等于逐个算子地算两三步；行数减半，小模型的一步只快几成。"""

RECORD_STEPS = 8
"""余下的步数不比它多，就不录了。"""


@dataclass(eq=False)
class Decoding:
    """接着缓存一步一步地算；没有可信的缓存就每步从头算起。

    Attributes:
        model: 处于 eval，采样用的权重已经换好。
        logits: 末位的隐状态 ``[b, H]`` → ``[b, V]``，float32。
        choose: ``(logits, uniform=[b] 或 None)`` → 下一个 token ``[b]``。
        input_ids: ``[B, T]``，int64，左填充。
        mask: ``[B, T]``，没有填充是 ``None``。
        uniform: ``[b, N]``，float64；贪心是 ``None``。
        stops: 停止 token，int64。
        pad_id: 停下的行填它。
        limit: 至多几步。
        rows: 还在算的行 ``[b]``。
        finished: 它们停下了没有 ``[b]``。
        chosen: 它们最近的 token ``[b]``。
        new_ids: 全部行的结果 ``[B, limit]``。
        done: 算过几步。
    """

    model: LanguageModel
    logits: Callable[[Tensor], Tensor]
    choose: Callable[..., Tensor]
    input_ids: Tensor
    mask: Tensor | None
    uniform: Tensor | None
    stops: Tensor
    pad_id: int
    limit: int
    rows: Tensor = field(init=False)
    finished: Tensor = field(init=False)
    chosen: Tensor = field(init=False)
    new_ids: Tensor = field(init=False)
    done: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        batch, self._width = self.input_ids.shape
        device = self.input_ids.device
        self.rows = torch.arange(batch, device=device)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self.new_ids = self.input_ids.new_full((batch, self.limit), self.pad_id)
        self._prepare()

    def _prepare(self) -> None:
        self._cache = self.model.new_cache()
        self._step_ids = self.input_ids
        if self.mask is not None:
            self.mask = F.pad(self.mask, (0, self.limit), value=1)

    def advance(self) -> None:
        """再算一步。"""
        seen = None if self.mask is None else self.mask[:, : self._width + self.done]
        hidden = self.model(self._step_ids, seen, self._cache)
        self.chosen = self._choose(hidden, self.done)
        new = self.chosen[:, None]
        self._step_ids = new if self._cache is not None else torch.cat((self._step_ids, new), 1)
        self.done += 1

    def _choose(self, hidden: Tensor, step: int | Tensor) -> Tensor:
        """由 ``hidden [b, T, H]`` 选出第 ``step`` 步的 token ``[b]``，记下它与停下的行。"""
        drawn = None if self.uniform is None else self.uniform[:, step].flatten()
        chosen = self.choose(self.logits(hidden[:, -1]), uniform=drawn)
        chosen = chosen.masked_fill(self.finished, self.pad_id)
        self.new_ids[self.rows, step] = chosen
        # 不用 torch.isin：CUDA 上它可能去排序，要等设备。
        self.finished.logical_or_((chosen[:, None] == self.stops).any(-1))
        return chosen

    def drop_finished(self) -> bool:
        """问一次谁停下了，占得多就不再算它们；还有行要算是真。"""
        ended, rows = int(self.finished.sum()), len(self.rows)
        if ended < rows and self._worth_dropping(ended, rows):
            self._keep((~self.finished).nonzero()[:, 0])
        return ended < rows

    def _worth_dropping(self, ended: int, rows: int) -> bool:
        return ended >= DROP_AT * rows

    def _keep(self, kept: Tensor) -> None:
        self.rows, self.chosen, self.finished = (
            part[kept] for part in (self.rows, self.chosen, self.finished)
        )
        self.uniform = None if self.uniform is None else self.uniform[kept]
        self._keep_inputs(kept)

    def _keep_inputs(self, kept: Tensor) -> None:
        self._step_ids = self._step_ids[kept]
        self.mask = None if self.mask is None else self.mask[kept]
        if self._cache is not None:
            self._cache.batch_select_indices(kept)

    def result(self) -> Tensor:
        """``new_ids`` 到最长的一行为止；不是每步都问停下了没有的，会多算几步。"""
        new_ids = self.new_ids[:, : self.done]
        ended = (new_ids[..., None] == self.stops).any(-1)  # (B, N)
        lengths = torch.where(ended.any(-1), ended.int().argmax(-1) + 1, self.done)
        return new_ids[:, : int(lengths.max())]


@dataclass(eq=False)
class StaticDecoding(Decoding):
    """缓存形状固定；CUDA 上先逐个算子地算一步，再录下一步，此后只是重放。

    位置、随机数取到第几个、写在哪一列都记在设备上，所以重放不需要主机给它任何东西。
    """

    cache: Any = None

    def _prepare(self) -> None:
        self._places: Places = self.cache.places
        self._step = torch.ones(1, dtype=torch.long, device=self.input_ids.device)
        self._records = recordable(self.model)
        self._replay: Callable[[], None] | None = None

    def advance(self) -> None:
        """再算一步。"""
        if self.done == 0:
            hidden = self.model(self.input_ids, self.mask, self.cache)
            self._places.begin(self._width, self.mask, self.input_ids.device)
            self.chosen = self._choose(hidden, 0)
        elif self._replay is not None:
            self._replay()
        elif self._records and self.limit - self.done > RECORD_STEPS:
            self._replay = record(self.model, self._one_step)
            self._records = self._replay is not None
        else:
            self._one_step()
        self.done += 1

    def _one_step(self) -> None:
        assert self._places.at is not None
        hidden = self.model(self.chosen[:, None], None, self.cache)
        self.chosen.copy_(self._choose(hidden, self._step))
        self._step.add_(1)
        self._places.at.add_(1)

    def _worth_dropping(self, ended: int, rows: int) -> bool:
        if self._replay is None:
            return super()._worth_dropping(ended, rows)
        return ended >= DROP_RECORDED_AT * rows and self.limit - self.done >= RERECORD_STEPS

    def _keep_inputs(self, kept: Tensor) -> None:
        self._replay = None  # 它读写的是原来的张量
        self.cache.batch_select_indices(kept)


def decoding(*, static: bool, **parts: Any) -> Decoding:
    """``static`` 且模型有形状固定的缓存就用它，否则用增长的。"""
    model, (_, width) = parts["model"], parts["input_ids"].shape
    cache = model.static_cache(fixed_room(width + parts["limit"])) if static else None
    return Decoding(**parts) if cache is None else StaticDecoding(**parts, cache=cache)
