"""一步的时间花在哪里：``distillab train --profile``。

训练循环用 ``with phase(...)`` 标出各段。前几步不看（编译、分配），接着几步只计时，再几步记录每个
算子：记录本身要时间，所以各段的秒数出自前者，trace、算子与运算量出自后者。验证与存盘不在步里，不计。
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ..files import replacing_directory

logger = logging.getLogger("distillab")

PHASES = (
    "data", "sampling", "teacher forward", "student forward", "heads and loss",
    "backward", "gradient clip", "optimizer",
)  # fmt: skip
"""各段，按一步里的先后；head 的梯度在损失的前向里就算完，反向里只剩主体。"""

BEFORE_STEP = frozenset({"data", "sampling"})
"""一步的计时开始之前的段；其余的只在一步之内计，验证用到的同名函数不算。"""

SKIPPED, TIMED, TRACED = 3, 5, 3
"""先略过、再计时、再记录每个算子的步数；两者之间还有一步让记录器热身。"""

NEEDED = SKIPPED + TIMED + 1 + TRACED

PREFIX = "distillab: "
"""trace 里各段的名字以它开头。"""

PRODUCTS = MappingProxyType(
    {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::baddbmm": 1}
)
"""矩阵乘的算子，左边的矩阵是第几个参数；注意力的内核不在内。"""

TOP = 15
"""列出自身时间最多的这么多个算子。"""

_active: StepProfile | None = None


def phase(name: str) -> AbstractContextManager[None]:
    """一步里的一段；没有在剖析时什么也不做。"""
    return nullcontext() if _active is None else _active.phase(name)


@contextmanager
def profiled_step() -> Iterator[None]:
    """训练循环里的一步。"""
    with nullcontext() if _active is None else _active.step():
        yield


class StepProfile:
    """剖析一次训练的几步，写下 trace 与各段的时间。

    ``trace.json.gz`` 是 Chrome trace，可在 Perfetto 里打开；``steps.json`` 是数，``steps.txt`` 是同
    样的数排成的表，写好时也印在日志里。有 GPU 时每段前后等它做完，段与段因而不再重叠。
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.cuda = torch.cuda.is_available()
        self.steps = 0
        self.inside = False
        self.seconds: dict[str, float] = defaultdict(float)
        self.recorder: profile | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """一段；段与段不嵌套。"""
        if not self.inside and name not in BEFORE_STEP:
            yield
            return
        with self._clock(name), record_function(PREFIX + name):
            yield

    @contextmanager
    def step(self) -> Iterator[None]:
        """一步的主体，从数据备好到参数更新。"""
        self.inside = True
        try:
            with self._clock("step"), record_function(PREFIX + "step"):
                yield
        finally:
            self.inside = False
        self._advance()

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        self._synchronize()
        started = time.perf_counter()
        yield
        self._synchronize()
        if SKIPPED <= self.steps < SKIPPED + TIMED:
            self.seconds[name] += time.perf_counter() - started

    def _synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def _advance(self) -> None:
        self.steps += 1
        if self.steps == SKIPPED + TIMED:
            self.recorder = profile(
                activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.cuda,
                schedule=torch.profiler.schedule(wait=0, warmup=1, active=TRACED, repeat=1),
                record_shapes=True,
                acc_events=True,
            )
            self.recorder.start()
        elif self.recorder is not None:
            self.recorder.step()
            if self.steps == NEEDED:
                self.finish()

    def finish(self) -> None:
        """写下结果，不再剖析；步数不够时说明还差多少。"""
        global _active
        _active = None
        recorder, self.recorder = self.recorder, None
        if recorder is not None:
            recorder.stop()
        if recorder is None or self.steps < NEEDED:
            logger.warning(
                "--profile needs %d steps, this run had %d: nothing written", NEEDED, self.steps
            )
            return
        found = self._summary(recorder)
        lines = profile_lines(found)
        with replacing_directory(self.directory) as directory:
            recorder.export_chrome_trace(str(directory / "trace.json.gz"))
            (directory / "steps.json").write_text(json.dumps(found, indent=1) + "\n")
            (directory / "steps.txt").write_text("\n".join(lines) + "\n")
        for line in lines:
            logger.info("%s", line)
        logger.info("written: %s", self.directory)

    def _summary(self, recorder: profile) -> dict[str, Any]:
        """``steps.json`` 的内容；一步的时间是主体与它之前各段之和。"""
        seconds = {name: self.seconds[name] / TIMED for name in PHASES if name in self.seconds}
        body = self.seconds["step"] / TIMED
        before = sum(value for name, value in seconds.items() if name in BEFORE_STEP)
        seconds["other"] = body + before - sum(seconds.values())
        operations, operators = _operators(recorder.events())  # type: ignore[no-untyped-call]
        operations["other"] = operations["step"]
        return {
            "step_seconds": body + before,
            "timed_steps": TIMED,
            "traced_steps": TRACED,
            "phases": {
                name: {"seconds": value, "operations": operations[name]}
                for name, value in seconds.items()
            },
            "operators": operators,
            "peak_memory_bytes": peak_memory_bytes(),
        }


@contextmanager
def profiling(directory: Path | None) -> Iterator[None]:
    """其间的训练步都交给 ``StepProfile``；``None`` 是不剖析。"""
    global _active
    if directory is None:
        yield
        return
    _active = current = StepProfile(directory)
    try:
        yield
    finally:
        if _active is current:
            current.finish()


def profile_lines(found: dict[str, Any]) -> list[str]:
    """``steps.json`` 的内容排成的表，一行一个字符串。"""
    step = found["step_seconds"]
    total = sum(row["operations"] for row in found["phases"].values())
    lines = [f"{'where a step goes':<20}{'seconds':>10}{'share':>8}{'GFLOP':>10}{'GFLOP/s':>9}"]

    def line(name: str, seconds: float, operations: float) -> str:
        speed = operations / seconds / 1e9 if seconds else 0.0
        share = seconds / step if step else 0.0
        return f"{name:<20}{seconds:>10.4f}{share:>8.1%}{operations / 1e9:>10.2f}{speed:>9.1f}"

    lines += [line(name, **row) for name, row in found["phases"].items()]
    lines += [line("step", step, total), ""]
    lines.append(f"{'operator, own time a step':<40}{'CPU s':>8}{'CUDA s':>8}{'calls':>8}")
    for row in found["operators"]:
        times = f"{row['cpu_seconds']:>8.4f}{row['cuda_seconds']:>8.4f}"
        lines.append(f"{row['name'][:39]:<40}{times}{row['calls']:>8.0f}")
    return [*lines, f"peak memory {found['peak_memory_bytes'] / 2**30:.2f} GiB"]


def peak_memory_bytes() -> int:
    """至今的内存峰值，字节：有 GPU 时是显存，否则是进程的常驻内存。"""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def product_operations(name: str, shapes: list[list[int]]) -> int:
    """一次矩阵乘的运算次数，乘与加各算一次；别的算子是 0。

    不用 profiler 自己的 ``with_flops``：它漏掉写入已有张量的 ``addmm_``，head 的梯度正是这样算的。
    """
    first = PRODUCTS.get(name)
    if first is None or len(shapes) < first + 2:
        return 0
    return 2 * math.prod(shapes[first]) * shapes[first + 1][-1]


def _operators(events: Any) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """各段每步的浮点运算次数，与自身时间最多的算子；步之外的（验证、存盘）不算。"""
    events = [event for event in events if event.device_type.name == "CPU"]
    spans = [
        (event.time_range.start, event.time_range.end, event.name.removeprefix(PREFIX))
        for event in events
        if event.name.startswith(PREFIX)
    ]
    operations: dict[str, float] = defaultdict(float)
    rows: dict[str, dict[str, Any]] = {}
    spans.sort(key=lambda span: span[1] - span[0])  # 最短的在前：段在步之内
    for event in events:
        start = event.time_range.start
        where = next((name for left, right, name in spans if left <= start <= right), None)
        if where is None or event.name.startswith((PREFIX, "ProfilerStep")):
            continue
        operations[where] += product_operations(event.name, event.input_shapes) / TRACED
        row = rows.setdefault(
            event.name, {"name": event.name, "cpu_seconds": 0.0, "cuda_seconds": 0.0, "calls": 0.0}
        )
        row["cpu_seconds"] += event.self_cpu_time_total / 1e6 / TRACED
        row["cuda_seconds"] += event.self_device_time_total / 1e6 / TRACED
        row["calls"] += 1 / TRACED
    order = sorted(rows.values(), key=lambda row: -(row["cuda_seconds"] or row["cpu_seconds"]))
    return operations, order[:TOP]
