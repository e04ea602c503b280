"""``gpu.py`` 的进程：从导入好 torch 的进程 fork 出来，各有时限，到时连同它的子孙一起杀掉。

fork 的进程在那之前不碰 CUDA，也不算任何东西：CUDA 的 context 与 OpenMP 的线程都 fork 不过去。
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from select import select
from typing import Any, TextIO

from measuring import Record, Worker, WorkerFailed

PATIENCE = 0.5
"""一起热身的几个，有的没有好，最多等剩下时间的这么多，先量好了的。"""


class Fork:
    """fork 出来跑 ``call`` 的进程，用起来像 ``Popen``；它的标准错误写进 ``log``。

    Args:
        call: 在新的进程里做的事；抛出的异常写进 ``log``，退出码是 1。
        log: 打开的文件。
        leader: 自成一个进程组，``kill`` 时一起杀掉。
    """

    def __init__(self, call: Callable[[], object], log: TextIO, leader: bool = False) -> None:
        self.leader, self.returncode = leader, None
        own_in, their_in = os.pipe()
        their_out, own_out = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(call, (own_in, own_out, log.fileno()), leader)
        os.close(own_in)
        os.close(own_out)
        self.stdin = os.fdopen(their_in, "w", buffering=1)
        self.stdout = os.fdopen(their_out)

    def poll(self) -> int | None:
        """退出码（被信号停下的是它的相反数），或还在跑：``None``。"""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int:
        """等它结束。"""
        if self.poll() is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def kill(self) -> None:
        """杀掉它、它的子孙与它的进程组里剩下的，等它结束。"""
        running = self.poll() is None
        if self.leader:
            with contextlib.suppress(OSError):
                os.killpg(self.pid, signal.SIGKILL)
        for pid in [self.pid, *descendants(self.pid)] if running else []:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.wait()
        self.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()


def _become(call: Callable[[], object], streams: tuple[int, int, int], leader: bool) -> None:
    """在 fork 出来的进程里做完 ``call`` 就退出，不回到原来的程序。"""
    code = 1
    try:
        if leader:
            os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - 与进程同寿命
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        call()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def descendants(pid: int) -> list[int]:
    """一个进程的子孙；自成进程组的也在内。没有 ``/proc`` 时为空。"""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # 已经结束
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found, waiting = [], [pid]
    while waiting:
        found += (below := children.get(waiting.pop(), []))
        waiting += below
    return found


def reason(log: TextIO) -> str:
    """``log`` 里最后一个 traceback 的结论，压成一行；没有就是最后一行有字的。"""
    log.seek(0)
    lines = [line.rstrip() for line in log if line.strip()]
    frames = [number for number, line in enumerate(lines) if line.startswith('  File "')]
    rest = lines[frames[-1] + 1 :] if frames else lines[-1:]
    while len(rest) > 1 and rest[0].startswith(" "):
        del rest[0]
    return " ".join(" ".join(rest).split())[:300]


def run_forked(call: Callable[[], object]) -> None:
    """在另一个进程里做完 ``call``；失败是 ``RuntimeError``。"""
    with tempfile.TemporaryFile("w+") as log:
        process = Fork(call, log)
        if process.wait():
            raise RuntimeError(reason(log))


def asked(question: Callable[[], str]) -> str:
    """在另一个进程里问一句，它的一行回答。"""
    with tempfile.TemporaryFile("w+") as log:
        process = Fork(lambda: print(question()), log)
        answer = process.stdout.readline().strip()
        process.kill()
        return answer


class ForkedWorker(Worker):
    """``measuring.Worker``，进程是 fork 的：不必各自再导入 torch；关掉就是杀掉。"""

    def __init__(self, call: Callable[[], object]) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - 与子进程同寿命
        self.process: Any = Fork(call, self.log)

    def ready(self) -> bool:
        """有一行可读，或已经结束。"""
        return bool(select([self.process.stdout], [], [], 0)[0])

    def answer(self) -> Record:
        """它的下一行；没有的是 ``{"failed": 原因}``。"""
        try:
            return self.receive()
        except WorkerFailed as error:
            return {"failed": reason(self.log) or str(error)}

    def close(self) -> None:
        """杀掉它。"""
        self.process.kill()
        self.log.close()


Answer = tuple[str, Record, list[Record]]
"""名字，热身之后的报告，每一轮的报告；没能给出结果的，报告里只有 ``failed``。"""


def in_turn(
    calls: Mapping[str, Callable[[], object]], deadline: float, rounds: int, warm_up: int = 0
) -> Iterator[Answer]:
    """一起启动、一起热身，好了的逐轮交替做；一个名字一份。

    没有好的等到剩下时间的 ``PATIENCE`` 为止，此后谁好了就做谁，不与先好的比同一轮。

    Args:
        calls: 各进程里做的事，说的话见 ``measuring``：先报告一行，此后一行换一行。
        deadline: ``time.monotonic()`` 的时限。
        rounds: 几轮。
        warm_up: 另外先做几轮，不算。
    """
    with contextlib.ExitStack() as stack:
        waiting = {}
        for name, call in calls.items():
            waiting[name] = ForkedWorker(call)
            stack.callback(waiting[name].close)
        patience = time.monotonic() + PATIENCE * (deadline - time.monotonic())
        while waiting:
            while True:
                ready = [name for name, worker in waiting.items() if worker.ready()]
                late = time.monotonic() > patience
                if len(ready) == len(waiting) or (ready and late):
                    break
                time.sleep(0.02)
            yield from _rounds({name: waiting.pop(name) for name in ready}, rounds, warm_up)


def _rounds(workers: dict[str, ForkedWorker], rounds: int, warm_up: int) -> Iterator[Answer]:
    """一个做完就给出一个：后面的挂住了，前面的还在。"""
    reports: dict[str, list[Record]] = {name: [] for name in workers}
    last = rounds + warm_up
    for turn in range(last + 1):
        for name in [*reports]:
            worker = workers[name]
            if turn > 0:
                with contextlib.suppress(BrokenPipeError):
                    worker.process.stdin.write("\n")
            found = worker.answer()
            reports[name].append(found)
            if "failed" in found or turn == last:
                worker.process.kill()
                first, *rest = reports.pop(name)
                yield (name, found, []) if "failed" in found else (name, first, rest[warm_up:])
