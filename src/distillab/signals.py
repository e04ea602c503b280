"""Ctrl-C、SIGTERM 与 SIGHUP：走完这一步、存好再停；几个进程停在同一步。"""

from __future__ import annotations

import _thread
import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Any

from .errors import HungUp, Terminated

logger = logging.getLogger("distillab")

SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
"""后面的更要紧：几种都收到时，算后面的。"""
SPEAKING_SECONDS = 2.0
"""收尾时至多等那句「要停了」这么久：终端可能已经没有人读。"""


class StopRequest:
    """把第一次 Ctrl-C、SIGTERM 或 SIGHUP 变成「走完这一步再停」；第二次 Ctrl-C 立即退出。

    几个进程收到信号有先有后，有的根本收不到：``votes`` 与每步本来就有的归约一起走，``agree`` 记下
    结果，所有进程便停在同一步。``received`` 是本进程收到的第一个信号，``agreed`` 是各进程一致的。
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.agreed: signal.Signals | None = None
        self._warned = False
        self._handling = ExitStack()
        self._speaking = _thread.allocate_lock()

    @property
    def requested(self) -> bool:
        """本进程有没有收到信号。"""
        return self.received is not None

    def votes(self) -> list[float]:
        """本进程收到了 ``SIGNALS`` 里的哪一个，供各进程求和。"""
        return [float(self.received == number) for number in SIGNALS]

    def agree(self, totals: Sequence[float]) -> Sequence[float]:
        """记下末尾的、所有进程的 ``votes`` 之和；返回前面的。"""
        for number, count in zip(SIGNALS, totals[-len(SIGNALS) :], strict=True):
            if count:
                self.agreed = number
        return totals[: -len(SIGNALS)]

    def decision(self, processes: int) -> signal.Signals | None:
        """该不该停；只有一个进程时不必等下一次归约。"""
        return self.received if processes == 1 else self.agreed

    def check_grace(self, seconds: float) -> None:
        """走完一步、验证、存盘用了 ``seconds``；SIGTERM 之后来不及的话，先在日志里说一次。"""
        limit = grace_seconds()
        if limit is not None and seconds > limit and not self._warned:
            self._warned = True
            logger.warning(
                f"this step, with validation and saving, took {int(seconds)} s, but torchrun ends "
                f"a process {limit:g} s after SIGTERM: give it --shutdown-timeout, and set "
                f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT to the same"
            )

    def stopped(self, text: str) -> KeyboardInterrupt:
        """停下来时要抛出的；``text`` 说停在哪里。"""
        got = {self.agreed, self.received}
        if signal.SIGTERM in got:
            return Terminated(text)
        return HungUp(text) if signal.SIGHUP in got else KeyboardInterrupt(text)

    def __enter__(self) -> StopRequest:
        self._handling.enter_context(_handling(SIGNALS, self._handle))
        return self

    def __exit__(self, *_: object) -> None:
        self._handling.close()
        if self._speaking.acquire(timeout=SPEAKING_SECONDS):  # 先说要停，再说停在哪里
            self._speaking.release()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        first, self.received = self.received, self.received or signal.Signals(signum)
        if first is None:
            hint = " (press again to quit at once)" if signum == signal.SIGINT else _limit_hint()
            name = "Ctrl-C" if signum == signal.SIGINT else self.received.name
            # 在另一个线程里说：主线程也许正写到一半，不能再进去一次；说不成也与它无关。
            self._speaking.acquire(blocking=False)
            _thread.start_new_thread(self._say, ("%s: saving after this step%s", name, hint))
        elif signum == signal.SIGINT or (
            (first, signum) == (signal.SIGINT, signal.SIGTERM) and grace_seconds() is not None
        ):
            # torchrun 的第二次 Ctrl-C 到这里是 SIGTERM。接连的 SIGTERM 与 SIGHUP 不算：
            # 作业管理器或终端会同时发给 torchrun 与它的子进程，后者再由 torchrun 转来一次。
            raise KeyboardInterrupt

    def _say(self, *words: str) -> None:
        try:
            logger.warning(*words)
        finally:
            self._speaking.release()


def grace_seconds() -> float | None:
    """Torchrun 把信号转来之后，等多少秒就强行结束；不是由它启动的是 ``None``。"""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))


@contextmanager
def terminable() -> Iterator[None]:
    """其间 SIGTERM 与 SIGHUP 像 Ctrl-C 一样抛出异常，收尾的代码因而都会执行。"""

    def terminate(signum: int, frame: FrameType | None) -> None:
        raise HungUp if signum == signal.SIGHUP else Terminated

    with _handling((signal.SIGHUP, signal.SIGTERM), terminate):
        yield


@contextmanager
def _handling(
    numbers: Sequence[signal.Signals], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """其间由 ``handler`` 处理信号；nohup 要忽略的 SIGHUP 仍旧忽略。"""
    previous: dict[signal.Signals, Any] = {}
    try:
        for number in numbers:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            with suppress(ValueError):  # 只有主线程能装信号处理
                previous[number] = signal.signal(number, handler)
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def _limit_hint() -> str:
    limit = grace_seconds()
    return "" if limit is None else f", before torchrun ends this process in {limit:g} s"
