"""``Vocabulary``：哪些 token id 有概率、可以训练；其余的是填充行，或两边定义不同的。"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import DistillabError


@dataclass(frozen=True)
class Vocabulary:
    """id ``0..limit-1``，除去 ``missing``（递增）；head 只算 ``limit`` 这么宽，它小于 1 是错误。

    分词器的 id 不一定连续：后加的 token 常常排在留空的一段之后。从第一个空洞处截断，会把它们（多半
    是 ``<|im_end|>`` 一类）全丢掉，所以空洞要逐个记下。没有空洞时一切与只有 ``limit`` 时逐位相同。
    """

    limit: int
    missing: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise DistillabError(f"vocabulary limit is {self.limit}, expected at least 1")

    @classmethod
    def of(cls, ids: Iterable[int]) -> Vocabulary:
        """恰好含有 ``ids`` 的词表；不能为空。"""
        present = set(ids)
        limit = max(present, default=-1) + 1
        if len(present) == limit:
            return cls(limit)
        return cls(limit, tuple(index for index in range(limit) if index not in present))

    def __len__(self) -> int:
        """有几个 id。"""
        return self.limit - len(self.missing)

    def __contains__(self, token: int) -> bool:
        """``token`` 是否在其中。"""
        return 0 <= token < self.limit and token not in self._missing

    def kept(self, tokens: Sequence[int]) -> list[bool]:
        """逐个：是否在其中。"""
        if not self.missing:
            return [token < self.limit for token in tokens]
        return [token in self for token in tokens]

    def mask(self, ids: Tensor) -> Tensor:
        """``ids`` 的每一个是否在其中；同样形状的 bool。"""
        inside = ids < self.limit
        excluded = self.excluded(ids.device)
        return inside if excluded is None else inside & ~torch.isin(ids, excluded)

    def excluded(self, device: torch.device) -> Tensor | None:
        """``missing`` 作为 ``device`` 上的 int64 张量；没有则为 ``None``，一切照旧。"""
        return _tensor(self.missing, device) if self.missing else None

    def within(self, rows: int) -> Vocabulary:
        """只留前 ``rows`` 个 id：head 可以比分词器小。"""
        if self.limit <= rows:
            return self
        return Vocabulary(rows, tuple(index for index in self.missing if index < rows))

    def covers(self, other: Vocabulary) -> bool:
        """``other`` 的每个 id 是否都在其中。"""
        return other.limit <= self.limit and not any(index in other for index in self.missing)

    @functools.cached_property
    def _missing(self) -> frozenset[int]:
        return frozenset(self.missing)


@dataclass(frozen=True)
class SharedTokens:
    """两个分词器里同样文字的 token：``student[i]`` 与 ``teacher[i]`` 是同一个，id 不必相同。

    ``weight`` 是它们占教师词表的份额。``first[v]`` 是教师的 token v 的文字由学生来切时的第一个
    token，-1 为没有；不投影时是空的。
    """

    student: tuple[int, ...]
    teacher: tuple[int, ...]
    weight: float
    first: tuple[int, ...] = ()

    def ids(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``device`` 上的 ``(学生的, 教师的)``，都是 ``[M]``，int64。"""
        return _tensor(self.student, device), _tensor(self.teacher, device)

    def first_ids(self, device: torch.device) -> Tensor:
        """``device`` 上的 ``first``，``[V_t]``，int64。"""
        return _tensor(self.first, device)


@functools.lru_cache(maxsize=16)
def _tensor(missing: tuple[int, ...], device: torch.device) -> Tensor:
    """每一步都要用到，设备上只放一份。"""
    return torch.tensor(missing, device=device)
