"""``responses.jsonl``：教师的回答，一行一个；随时被杀都不坏、不丢、不重复。

旁边的 ``responses.jsonl.provenance.json`` 说这些回答是怎么来的；接着做时它必须对得上，
一个文件里才不会混进两种来历的回答。
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from ..credentials import without_secrets
from ..data.responses import Row, whole_rows
from ..errors import DistillabError
from ..files import append, leftovers, open_to_append, refuse_link, replace_file, sweep
from ..parsing import differing, parse_json

_RECORDED_ONLY = ("created", "versions", "recipe", "backend.base_url", "filter")
"""只作记录、不必对得上的键：同一个模型可以换台机器接着服务；``filter`` 变了会重新过滤。"""
_ROW_KEYS = {"id", "sample", "response", "kept"}


class ResponseFile:
    """打开着的回答文件；期间加锁，两个进程不会写进同一个文件。``with`` 打开，``resume`` 取得已有的
    行，然后一批一批 ``append``；``filter_changed``：已有的行是用另一种过滤留下的。
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sidecar = path.with_name(f"{path.name}.provenance.json")
        self.filter_changed = False
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        self._provenance: Mapping[str, Any] = {}
        self._file: IO[bytes] | None = None

    def __enter__(self) -> ResponseFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        refuse_link(self.path)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise DistillabError(f"{self.path} is in use by another process") from None
        for file in (self.path, self.sidecar):
            sweep(leftovers(file.parent, file.name))
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        self._lock.release()

    def resume(self, provenance: Mapping[str, Any]) -> list[Row]:
        """查对来历，丢掉写到一半的行，给出已有的（含没有留下的）；还没有任何行时写下来历，对不上是
        错误。
        """
        self._provenance = json.loads(json.dumps(provenance, default=str))
        rows, end, size = whole_rows(self.path, _ROW_KEYS) if self.path.exists() else ([], 0, 0)
        if size and not self.sidecar.exists():
            raise DistillabError(
                f"{self.path} exists without {self.sidecar.name}, so distillab synthesize did not "
                f"write it; name another file with synthesize.output"
            )
        if rows:
            before = self._read_sidecar()
            self._check_same(before)
            self.filter_changed = before.get("filter") != self._provenance.get("filter")
        else:
            self._write_sidecar(self._provenance)
        if size > end:
            os.truncate(self.path, end)
        return rows

    def recorded(self, section: str, key: str) -> Any:
        """已有的来历里的一项；没有则为 ``None``。"""
        if not self.sidecar.exists():
            return None
        found = self._read_sidecar()
        inner = found.get(section) if isinstance(found, dict) else None
        return inner.get(key) if isinstance(inner, dict) else None

    def append(self, rows: Iterable[Row]) -> None:
        """追加一批，并确保它们已经落盘；写不下去是 ``OSError``，已写下的整行都还在。"""
        data = b"".join(_line(row) for row in rows)
        if not data:
            return
        if self._file is None:
            self._file = open_to_append(self.path)
        append(self._file, data)

    def rewrite(self, rows: Iterable[Row]) -> None:
        """换掉已有的全部行（重新过滤之后），来历随之更新；要在 ``append`` 之前。"""
        # 先在来历里记下「正在换」：换到一半被杀，下次对不上任何过滤，会再过滤一遍。
        unfinished = {**self._read_sidecar(), "filter": "being changed"}
        self._write_sidecar(unfinished)
        replace_file(self.path, b"".join(_line(row) for row in rows))
        self._write_sidecar({**unfinished, "filter": self._provenance.get("filter")})
        self.filter_changed = False

    def _read_sidecar(self) -> dict[str, Any]:
        content: dict[str, Any] = parse_json(self.sidecar.read_bytes(), str(self.sidecar))
        # 从前的来历里也许有密钥：既不写进报错，也不再写回去。
        cleaned: dict[str, Any] = without_secrets(content)
        return cleaned

    def _write_sidecar(self, content: Mapping[str, Any]) -> None:
        replace_file(self.sidecar, json.dumps(content, indent=1, ensure_ascii=False))

    def _check_same(self, before: Mapping[str, Any]) -> None:
        changed = [
            f"{key} (was {_short(old)}, is now {_short(new)})"
            for key, (old, new) in sorted(differing([before, self._provenance]))
            if not any(key == free or key.startswith(f"{free}.") for free in _RECORDED_ONLY)
        ]
        if changed:
            raise DistillabError(
                f"{self.path} was begun with other settings: {', '.join(changed)}; "
                f"restore them, or name another file with synthesize.output"
            )


def _line(row: Row) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # 落单的 surrogate：UTF-8 写不出，JSON 的转义写得出
        return json.dumps(row).encode() + b"\n"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
