"""内存里的索引：键在哪个 shard 的哪几条记录；几百万个键也放得下。"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

KEY_BYTES = 16
RECENT = 1 << 16
"""至多这么多个键在 dict 里，其余的在排好序的数组里，一个 40 字节。"""
_DROPPED = 0xFFFFFFFF

Entries = npt.NDArray[np.void]
ENTRY = np.dtype(
    [("key", "<u8", 2), ("start", "<u4"), ("length", "<u4"), ("crc", "<u4"), ("check", "<u4")]
)
"""索引文件里的一条：从第 ``start`` 条记录起有 ``length`` 条，它们的 crc32，这一条自己的 crc32。"""


class Place(NamedTuple):
    """几条记录在哪里；``crc`` 是它们的 crc32。"""

    shard: int
    start: int
    length: int
    crc: int


PLACED = np.dtype([("key", "<u8", 2), *((name, "<u4") for name in Place._fields)])
"""内存里的一条。"""


class KeyTable:
    """键到 ``Place``；一个键可以在几处（几个进程都写了），先给后写的。"""

    def __init__(self) -> None:
        self._recent: dict[bytes, Place] = {}
        self._sorted: Entries = np.empty(0, PLACED)
        self._first: npt.NDArray[np.uint64] = np.empty(0, np.uint64)

    def find(self, key: bytes) -> Place | None:
        """``key`` 在哪里；没有则为 ``None``。"""
        if (place := self._recent.get(key)) is not None:
            return place
        for row in self._rows(key):
            return Place(*self._sorted[row].tolist()[1:])
        return None

    def drop(self, key: bytes) -> None:
        """忘掉 ``find`` 找到的那一处；还有别处的，下次是那一处。"""
        if self._recent.pop(key, None) is None:
            self._sorted["shard"][next(self._rows(key))] = _DROPPED

    def learn(self, shard: int, entries: Entries) -> None:
        """记下第 ``shard`` 个 shard 的 ``entries``，``ENTRY``。"""
        placed = np.empty(len(entries), PLACED)
        for name in ("key", "start", "length", "crc"):
            placed[name] = entries[name]
        placed["shard"] = shard
        if len(self._recent) + len(entries) > RECENT:
            self._sort(placed)
            return
        keys = placed["key"].tobytes()
        for number, (_, *place) in enumerate(placed.tolist()):
            self._recent[keys[KEY_BYTES * number :][:KEY_BYTES]] = Place(*place)

    def distinct(self) -> Entries:
        """每个键一条，``PLACED``。"""
        if self._recent:
            self._sort(np.empty(0, PLACED))
        kept: Entries = self._sorted[self._sorted["shard"] != _DROPPED]
        new = np.ones(len(kept), bool)
        new[1:] = (kept["key"][1:] != kept["key"][:-1]).any(1)
        found: Entries = kept[new]
        return found

    def _rows(self, key: bytes) -> Iterator[int]:
        """``key`` 在排好序的数组里的哪几行，后写的在前。"""
        first, second = np.frombuffer(key, "<u8")
        row = int(np.searchsorted(self._first, first, "right")) - 1
        while row >= 0 and self._first[row] == first:
            placed = self._sorted[row]
            if placed["key"][1] == second and placed["shard"] != _DROPPED:
                yield row
            row -= 1

    def _sort(self, placed: Entries) -> None:
        """连同 ``_recent`` 里的，都并进排好序的数组；后写的在后。"""
        recent = np.empty(len(self._recent), PLACED)
        recent["key"] = np.frombuffer(b"".join(self._recent), "<u8").reshape(-1, 2)
        for name in Place._fields:
            recent[name] = [getattr(place, name) for place in self._recent.values()]
        kept = self._sorted[self._sorted["shard"] != _DROPPED]
        together = np.concatenate([kept, recent, placed])
        self._sorted = together[np.lexsort((together["key"][:, 1], together["key"][:, 0]))]
        self._first = self._sorted["key"][:, 0].copy()
        self._recent.clear()
