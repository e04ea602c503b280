"""存盘的一对文件：``NAME-00000.bin`` 首尾相接地放记录，``NAME-00000.idx`` 每个键一条 ``ENTRY``。

记录落了盘才写指到它们的那一条；一条自己的 crc32 从 ``seed``（来历的 crc32）算起，别处拷来的对不上。
索引里坏的、指到数据之外的不算，好的仍然算；接着写之前，先截去被杀时没有写完的。
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from ..files import append, idle, open_to_append, sync
from .key_table import ENTRY, Entries, Place
from .records import Bytes

SHARD_FILE = re.compile(r"(?P<stem>\w+-\d{5})\.(bin|idx)", re.ASCII)
_WIDTH = ENTRY.itemsize


class Shard:
    """索引的前 ``entries`` 条看过了，它们指到第 ``end`` 条记录为止；``sound`` 是其中没有坏的。"""

    def __init__(self, stem: Path, record_bytes: int, seed: int) -> None:
        self.stem, self.record_bytes, self.seed = stem, record_bytes, seed
        self.data, self.index = (stem.with_name(stem.name + end) for end in (".bin", ".idx"))
        self.entries = self.end = 0
        self.sound = True
        self._mapped: Bytes = np.empty(0, np.uint8)
        self._files: list[IO[bytes]] = []

    @property
    def writer(self) -> str:
        """写者的名字。"""
        return self.stem.name.rpartition("-")[0]

    @property
    def number(self) -> int:
        """这个写者的第几个。"""
        return int(self.stem.name.rpartition("-")[2])

    def records(self, place: Place) -> Bytes | None:
        """``[count, record_bytes]``，uint8，文件的映射；文件短了、crc32 不对为 ``None``。"""
        start, end = (self.record_bytes * n for n in (place.start, place.start + place.length))
        if end > _size(self.data):  # 映射着的文件截短了，读下去是 SIGBUS
            return None
        if end > len(self._mapped):
            self._mapped = np.asarray(np.memmap(self.data, np.uint8, "r"))
        rows = self._mapped[start:end].reshape(-1, self.record_bytes)
        return rows if zlib.crc32(rows.data) == place.crc else None

    def read_index(self, own: bool) -> tuple[Entries, list[str]]:
        """索引里新写的、好的那些，与坏在哪里；不是 ``own`` 的，也许正写到一半，过一阵才说。"""
        raw = b""
        if self.index.exists():
            with self.index.open("rb") as file:
                file.seek(self.entries * _WIDTH)
                raw = file.read()
        size = _size(self.data)  # 在索引之后看：记录总是先写的
        entries = np.frombuffer(raw, ENTRY, len(raw) // _WIDTH)
        whole = entries["check"] == self._checks(entries)
        ends = entries["start"].astype(np.int64) + entries["length"]
        good = whole & (ends * self.record_bytes <= size)
        if good.any():
            self.entries += int(good.nonzero()[0][-1]) + 1
            self.end = max(self.end, int(ends[good].max()))
        self.sound = self.sound and bool(good.all())
        unnamed = size - self.end * self.record_bytes
        problems = {
            "{} entries of its index are damaged or another store's": (~whole).sum(),
            "{} entries of its index point beyond its data": (whole & ~good).sum(),
            "its index ends with {} bytes of an entry": len(raw) % _WIDTH,
            "{} bytes of its data are in no index": unnamed if own or not self.entries else 0,
        }
        found = [text.format(f"{count:,}") for text, count in problems.items() if count > 0]
        if found and not own and not idle(self.data if self.data.exists() else self.index):
            found = []
        return entries[good], found

    def append(self, keys: Sequence[bytes], rows: Sequence[Bytes]) -> Entries:
        """写到末尾，落盘才返回新的 ``ENTRY``；写不下去是 ``OSError``，写下的还是从前那些。"""
        entries = np.zeros(len(keys), ENTRY)
        entries["key"] = np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2)
        entries["length"] = [len(each) for each in rows]
        ends = self.end + entries["length"].cumsum(dtype=np.int64)
        entries["start"] = ends - entries["length"]
        entries["crc"] = [zlib.crc32(each.data) for each in rows]
        entries["check"] = self._checks(entries)
        for path in (self.data, self.index)[len(self._files) :]:
            self._files.append(open_to_append(path))
            sync(path.parent)
        lengths = self.end * self.record_bytes, self.entries * _WIDTH
        for file, length in zip(self._files, lengths, strict=True):
            if os.fstat(file.fileno()).st_size != length:  # 上次没有写完的
                os.ftruncate(file.fileno(), length)
        append(self._files[0], b"".join(each.data for each in rows))
        append(self._files[1], entries.tobytes())
        self.entries, self.end = self.entries + len(keys), int(ends[-1])
        return entries

    def close(self) -> None:
        """关上写的文件；读仍然可以。"""
        for file in self._files:
            file.close()
        self._files = []

    def _checks(self, entries: Entries) -> npt.NDArray[np.uint32]:
        """``[N]``：每一条除 ``check`` 以外的 crc32。"""
        raw = entries.tobytes()
        found = (zlib.crc32(raw[i : i + _WIDTH - 4], self.seed) for i in range(0, len(raw), _WIDTH))
        return np.fromiter(found, np.uint32, len(entries))


def _size(path: Path) -> int:
    """没有的文件是 0。"""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
