"""``metrics.jsonl``：一行一条记录，被杀也不坏，恢复后接得上。"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..files import append, open_to_append, replace_file
from ..run_file_shapes import metrics_row

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("distillab")


Mark = tuple[int, str]
"""文件到某一行为止的大小与 sha256。"""


class MetricsLog:
    """训练指标的记录；同样的数也送给 ``report_to`` 里的 tracker。只有主进程写文件，每写一行就以文件
    的路径调用 ``on_write``。
    """

    def __init__(
        self,
        path: Path,
        accelerator: Accelerator,
        on_write: Callable[[Path], object] | None = None,
    ) -> None:
        self.path = path
        self.accelerator = accelerator
        self._on_write = on_write
        self._file: IO[bytes] | None = None
        self._size, self._sha256 = 0, hashlib.sha256()

    def recover(self, step: int, mark: Mark | None) -> None:
        """回到第 ``step`` 步存盘时的样子：后面的行会重新产生，写到一半的也是。``mark`` 是那时的
        ``mark()``；没有记下就按各行的步数。
        """
        if not self.accelerator.is_main_process:
            return
        content = self.path.read_bytes() if self.path.exists() else b""
        kept = content[: mark[0]] if mark else b""
        if mark is None or (len(kept), hashlib.sha256(kept).hexdigest()) != mark:
            read = [(line, metrics_row(line)) for line in content.splitlines()]
            kept = b"".join(line + b"\n" for line, row in read if row and row["step"] <= step)
            lost = sum(row is None for _, row in read)
            lost -= bool(read) and read[-1][1] is None and not content.endswith(b"\n")
            if mark or lost:
                logger.warning(
                    "%s: not as it was when step %d was saved: %d of its lines cannot be read and "
                    "are dropped, the others kept as they are",
                    self.path,
                    step,
                    lost,
                )
        if kept != content:
            replace_file(self.path, kept)
        self._size, self._sha256 = len(kept), hashlib.sha256(kept)

    def mark(self) -> Mark:
        """文件现在的样子，随检查点存下；不是主进程的没有意义。"""
        return self._size, self._sha256.hexdigest()

    def __enter__(self) -> MetricsLog:
        if self.accelerator.is_main_process:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open_to_append(self.path)
        if self.accelerator.log_with:
            self.accelerator.init_trackers("distillab", init_kwargs={"wandb": {"resume": "allow"}})
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if self.accelerator.log_with:
            self.accelerator.end_training()

    def write(self, row: dict[str, Any]) -> None:
        """追加一行；``row`` 要有 ``kind`` 与 ``step``。非有限的数写成 null。"""
        if self._file is not None:
            infinite = {k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
            line = f"{json.dumps(row | dict.fromkeys(infinite))}\n".encode()
            append(self._file, line, sync=False)
            self._size += len(line)
            self._sha256.update(line)
            if self._on_write is not None:
                self._on_write(self.path)
        if self.accelerator.log_with:
            numbers = {
                f"{row['kind']}/{key}": value
                for key, value in row.items()
                if isinstance(value, (int, float)) and key != "step"
            }
            self.accelerator.log(numbers, step=row["step"])


def write_first(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """把 ``rows`` 放在文件的最前面；原来的一个字节也不动，坏了的留给恢复时去说。"""
    before = path.read_bytes() if path.exists() else b""
    replace_file(path, "".join(f"{json.dumps(row)}\n" for row in rows).encode() + before)
