"""``gpu.py`` 交给每一段的东西，与各段记下的东西。"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from gpu_processes import Fork, reason
from measuring import Record

Status = Literal["ok", "failed", "skipped"]

NEEDS = (
    "accelerate", "filelock", "numpy", "psutil", "pydantic", "rich", "safetensors", "torch",
    "transformers", "yaml",
)  # fmt: skip
"""训练一步要的别人的库。"""

NEEDS_OF: dict[str, tuple[str, ...]] = {
    "machine": ("torch",),
    "recipes": (*NEEDS, "datasets", "gguf", "jinja2", "matplotlib", "plotly"),
}
"""各段要的；没有写的是 ``NEEDS``。"""

MISSING = "ModuleNotFoundError: No module named "


@dataclass(frozen=True)
class Work:
    """一段的环境。

    Attributes:
        device: ``cpu`` 或 ``cuda``。
        tiny: 很小的形状，只供试运行。
        deadline: 这一段到 ``time.monotonic()`` 的这个时候为止。
        records: 记录写到这个文件，一行一个 JSON；被杀掉时写好的都在。
        directory: 可以随意写的目录，整个运行共用。
        machine: ``machine`` 一段的记录；没有量时为空。
        smollm2: SmolLM2-135M 的 GGUF 文件（或模型目录）。
        text: ``quickstart`` 的文本。
    """

    device: str
    tiny: bool
    deadline: float
    records: Path
    directory: Path
    machine: Record = field(default_factory=dict)
    smollm2: Path | None = None
    text: Path | None = None

    @property
    def scale(self) -> str:
        """``train_step_models.SHAPES`` 的。"""
        return "tiny" if self.tiny else "full"

    def record(
        self, implementation: str, case: str, result: str, status: Status = "ok", **numbers: Any
    ) -> None:
        """写下一条：什么实现，在哪种情形上，表里怎么说，以及各个数。"""
        found = {"implementation": implementation, "case": case, "status": status}
        line = json.dumps(found | {"result": result} | numbers)
        with self.records.open("a") as file:
            file.write(line + "\n")

    def failure(self, implementation: str, case: str, why: str) -> None:
        """没能给出结果的一条；缺的是哪个库，就说缺它。"""
        if why.startswith(MISSING):
            name = why.removeprefix(MISSING).strip("'")
            self.record(implementation, case, f"needs {name}, which is not installed", "skipped")
        else:
            self.record(implementation, case, why, "failed")

    def available(self, names: Iterable[str], packages: dict[str, str], case: str) -> list[str]:
        """``names`` 里装了的；没有装的各记一条。``packages`` 是别家的实现与它的发行包。"""
        found = []
        for name in names:
            package = packages.get(name)
            if package and find_spec(package.replace("-", "_")) is None:
                self.record(name, case, f"needs {package}, which is not installed", "skipped")
            else:
                found.append(name)
        return found


@dataclass(frozen=True)
class Section:
    """一段：名字、做什么、占多少时间、缺什么。"""

    name: str
    call: Callable[[Work], None]
    weight: float
    absent: list[str]


def missing(modules: Iterable[str]) -> list[str]:
    """没有装的。"""
    return [name for name in modules if find_spec(name) is None]


def read(path: Path) -> list[Record]:
    """至今写下的记录；写到一半的一行不算。"""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]


def run(section: Section, work: Work, show: Callable[[Record], None], least: float) -> list[Record]:
    """在自己的进程里走完一段，到时就杀掉；记录来一条 ``show`` 一条。

    缺东西的、不到 ``least`` 秒的、崩溃的、超时的，另有一条说明；已经写下的都在。
    """
    shown = 0

    def show_new() -> None:
        nonlocal shown
        for record in read(work.records)[shown:]:
            show(record)
            shown += 1

    if section.absent:
        work.record(section.name, "", f"needs {', '.join(section.absent)}", "skipped")
    elif work.deadline - time.monotonic() < least:
        work.record(section.name, "", "no time is left: raise --minutes", "skipped")
    else:
        _supervise(section, work, show_new)
    show_new()
    for record in (records := read(work.records)):
        record["section"] = section.name
    return records


def _supervise(section: Section, work: Work, meanwhile: Callable[[], None]) -> None:
    limit = work.deadline - time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        process = Fork(lambda: section.call(work), log, leader=True)
        try:
            while (code := process.poll()) is None and time.monotonic() < work.deadline:
                time.sleep(0.05)
                meanwhile()
        finally:
            process.kill()
        if code is None:
            work.record(section.name, "", f"over its limit of {limit:.0f} s: killed", "failed")
        elif code:
            work.failure(section.name, "", reason(log) or f"exit status {code}")
            log.seek(0)
            sys.stderr.write(log.read())
