"""Ctrl-C 与 SIGTERM：走完这一步、存好再停；几个进程停在同一步。"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from .errors import Terminated

logger = logging.getLogger("distillab")

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """把第一次 Ctrl-C 或 SIGTERM 变成「走完这一步再停」；第二次 Ctrl-C 立即退出。

    几个进程收到信号有先有后，有的根本收不到：``votes`` 与每步本来就有的归约一起走，``agree`` 记下
    结果，所有进程便停在同一步。

    Attributes:
        received: 本进程收到的第一个信号。
        agreed: 各进程一致的决定；只有归约之后才有。
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.agreed: signal.Signals | None = None
        self._warned = False
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """本进程有没有收到信号。"""
        return self.received is not None

    def votes(self) -> list[float]:
        """本进程收到了 ``SIGNALS`` 里的哪一个，供各进程求和。"""
        return [float(self.received == number) for number in SIGNALS]

    def agree(self, votes: Sequence[float]) -> None:
        """记下所有进程 ``votes`` 之和；两种都有的，算 SIGTERM。"""
        for number, count in zip(SIGNALS, votes, strict=True):
            if count:
                self.agreed = number

    def decision(self, processes: int) -> signal.Signals | None:
        """该不该停；只有一个进程时不必等下一次归约。"""
        return self.received if processes == 1 else self.agreed

    def check_grace(self, seconds: float) -> None:
        """走完一步、验证、存盘用了 ``seconds``；SIGTERM 之后来不及的话，先在日志里说一次。"""
        limit = grace_seconds()
        if limit is not None and seconds > limit and not self._warned:
            self._warned = True
            logger.warning(
                "this step, with validation and saving, took %d s, but torchrun ends a process "
                "%g s after SIGTERM: give it --shutdown-timeout, and set "
                "TORCH_ELASTIC_SHUTDOWN_TIMEOUT to the same",
                seconds, limit,
            )  # fmt: skip

    def stopped(self, text: str) -> KeyboardInterrupt:
        """停下来时要抛出的；``text`` 说停在哪里。"""
        terminated = signal.SIGTERM in (self.agreed, self.received)
        return Terminated(text) if terminated else KeyboardInterrupt(text)

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:  # 只有主线程能装信号处理
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous = {}

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        first, self.received = self.received, self.received or signal.Signals(signum)
        if first is None:
            hint = " (press again to quit at once)" if signum == signal.SIGINT else _limit_hint()
            name = "Ctrl-C" if signum == signal.SIGINT else "SIGTERM"
            logger.warning("%s: saving after this step%s", name, hint)
        elif signum == signal.SIGINT or (first == signal.SIGINT and grace_seconds() is not None):
            # torchrun 的第二次 Ctrl-C 到这里是 SIGTERM。接连的 SIGTERM 不算：
            # 作业管理器会同时发给 torchrun 与它的子进程，后者再由 torchrun 转来一次。
            raise KeyboardInterrupt


def grace_seconds() -> float | None:
    """Torchrun 把信号转来之后，等多少秒就强行结束；不是由它启动的是 ``None``。"""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))


@contextmanager
def terminable() -> Iterator[None]:
    """其间 SIGTERM 像 Ctrl-C 一样抛出异常，收尾的代码因而都会执行。"""

    def terminate(signum: int, frame: FrameType | None) -> None:
        raise Terminated

    try:
        previous = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # 只有主线程能装信号处理
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _limit_hint() -> str:
    limit = grace_seconds()
    return "" if limit is None else f", before torchrun ends this process in {limit:g} s"
