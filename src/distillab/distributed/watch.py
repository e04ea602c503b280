"""几个进程互相知道走到了哪里：一个出错，其余的带着它的原因结束，谁也不一直等下去。

等待的上限由通信库自己执行（``train.timeout_minutes``）；这里做它做不到的：说出每个进程在做什么、最先
出错的是谁，让卡在别处的进程也结束。各进程每秒经 TCPStore 交换一次，不占训练的通信。
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.rendezvous import rendezvous

from ..errors import DistillabError, HungUp, Terminated, exit_code, reason, typed_reason
from ..signals import grace_seconds

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("distillab")

PERIOD = 1.0
"""多少秒交换一次。"""

GRACE = 10.0
"""别的进程出错之后，给主线程多少秒自己停下来。"""

SILENT = 2 * PERIOD + 0.5
"""这么多秒没有消息的进程，多半已经没了。"""

_STOPS: dict[int, type[KeyboardInterrupt]] = {129: HungUp, 130: KeyboardInterrupt, 143: Terminated}


class Watch:
    """训练期间的守望；只有一个进程时什么也不做。可以嵌套，最外一层才启停。

    with 里的代码出错，原因先告诉其余的进程；因此而等不到它的进程，抛出的也是它的原因。
    """

    def __init__(self, accelerator: Accelerator, timeout_minutes: float) -> None:
        self.rank, self.processes = accelerator.process_index, accelerator.num_processes
        self.limit = timeout_minutes * 60
        self._position = (0, "starting", time.monotonic())
        self._depth = 0
        self._store: Any = None
        self._done = threading.Event()
        self._failed: dict[str, Any] | None = None
        self._reported: BaseException | None = None
        self._warned: tuple[int, str, float] | None = None

    def at(self, phase: str, step: int | None = None) -> None:
        """本进程在第 ``step`` 步（从 1 起，缺省不变）开始做 ``phase``；出错或久等时的日志里有。"""
        self._position = (self._position[0] if step is None else step, phase, time.monotonic())

    def __enter__(self) -> Watch:
        self._depth += 1
        if self._depth == 1 and self.processes > 1:
            # 自己的连接：进程组的那一个在等待时会占着。
            store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(minutes=1))))
            self._store = PrefixStore("distillab", store)
            self._publish()  # 线程的第一次在一秒之后，那之前就没了的也要说得出
            self._done.clear()
            threading.Thread(target=self._run, name="distillab-watch", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._depth -= 1
        try:
            new = self._store is not None and error is not self._reported
            other = self._report(error) if new and error is not None else None
        finally:
            if self._depth == 0:
                self._done.set()
        self._reported = other or error
        if other is not None:
            raise other from None

    def positions(self) -> str:
        """每个进程在做什么、做了多久，一行英文。"""
        found = []
        for rank in range(self.processes):
            try:
                if not self._store.check([str(rank)]):
                    found.append(f"rank {rank}: not started")
                    continue
                row = json.loads(self._store.get(str(rank)))
            except RuntimeError:
                return "rank 0 is gone, and with it what the others do"
            silent = time.time() - row["at"]
            gone = f", not heard of for {silent:.0f} s" if silent > SILENT else ""
            found.append(f"rank {rank}: {_where(row)}, for {row['seconds']:.0f} s{gone}")
        return "; ".join(found)

    # ------------------------------------------------------------------ 出错

    def _report(self, error: BaseException) -> BaseException | None:
        """把 ``error`` 告诉其余的进程；有别的进程先出错时，返回要换成的异常。"""
        lost = isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and "gloo" in str(error)
        )
        if lost and self._first(None) is None:
            time.sleep(SILENT)  # 没了的进程这时才看得出
        own_fault = not lost and not isinstance(error, (DistillabError, KeyboardInterrupt))
        why = typed_reason(error) if own_fault else reason(error)
        if lost:
            why = f"waited for the others in vain ({_short(why)}); {self.positions()}"
        code = exit_code(error) if isinstance(error, KeyboardInterrupt) else 1
        step, phase, _ = self._position
        own = {"rank": self.rank, "step": step, "phase": phase, "reason": why, "code": code}
        found = self._first(own) or own
        if found["rank"] != self.rank:  # 理由相同的是商量好一起停的
            kind = _STOPS.get(found["code"], DistillabError)
            return None if found["reason"] == why else kind(_sentence(found))
        if isinstance(error, Exception):
            get_error_handler().record_exception(error)  # torchrun 的总结里有它
        if own_fault:
            logger.error("%s", _sentence(found))  # 另外几种自己会印
        if self.rank == 0 and grace_seconds() is None:
            time.sleep(2 * PERIOD)  # 消息存在本进程里：等其余的读到
        return DistillabError(_sentence(found)) if lost else None

    def _first(self, own: dict[str, Any] | None) -> dict[str, Any] | None:
        """最先出错的；还没有时就是 ``own``。"""
        if self._failed is None:
            try:
                if own is not None:
                    return _loaded(self._store.compare_set("failed", "", json.dumps(own)))
                if self._store.check(["failed"]):
                    self._failed = _loaded(self._store.get("failed"))
            except RuntimeError:  # 存着消息的进程也没了
                return None
        return self._failed

    # ------------------------------------------------------------------ 守望的线程

    def _run(self) -> None:
        store = self._store
        while not self._done.wait(PERIOD):
            try:
                seconds = self._publish()
                if store.check(["failed"]):
                    self._failed = _loaded(store.get("failed"))
                    self._end(self._failed, GRACE)
                    return
                if seconds > 0.9 * self.limit and self._warned != self._position:
                    self._warned = self._position
                    if self.rank == 0:
                        logger.error("no progress for %d s: %s", seconds, self.positions())
            except RuntimeError:
                self._alone()
                return

    def _publish(self) -> float:
        """告诉其余的进程自己在做什么；返回做了多少秒。"""
        step, phase, since = self._position
        seconds = time.monotonic() - since
        row = {"step": step, "phase": phase, "seconds": seconds, "at": time.time()}
        self._store.set(str(self.rank), json.dumps(row))
        return seconds

    def _alone(self) -> None:
        """存着消息的进程没了：torchrun 没了先试着存好；否则是 0 号进程没了，走不下去。"""
        wait = GRACE
        if grace_seconds() is not None and not self._done.is_set():
            logger.error("rank %d: torchrun is gone", self.rank)
            os.kill(os.getpid(), signal.SIGTERM)
            wait = self.limit
        step = self._position[0]
        gone = {"rank": 0, "step": step, "phase": "an unknown point", "reason": "it is gone"}
        self._end(gone | {"code": 2}, wait)

    def _end(self, failed: dict[str, Any], wait: float) -> None:
        """主线程多半卡在等不来的通信里，或卡住的正是它：等一会儿，再替它结束进程。"""
        if self._done.wait(wait):
            return
        phase = self._position[1]
        logger.error("rank %d ends, stuck in %s: %s", self.rank, phase, _sentence(failed))
        faulthandler.dump_traceback(all_threads=True)
        os._exit(failed["code"] if failed["code"] in _STOPS else 2)


def _loaded(message: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(message)
    return found


def _where(row: dict[str, Any]) -> str:
    return f"step {row['step']}, {row['phase']}"


def _sentence(failed: dict[str, Any]) -> str:
    return f"rank {failed['rank']} at {_where(failed)}: {failed['reason']}"


def _short(text: str) -> str:
    """通信库的话去掉源码位置与泛泛的建议：``[…/pair.cc:547] Connection closed. This …``。"""
    return text.rpartition("] ")[2].partition(". ")[0]
