"""教师目标的存盘：16 字节的键，值是几条定长的记录；几个进程各写各的，随时被杀也不留下读错的。

目录里有 ``header.json``（格式与来历）与每个写者自己的几对文件，见 ``shards``。键由内容而来，同一个
键的几份相同。
"""

from __future__ import annotations

import json
import logging
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from ..errors import DistillabError, reason, some
from ..files import leftovers, replace_file, sweep
from ..parsing import differing, parse_json
from .key_table import KEY_BYTES, KeyTable
from .records import Bytes
from .shards import SHARD_FILE, Shard

logger = logging.getLogger("distillab")

HEADER, FORMAT = "header.json", 1
SHARD_BYTES = 1 << 30
"""一个 ``.bin`` 大约至多这么多字节。"""
WAITING_BYTES = 8 << 20
"""攒到这么多字节自己 ``flush``。"""


class TargetStore:
    """打开或新建一个目录；``with`` 结束时 ``flush`` 并放开锁。不是线程安全的。

    Args:
        directory: 目录；``writer`` 在时没有就新建。
        fields: 来历，键到 JSON 的标量，例如教师、tokenizer、保留的规则；已有的要与它相同。
        record_bytes: 一条记录几个字节，见 ``Layout.size``。
        writer: 写者的名字（``rank0``；字母、数字、``_``），同时只有一个进程能用；``None`` 为只读。

    Raises:
        DistillabError: 不是这样的目录、来历不同、格式较新、名字正被使用，或写不下去。
    """

    def __init__(
        self,
        directory: Path,
        fields: Mapping[str, Any],
        record_bytes: int,
        writer: str | None = None,
    ) -> None:
        if writer is not None and not re.fullmatch(r"\w+", writer, re.ASCII):
            raise ValueError(f"writer={writer!r}, expected letters, digits and _")
        self.directory, self.record_bytes, self.writer = directory, record_bytes, writer
        self._fields = dict(fields)
        header = {"format": FORMAT, **fields, "record_bytes": record_bytes}
        header = json.loads(json.dumps(header))
        self._seed = zlib.crc32(json.dumps(header, sort_keys=True).encode())
        self._shards: list[Shard] = []
        self._own: int | None = None
        self._table = KeyTable()
        self._waiting: dict[bytes, Bytes] = {}
        self._waiting_bytes = 0
        self._told: set[str] = set()
        self._lock = None if writer is None else FileLock(directory / f".{writer}.lock")
        if writer is not None:
            self._create(header)
        self._check_header(header)
        if self._lock is not None:
            self._take(self._lock)
        self.refresh()
        own = [number for number, shard in enumerate(self._shards) if shard.writer == writer]
        self._own = max(own, key=lambda number: self._shards[number].number, default=None)

    def __reduce__(self) -> tuple[Any, ...]:
        """到了别的进程（DataLoader 的 worker）就是只读的，另开一次。"""
        return type(self), (self.directory, self._fields, self.record_bytes)

    def __enter__(self) -> TargetStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None or issubclass(kind, KeyboardInterrupt):
                self.flush()
        finally:
            self.close()

    def close(self) -> None:
        """放开文件与锁；还没有 ``flush`` 的不要了。"""
        for shard in self._shards:
            shard.close()
        self._waiting.clear()
        if self._lock is not None:
            self._lock.release()

    def get(self, key: bytes) -> Bytes | None:
        """``[count, record_bytes]``，uint8，只读，多半是文件的映射；没有则为 ``None``。

        每次都核对 crc32；对不上的从此当作没有，日志里说一行。
        """
        if key in self._waiting:
            return self._waiting[key]
        while (place := self._table.find(key)) is not None:
            shard = self._shards[place.shard]
            if (rows := shard.records(place)) is not None:
                return rows
            self._table.drop(key)
            self._tell(f"{shard.data}: records are not as they were written")
        return None

    def __contains__(self, key: bytes) -> bool:
        return key in self._waiting or self._table.find(key) is not None

    def __len__(self) -> int:
        """几个键；还没有 ``flush`` 的也算。"""
        return len(self._table.distinct()) + len(self._waiting)

    @property
    def tokens(self) -> int:
        """几条记录；还没有 ``flush`` 的也算。"""
        waiting = sum(len(rows) for rows in self._waiting.values())
        return int(self._table.distinct()["length"].sum(dtype=np.int64)) + waiting

    @property
    def total_bytes(self) -> int:
        """各个 shard 一共多少字节；还没有 ``flush`` 的不算。"""
        files = (path for shard in self._shards for path in (shard.data, shard.index))
        return sum(path.stat().st_size for path in files if path.exists())

    def refresh(self) -> None:
        """看看别的进程又写了什么。"""
        known = {shard.stem.name for shard in self._shards}
        for name in sorted(path.name for path in self.directory.iterdir()):
            if match := SHARD_FILE.fullmatch(name):
                if match["stem"] not in known:
                    known.add(match["stem"])
                    self._add_shard(match["stem"])
            elif name != HEADER and not name.startswith("."):
                self._tell(f"{self.directory / name}: not part of teacher targets", "left alone")
        for number, shard in enumerate(self._shards):
            entries, problems = shard.read_index(shard.writer == self.writer)
            self._table.learn(number, entries)
            if problems:
                self._tell(f"{shard.stem}: {'; '.join(problems)}")
        for key in [key for key in self._waiting if self._table.find(key) is not None]:
            del self._waiting[key]

    def add(self, key: bytes, rows: Bytes) -> None:
        """放进 ``rows [count, record_bytes]``，uint8，会复制；``key`` 是 16 字节，已有的不再写。"""
        if self.writer is None:
            raise ValueError(f"{self.directory} was opened for reading: give a writer")
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key of {len(key)} bytes, expected {KEY_BYTES}")
        if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != self.record_bytes:
            raise ValueError(
                f"rows {rows.dtype} {list(rows.shape)}, expected uint8 [count, {self.record_bytes}]"
            )
        if key in self:
            return
        rows = rows.copy("C")
        rows.flags.writeable = False
        self._waiting[key] = rows
        self._waiting_bytes += rows.nbytes
        if self._waiting_bytes >= WAITING_BYTES:
            self.flush()

    def flush(self) -> None:
        """让放进来的都落盘；写不下去是 ``DistillabError``，写下的都是完整的，其余的还可以再试。"""
        while self._waiting:
            # 坏了的不接着写：要截去的也许不是我们的
            if self._own is None or not self._shards[self._own].sound:
                self._begin()
            assert self._own is not None
            shard = self._shards[self._own]
            size, keys = shard.end * self.record_bytes, []
            for key, rows in self._waiting.items():
                if size and size + rows.nbytes > SHARD_BYTES:
                    break
                keys.append(key)
                size += rows.nbytes
            if not keys:
                self._begin()
                continue
            with self._writing():
                entries = shard.append(keys, [self._waiting[key] for key in keys])
            self._table.learn(self._own, entries)
            for key in keys:
                del self._waiting[key]
        self._waiting_bytes = 0

    def _begin(self) -> None:
        """接下来写下一个 shard；文件在写的时候才建。"""
        number = 0
        if self._own is not None:
            self._shards[self._own].close()
            number = self._shards[self._own].number + 1
        self._own = len(self._shards)
        self._add_shard(f"{self.writer}-{number:05d}")

    def _add_shard(self, stem: str) -> None:
        self._shards.append(Shard(self.directory / stem, self.record_bytes, self._seed))

    def _create(self, header: Mapping[str, Any]) -> None:
        path = self.directory / HEADER
        with self._writing():
            self.directory.mkdir(parents=True, exist_ok=True)
            with FileLock(self.directory / ".header.lock"):
                sweep(leftovers(self.directory, HEADER))
                if path.exists():
                    return
                others = [p.name for p in self.directory.iterdir() if not p.name.startswith(".")]
                if others:
                    raise DistillabError(
                        f"{self.directory}: found {some(sorted(others))} but no {HEADER}, expected "
                        f"teacher targets, or a new or empty directory"
                    )
                replace_file(path, json.dumps(header, indent=1, ensure_ascii=False))

    def _check_header(self, header: Mapping[str, Any]) -> None:
        path = self.directory / HEADER
        if not path.exists():
            raise DistillabError(f"{self.directory}: no teacher targets here: {HEADER} is missing")
        try:
            before = parse_json(path.read_bytes(), str(path))
            written = before["format"]
        except (DistillabError, OSError, LookupError, TypeError):
            written = None
        if type(written) is not int:
            raise DistillabError(
                f"{path}: not the header of teacher targets: restore it, or move {self.directory} "
                f"away and they are computed again"
            )
        if written > FORMAT:
            raise DistillabError(
                f"{path}: format {written} is newer than {FORMAT}, the newest known here: upgrade "
                f"distillab, or move {self.directory} away and they are computed again"
            )
        for key, (now, found) in differing([header, before]):
            raise DistillabError(
                f"{path}: {key} was {found!r} and is now {now!r}, so these are other teacher "
                f"targets: name another directory, or move this one away"
            )

    def _take(self, lock: FileLock) -> None:
        try:
            with self._writing():
                lock.acquire(blocking=False)
        except Timeout:
            raise DistillabError(
                f"{self.directory}: another process is writing as {self.writer}: wait for it to "
                f"end, or stop it"
            ) from None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Timeout:  # 也是 OSError
            raise
        except OSError as error:
            raise DistillabError(
                f"{self.directory}: cannot write teacher targets: "
                f"{error.strerror or reason(error)}; those written before are whole"
            ) from error

    def _tell(self, problem: str, then: str = "left out, and computed again") -> None:
        if problem not in self._told:
            self._told.add(problem)
            logger.warning("%s: %s", problem, then)
