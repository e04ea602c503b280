"""蒸馏损失从 hidden state 与 head 到值和梯度：distillab 与同类实现并排测量。

测的是 ``(hidden, weight) -> (ΣD, d hidden, d weight)`` 这一段，α = 1、T = 1：词表大而模型小时，
它是一步里最重的一段。每个实现一个进程，逐轮交替计时，取中位数；另有一个进程用 float64 给出准确
答案。被测的东西在 ``loss_head_implementations.py``。

    python benchmarks/loss_head.py --dtype float32 bfloat16 --objective forward_kl jsd
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
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from loss_head_implementations import (
    IMPLEMENTATIONS,
    LOSSES,
    PEERS,
    Answer,
    Cell,
    exact_answer,
    factor_to_sum,
    floor,
    make_inputs,
    relative_error,
)
from rich.console import Console
from rich.table import Table

# 一个进程里的测量。


def synchronize(device: str) -> None:
    """等 GPU 上排着的工作做完；CPU 上什么也不做。"""
    if device == "cuda":
        torch.cuda.synchronize()


def resident_high_water() -> int:
    """``/proc/self/status`` 的 VmHWM，单位字节。"""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def extra_bytes(call: Callable[[], Any], device: str) -> int | None:
    """一次 ``call`` 的峰值内存，减去输入与返回的梯度，单位字节。

    CUDA：``max_memory_allocated``。CPU：VmHWM，事先经 ``/proc/self/clear_refs`` 归零到当前 RSS；
    归零之前把 malloc 留着的空闲内存还给系统，否则块小的实现会显得不占内存。不能归零的系统返回
    ``None``。
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        answer = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return None
        before = resident_high_water()
        answer = call()
        peak = resident_high_water()
    gradients = sum(tensor.nbytes for tensor in (answer.d_hidden, answer.d_weight))
    return int(peak - before - gradients)


def seconds_once(call: Callable[[], Any], device: str) -> float:
    """一次 ``call`` 的秒数；GPU 上先空跑一次，刚轮到的进程要从低频率醒来。"""
    if device == "cuda":
        call()
    synchronize(device)
    start = time.perf_counter()
    answer = call()
    synchronize(device)
    seconds = time.perf_counter() - start
    del answer
    return seconds


def worker(implementation: str, cell: Cell, exact_path: str) -> None:
    """一个实现的进程：先核对答案、量内存，报告一行 JSON；此后标准输入每来一行就计时一次。"""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # 库打印的东西不能混进 channel
    inputs = make_inputs(cell)
    report: dict[str, Any] = {}
    call: Callable[[], Any]
    if implementation == "floor":
        call = floor(inputs)
        call()
    else:
        loss = LOSSES[implementation](cell, inputs)

        def call() -> Answer:
            value = loss()
            return Answer(value, *torch.autograd.grad(value, inputs[:2]))

        exact = Answer(*torch.load(exact_path, mmap=True))
        answer, factor = call(), factor_to_sum(implementation, cell)
        errors = [
            relative_error(got, want, factor)
            for got, want in zip(answer[1:], exact[1:], strict=True)
        ]
        report = {
            "factor": factor,
            "value": answer.value.item() * factor,
            "value_error": abs(answer.value.item() * factor / exact.value.item() - 1),
            "gradient_error": max(errors),
            "hidden_gradient_error": errors[0],
            "weight_gradient_error": errors[1],
        }
        del answer, exact
        report["extra_bytes"] = extra_bytes(call, cell.device)
    print(json.dumps(report), file=channel)
    for _ in sys.stdin:
        print(json.dumps({"seconds": seconds_once(call, cell.device)}), file=channel)


# 主进程：逐格启动各实现，交替计时，汇总。


class WorkerFailed(Exception):
    """一个实现没能给出结果；信息是它的标准错误的最后一行。"""


class Worker:
    """一个实现的子进程，一行请求换一行 JSON。"""

    def __init__(self, implementation: str, cell: Cell, exact_path: Path) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - 与子进程同寿命
        self.process = subprocess.Popen(
            command("worker", implementation, cell, exact_path),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            bufsize=1,
        )

    def receive(self) -> dict[str, Any]:
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
        report: dict[str, Any] = json.loads(line)
        return report

    def time_once(self) -> float:
        """请它计时一次，单位秒。"""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        return float(self.receive()["seconds"])

    def close(self) -> None:
        """关掉它的标准输入，它就结束。"""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


def command(role: str, implementation: str, cell: Cell, exact_path: Path) -> list[str]:
    """以另一个角色再次运行本文件的命令行。"""
    spec = json.dumps([role, implementation, asdict(cell), str(exact_path)])
    return [sys.executable, __file__, "--role", spec]


def measure(cell: Cell, implementations: list[str], repeats: int) -> list[dict[str, Any]]:
    """测一格，返回每个实现一条记录；没能给出结果的说明原因后略过。"""
    print(f"{cell}: float64 oracle", flush=True)
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        exact_path = Path(directory, "exact.pt")
        subprocess.run(command("oracle", "", cell, exact_path), check=True)
        workers: dict[str, Worker] = {}
        reports: dict[str, dict[str, Any]] = {}
        for name in implementations:  # 一次只热身一个
            print(f"  {name}: first call, gradients, memory", flush=True)
            process = Worker(name, cell, exact_path)
            stack.callback(process.close)
            try:
                reports[name], workers[name] = process.receive(), process
            except WorkerFailed as error:
                print(f"  {name}: failed: {error}", flush=True)
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for repeat in range(repeats):
            for name, process in workers.items():
                seconds[name].append(process.time_once())
            print(f"  round {repeat + 1} of {repeats}", flush=True)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return [
        {
            "implementation": name,
            "version": version_of(name),
            **asdict(cell),
            "seconds": median[name],
            "seconds_all": times,
            "ratio_to_floor": ratio(median[name], median.get("floor")),
            "ratio_to_distillab": ratio(median[name], median.get("distillab")),
            "extra_bytes": None,
            "gradient_error": None,
            **reports[name],
            **environment(cell.device),
        }
        for name, times in seconds.items()
    ]


def ratio(value: float, reference: float | None) -> float | None:
    """``value / reference``；没有测参照则是 ``None``。"""
    return None if reference is None else value / reference


def version_of(implementation: str) -> str:
    """实现所在的发行包的版本；未安装发行包（从源码目录运行）时是 ``source``。"""
    package = PEERS.get(implementation, "torch" if implementation == "floor" else "distillab")
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "source"


def environment(device: str) -> dict[str, Any]:
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


def show(cell: Cell, records: list[dict[str, Any]]) -> None:
    """把一格的记录印成表。"""
    table = Table(title=f"{cell}, {cell.rows} rows, vocab {cell.vocab}, on {cell.device}")
    columns = ["implementation", "seconds", "/ floor", "/ distillab", "extra GiB"]
    for column in [*columns, "gradient error", "value error", "factor"]:
        left = column == "implementation"
        table.add_column(column, justify="left" if left else "right", no_wrap=True)

    def cell_text(value: float | None, form: str, scale: float = 1.0) -> str:
        return "-" if value is None else format(value / scale, form)

    for record in records:
        table.add_row(
            record["implementation"],
            cell_text(record["seconds"], ".3f"),
            cell_text(record["ratio_to_floor"], ".2f"),
            cell_text(record["ratio_to_distillab"], ".2f"),
            cell_text(record["extra_bytes"], ".2f", 2**30),
            cell_text(record["gradient_error"], ".1e"),
            cell_text(record.get("value_error"), ".1e"),
            cell_text(record.get("factor"), "g"),
        )
    Console(width=max(110, Console().width)).print(table)


def save(path: Path, records: list[dict[str, Any]]) -> None:
    """并入 ``path`` 里已有的记录：同一格、同一实现的换成新的。"""
    keys = ["implementation", *Cell.__dataclass_fields__]

    def key(record: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(record.get(name) for name in keys)

    kept = json.loads(path.read_text()) if path.exists() else []
    fresh = {key(record) for record in records}
    kept = [record for record in kept if key(record) not in fresh]
    path.write_text(json.dumps(kept + records, indent=1) + "\n")


def installed(implementations: list[str]) -> list[str]:
    """去掉没有安装的，每个说一行怎样安装。"""
    found = []
    for name in implementations:
        if name in PEERS and version_of(name) == "source":
            print(
                f"skipping {name}: {PEERS[name]} is not installed; pip install 'distillab[bench]'"
            )
        else:
            found.append(name)
    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    """命令行。"""
    parser = argparse.ArgumentParser(
        description="Time, memory and gradient error of the distillation loss from hidden states.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--rows", type=int, default=1024, help="response tokens")
    add("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    add("--objective", nargs="+", choices=["forward_kl", "jsd"], default=["forward_kl"])
    add("--near", action="store_true", help="student and teacher nearly agree on every row")
    add("--vocab", type=int, default=151936, help="rows of both heads")
    add("--student-width", type=int, default=512, help="hidden size of the student")
    add("--teacher-width", type=int, default=896, help="hidden size of the teacher")
    add("--repeats", type=int, default=5, help="timed rounds; the median is reported")
    add("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS)
    add("--liger-chunk", type=int, default=128, help="rows per chunk of Liger; its default is 1024")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--seed", type=int, default=0, help="seeds the inputs")
    add("--json", type=Path, metavar="FILE", help="merge the records into this file")
    add("--role", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name in ("rows", "vocab", "student_width", "teacher_width", "repeats", "liger_chunk"):
        if getattr(options, name) < 1:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} is {getattr(options, name)}, expected at least 1")
    if options.near and options.teacher_width < options.student_width:
        parser.error(
            f"--near needs a teacher at least as wide as the student, got --teacher-width "
            f"{options.teacher_width} and --student-width {options.student_width}"
        )
    return options


def main(arguments: list[str]) -> int:
    """测 dtype 与 objective 的每一种组合；返回退出码。"""
    options = parse(arguments)
    if options.role:
        role, implementation, fields, exact_path = json.loads(options.role)
        if role == "worker":
            worker(implementation, Cell(**fields), exact_path)
        else:
            torch.save(tuple(exact_answer(Cell(**fields))), exact_path)
        return 0
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    implementations = installed(list(dict.fromkeys(options.implementations)))
    if not implementations:
        print("nothing left to measure", file=sys.stderr)
        return 2
    for dtype, objective in product(options.dtype, options.objective):
        cell = Cell(
            rows=options.rows,
            dtype=dtype,
            objective=objective,
            near=options.near,
            vocab=options.vocab,
            student_width=options.student_width,
            teacher_width=options.teacher_width,
            liger_chunk=options.liger_chunk,
            device=device,
            seed=options.seed,
        )
        records = measure(cell, implementations, options.repeats)
        show(cell, records)
        if options.json:
            save(options.json, records)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
