"""``train_step.py`` 的一个进程里的测量：循环每步调用 ``start`` 与 ``stop``，怎样量由 ``Clock`` 定。

前两步是热身：第一步报告损失，第二步量内存。此后标准输入每来一行就计时一步；标准输入关闭，
``stop`` 返回 False，循环结束。三个实现因而各用自己本来的循环，不必拆成可以单独调用的一步。
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from measuring import read_peak, reset_peak, send, synchronize


class Clock:
    """量一个训练循环的每一步，经 ``channel`` 报告，一行一个 JSON。

    Args:
        device: ``cpu`` 或 ``cuda``。
        channel: 报告写到哪里。
        profiling: 是否让 ``watch`` 起作用。
    """

    def __init__(self, device: str, channel: TextIO, profiling: bool = False) -> None:
        self.device = device
        self.channel = channel
        self.profiling = profiling
        self.stages: dict[str, float] = defaultdict(float)
        self.report: dict[str, Any] = {}
        self.seconds = self.started = 0.0
        self._resident: int | None = None
        self._kinds = self._script()
        self._kind: str | None = next(self._kinds)

    def _script(self) -> Iterator[str]:
        """每一步的种类；``next`` 之后的代码在那一步做完时运行。"""
        yield "first"
        yield "memory"
        send(self.channel, self.report)
        for _ in sys.stdin:
            if self.device == "cuda":
                yield "idle"  # 刚轮到的进程，GPU 要从低频率醒来
            yield "timed"
            stages = {**self.stages, "other": self.seconds - sum(self.stages.values())}
            report = {"seconds": self.seconds, "stages": stages if self.profiling else None}
            send(self.channel, report)

    def start(self) -> None:
        """一步开始：数据已在设备上，梯度为空。"""
        if self._kind == "memory":
            self._resident = reset_peak(self.device)
        self.stages.clear()
        synchronize(self.device)
        self.started = time.perf_counter()

    def stop(self, **losses: Any) -> bool:
        """一步结束：参数已更新，梯度已清空。

        Args:
            losses: 这一步的损失，数或标量张量；只报告第一步的。

        Returns:
            是否还有下一步。
        """
        synchronize(self.device)
        self.seconds = time.perf_counter() - self.started
        if self._kind == "first":
            self.report |= {name: float(value) for name, value in losses.items()}
        elif self._kind == "memory":
            peak = None if self._resident is None else read_peak(self.device)
            extra = None if peak is None or self._resident is None else peak - self._resident
            self.report |= {"extra_bytes": extra, "peak_bytes": peak}
        self._kind = next(self._kinds, None)
        return self._kind is not None

    def watch(self, owner: Any, method: str, stage: str) -> None:
        """把 ``owner.method`` 的时间记在 ``stage`` 名下；其中嵌套着的 stage 不重复计。"""
        if not self.profiling:
            return
        call: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            synchronize(self.device)
            started, nested = time.perf_counter(), sum(self.stages.values())
            result = call(*args, **kwargs)
            synchronize(self.device)
            nested = sum(self.stages.values()) - nested
            self.stages[stage] += time.perf_counter() - started - nested
            return result

        setattr(owner, method, timed)
