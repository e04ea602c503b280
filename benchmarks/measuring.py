"""各个基准共用的：子进程与交替计时，内存峰值，结果依赖的环境，记录的保存。

每个被测的东西有自己的进程，以 ``--role`` 再次运行同一个脚本：它先报告一行 JSON，此后标准输入每来
一行就计时一次、再报告一行。
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch

Record = dict[str, Any]

# 被测的进程。


def open_channel() -> TextIO:
    """报告写到哪里：原来的标准输出；此后 ``print`` 的都去标准错误，库打印的东西不会混进报告。"""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return channel


def send(channel: TextIO, report: Record) -> None:
    """报告一行。"""
    print(json.dumps(report), file=channel, flush=True)


def synchronize(device: str) -> None:
    """等 GPU 上排着的工作做完；CPU 上什么也不做。"""
    if device == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: str) -> int | None:
    """把峰值归零到当前占用，返回当前占用，单位字节；系统不能归零则返回 ``None``。

    CUDA：``memory_allocated``。CPU：VmHWM，经 ``/proc/self/clear_refs`` 归零到当前 RSS；归零之前把
    malloc 留着的空闲内存还给系统，否则块小的实现会显得不占内存。
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return resident_high_water()


def read_peak(device: str) -> int:
    """``reset_peak`` 之后的峰值，单位字节；没能归零则是进程开始以来的。"""
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident_high_water()


def resident_high_water() -> int:
    """``/proc/self/status`` 的 VmHWM，单位字节。"""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


# 主进程：启动，交替计时。


class WorkerFailed(Exception):
    """一个实现没能给出结果；信息是它的标准错误的最后一行。"""


class Worker:
    """一个被测的子进程，一行请求换一行 JSON。

    Args:
        role: ``--role`` 的内容，能写成 JSON。
        hide_gpu: 让它看不见 GPU：训练的引擎有 GPU 就用。
    """

    def __init__(self, role: Any, hide_gpu: bool = False) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - 与子进程同寿命
        self.process = subprocess.Popen(
            role_command(role),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            bufsize=1,
            env=os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if hide_gpu else {}),
        )

    def receive(self) -> Record:
        """等它的下一行。

        Raises:
            WorkerFailed: 进程先结束了。
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.log.seek(0)
            lines = [line for line in self.log.read().splitlines() if line.strip()]
            raise WorkerFailed(lines[-1] if lines else f"exit status {code}")
        report: Record = json.loads(line)
        return report

    def ask(self) -> Record:
        """请它再做一次，等它报告。"""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        return self.receive()

    def close(self) -> None:
        """关掉它的标准输入，它就结束。"""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


def role_command(role: Any) -> list[str]:
    """以另一个角色再次运行正在运行的脚本的命令行。"""
    return [sys.executable, sys.argv[0], "--role", json.dumps(role)]


def take_turns(
    start: Callable[[str], Worker], names: Iterable[str], first: str, repeats: int, warm_up: int = 0
) -> tuple[dict[str, Record], dict[str, list[float]]]:
    """逐个启动并热身，再逐轮交替计时；没能启动的说明原因后略过。

    Args:
        start: 由名字启动一个进程。
        names: 各个实现。
        first: 第一行报告之前它在做什么，印出来。
        repeats: 计时几轮。
        warm_up: 另外先做几轮，不计。

    Returns:
        ``(各自的第一行报告, 各自每一轮的秒数)``。
    """
    workers: dict[str, Worker] = {}
    reports: dict[str, Record] = {}
    with contextlib.ExitStack() as stack:
        for name in names:  # 一次只热身一个
            print(f"  {name}: {first}", flush=True)
            worker = start(name)
            stack.callback(worker.close)
            try:
                reports[name], workers[name] = worker.receive(), worker
            except WorkerFailed as error:
                print(f"  {name}: failed: {error}", flush=True)
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for repeat in range(1 - warm_up, repeats + 1):
            for name, worker in workers.items():
                seconds[name].append(float(worker.ask()["seconds"]))
            print(f"  round {repeat} of {repeats}{' (warm-up)' * (repeat < 1)}", flush=True)
    return reports, {name: times[warm_up:] for name, times in seconds.items()}


# 环境。


def choose_device(name: str) -> str:
    """``auto`` 是有 GPU 就用。"""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def version_of(package: str) -> str | None:
    """发行包的版本；没有安装则是 ``None``。"""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed(implementations: Iterable[str], peers: Mapping[str, str]) -> list[str]:
    """去掉重复的与没有安装的，后者每个说一行怎样安装；``peers`` 是别家的实现与它的发行包。"""
    found = []
    for name in dict.fromkeys(implementations):
        if name in peers and version_of(peers[name]) is None:
            print(
                f"skipping {name}: {peers[name]} is not installed; pip install 'distillab[bench]'"
            )
        else:
            found.append(name)
    return found


def environment(device: str) -> Record:
    """结果依赖的环境：设备、线程数、torch 版本、日期。"""
    name = platform.processor()
    if device == "cuda":
        name = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return {
        "device_name": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


# 命令行与记录。


def check_least(
    parser: argparse.ArgumentParser, options: argparse.Namespace, least: Mapping[str, int]
) -> None:
    """各个数至少是 ``least`` 里的那么多，``None`` 除外；否则说明后退出。"""
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} is {value}, expected at least {smallest}")


def ratio(value: float, reference: float | None) -> float | None:
    """``value / reference``；没有测参照则是 ``None``。"""
    return None if reference is None else value / reference


def number(value: float | None, form: str, scale: float = 1.0) -> str:
    """表里的一个数；没有测的是 ``-``。"""
    return "-" if value is None else format(value / scale, form)


def save(path: Path, records: list[Record], keys: Iterable[str]) -> None:
    """并入 ``path`` 里已有的记录：``implementation`` 与 ``keys`` 都相同的换成新的。"""
    names = ["implementation", *keys]

    def key(record: Record) -> tuple[Any, ...]:
        return tuple(record.get(name) for name in names)

    kept = json.loads(path.read_text()) if path.exists() else []
    fresh = {key(record) for record in records}
    kept = [record for record in kept if key(record) not in fresh]
    path.write_text(json.dumps(kept + records, indent=1) + "\n")
