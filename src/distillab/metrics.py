"""``metrics.jsonl``：一行一条记录，被杀也不坏，恢复后接得上。"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .errors import DistillabError
from .files import append, open_to_append, replace_file
from .parsing import parse_json

if TYPE_CHECKING:
    from accelerate import Accelerator


class MetricsLog:
    """训练指标的记录；同样的数也送给 ``report_to`` 里的 tracker。只有主进程写文件。

    Args:
        path: ``metrics.jsonl``。
        accelerator: 引擎。
        on_write: 每写一行就以文件的路径调用，只在主进程。
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

    def discard_after(self, step: int) -> None:
        """删去 ``step`` 之后的行（它们会重新产生）和写到一半的行。"""
        if self.accelerator.is_main_process and self.path.exists():
            kept = [row for row in read_metrics(self.path) if row["step"] <= step]
            replace_file(self.path, "".join(f"{json.dumps(row)}\n" for row in kept))

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
            finite = {key: None if _not_finite(value) else value for key, value in row.items()}
            append(self._file, f"{json.dumps(finite)}\n".encode(), sync=False)
            if self._on_write is not None:
                self._on_write(self.path)
        if self.accelerator.log_with:
            prefix = row["kind"]
            numbers = {
                f"{prefix}/{key}": value
                for key, value in row.items()
                if isinstance(value, (int, float)) and key != "step"
            }
            self.accelerator.log(numbers, step=row["step"])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """读回 ``metrics.jsonl``；没有文件则为空，写到一半的最后一行被忽略。"""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(DistillabError):
                rows.append(parse_json(line, str(path)))
    return rows


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
