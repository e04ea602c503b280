"""``gpu.py`` 量的一步：设备忙多久，主机忙多久，多少次启动，主机等了哪里，用了测到的矩阵乘的几成。

同样是 ``train_step_implementations.distillab_loop``，时钟换成这里的 ``StepClock``：热身之后等主进程
说开始，依次量几步有头有尾的、几步连着走的、一步里主机的等待，最后几步交给 profiler。
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from measuring import Record, read_peak, reset_peak, send, synchronize
from torch.profiler import ProfilerActivity, profile
from train_step_models import SHAPES, Cell

WARM, TIMED, RUNNING, TRACED = 8, 7, 10, 3
"""热身（编译、录 CUDA graph）、有头有尾、连着走、记录每个算子的步数。"""

DEVICE_WORK = {"kernel", "gpu_memcpy", "gpu_memset"}
"""trace 里设备做的事；别的 ``gpu_*`` 是标注，与内核重叠。"""

LAUNCHES = ("LaunchKernel", "GraphLaunch", "Memcpy", "Memset")
"""主机向设备提交工作的 CUDA 调用，名字里有其中之一。"""

WAITS = ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize")


TRACE = ("device_seconds", "kernels", "launches", "graphs", "host_waits", "operators",
         "top_kernels")  # fmt: skip
"""``summary`` 给出的。"""


class StepClock:
    """代替 ``train_step_clock.Clock``；测完的一份经 ``channel`` 报告。"""

    def __init__(self, device: str, channel: TextIO) -> None:
        self.device, self.channel = device, channel
        self.losses: list[float] = []
        self.host: list[float] = []
        self.seconds: list[float] = []
        self.waits: Counter[str] = Counter()
        self._caught: Any = None
        self._kinds = self._script()
        self._kind: str | None = next(self._kinds)

    def _script(self) -> Iterator[str]:
        """每一步的种类；``next`` 之后的代码在那一步做完时运行。"""
        for step in range(WARM):
            if step == WARM - 1:
                reset_peak(self.device)
            yield "warm"
        report: Record = {"peak_bytes": read_peak(self.device), "reserved_bytes": None}
        if self.device == "cuda":  # CUDA graph 里的中间结果只在这里看得见
            report["reserved_bytes"] = torch.cuda.max_memory_reserved()
        send(self.channel, {})
        sys.stdin.readline()
        yield "warm"  # GPU 要从低频率醒来
        for _ in range(TIMED):
            yield "timed"
        report |= {
            "seconds": statistics.median(self.seconds),
            "seconds_all": self.seconds,
            "host_seconds": statistics.median(self.host),
        }
        started = time.perf_counter()
        for _ in range(RUNNING):
            yield "running"
        synchronize(self.device)
        report["running_seconds"] = (time.perf_counter() - started) / RUNNING
        yield "watched"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device == "cuda")
        with profile(activities=activities) as recorder:
            for _ in range(TRACED):
                yield "running"
            synchronize(self.device)
        try:
            report |= traced(recorder)
        except Exception as error:  # 别的都量好了
            report |= {**dict.fromkeys(TRACE), "trace_error": f"{type(error).__name__}: {error}"}
        report |= {
            "waits": dict(self.waits.most_common()),
            "first_loss": self.losses[0],
            "last_loss": self.losses[-1],
        }
        send(self.channel, report)

    def start(self) -> None:
        """一步开始。"""
        if self._kind in ("timed", "watched"):
            synchronize(self.device)
        if self._kind == "watched" and self.device == "cuda":
            self._caught = warnings.catch_warnings(record=True)
            self._found = self._caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        self._started = time.perf_counter()

    def stop(self, **losses: Any) -> bool:
        """一步结束；返回是否还有下一步。"""
        if self._kind == "timed":
            self.host.append(time.perf_counter() - self._started)
            synchronize(self.device)
            self.seconds.append(time.perf_counter() - self._started)
        elif self._kind == "watched" and self._caught is not None:
            torch.cuda.set_sync_debug_mode("default")
            self._caught.__exit__(None, None, None)
            self.waits.update(f"{place(one.filename)}:{one.lineno}" for one in self._found)
        elif self._kind == "warm" and "loss" in losses:
            self.losses.append(float(losses["loss"]))
        self._kind = next(self._kinds, None)
        return self._kind is not None

    def watch(self, owner: Any, method: str, stage: str) -> None:
        """各段由 profiler 看，这里不计。"""


def place(filename: str) -> str:
    """文件在它的包里的路径。"""
    parts = Path(filename).parts
    starts = [i + 1 for i, part in enumerate(parts) if part in ("site-packages", "src")]
    return "/".join(parts[starts[-1] if starts else -2 :])


def traced(recorder: profile) -> Record:
    """每步：设备忙的秒数（并集）、内核数、主机的提交与等待，设备时间最多的内核。"""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "trace.json")
        recorder.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return summary([event for event in events if event.get("ph") == "X"])


def summary(events: list[dict[str, Any]]) -> Record:
    """``traced`` 的后一半；``events`` 的时间单位微秒。"""
    work = [event for event in events if event.get("cat") in DEVICE_WORK]
    calls = Counter(
        event["name"] for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")
    )

    def named(parts: tuple[str, ...]) -> float:
        return sum(n for name, n in calls.items() if any(part in name for part in parts)) / TRACED

    by_name: Counter[str] = Counter()
    for event in work:
        by_name[event["name"]] += event["dur"]
    busy, end = 0.0, -1.0
    for start, stop in sorted((event["ts"], event["ts"] + event["dur"]) for event in work):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return {
        "device_seconds": busy / TRACED / 1e6,
        "kernels": sum(event["cat"] == "kernel" for event in work) / TRACED,
        "launches": named(LAUNCHES),
        "graphs": named(("GraphLaunch",)),
        "host_waits": named(WAITS),
        "operators": sum(event.get("cat") == "cpu_op" for event in events) / TRACED,
        "top_kernels": [
            {"name": name[:90], "seconds": micros / TRACED / 1e6}
            for name, micros in by_name.most_common(15)
        ],
    }


def operations(cell: Cell) -> float:
    """一步的浮点运算：教师前向，学生前向加反向（三倍），都连同 head；因果注意力算一半。"""
    shape = SHAPES[cell.case, cell.scale]
    length, total = cell.seq_len, 0.0
    for name, times in (("teacher", 1), ("student", 3)):
        hidden, layers, heads, kv_heads, inner, vocab = shape[name]
        block = hidden * 2 * (hidden + hidden // heads * kv_heads) + 3 * hidden * inner
        body = layers * (block + length * hidden)  # QK^T 与 AV，平均各看一半
        total += times * 2.0 * cell.batch_size * length * (body + vocab * hidden)
    return total


def sentence(record: Record) -> str:
    """表里的一行：先说一步多久，再说为什么。"""
    host, flops = record["host_seconds"], record["flops"]
    parts = [
        f"{1e3 * record['running_seconds']:.1f} ms running, {1e3 * record['seconds']:.1f} alone",
        f"{record['tokens_per_second']:,.0f} tokens/s",
        f"host {1e3 * host:.1f} ms",
    ]
    if record["kernels"]:  # 没有权限看 GPU 的 profiler 一个内核也没有
        parts.append(
            f"device {1e3 * record['device_seconds']:.1f} ms, {record['launches']:.0f} launches "
            f"({record['graphs']:.0f} graphs), {record['kernels']:.0f} kernels"
        )
    rate = f"{flops / 1e12:.1f} TFLOP/s"
    if record.get("share") is not None:
        rate += f" = {record['share']:.1%} of the matrix rate"
    parts += [rate, f"peak {record['peak_bytes'] / 2**30:.2f} GiB"]
    if record["reserved_bytes"] is not None:
        parts[-1] += f" ({record['reserved_bytes'] / 2**30:.2f} reserved)"
    waits = ", ".join(f"{count} x {where}" for where, count in record["waits"].items())
    return "; ".join([*parts, f"waits: {waits or 'none'}"])
