"""蒸馏损失从 hidden state 与 head 到值和梯度：distillab 与同类实现并排测量。

测的是 ``(hidden, weight) -> (ΣD, d hidden, d weight)`` 这一段，α = 1、T = 1：词表大而模型小时，
它是一步里最重的一段。每个实现一个进程，逐轮交替计时，取中位数；另有一个进程用 float64 给出准确
答案。被测的东西在 ``loss_head_implementations.py``。

    python benchmarks/loss_head.py --dtype float32 bfloat16 --objective forward_kl jsd
"""

from __future__ import annotations

import argparse
import json
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
from measuring import (
    Record,
    Worker,
    check_least,
    choose_device,
    environment,
    installed,
    number,
    open_channel,
    ratio,
    read_peak,
    reset_peak,
    role_command,
    save,
    send,
    synchronize,
    take_turns,
    version_of,
)
from rich.console import Console
from rich.table import Table

# 一个进程里的测量。


def extra_bytes(call: Callable[[], Any], device: str) -> int | None:
    """一次 ``call`` 的峰值内存，减去输入与返回的梯度，单位字节；峰值不能归零则返回 ``None``。"""
    before = reset_peak(device)
    if before is None:
        return None
    answer = call()
    synchronize(device)
    gradients = sum(tensor.nbytes for tensor in (answer.d_hidden, answer.d_weight))
    return int(read_peak(device) - before - gradients)


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
    channel = open_channel()
    inputs = make_inputs(cell)
    report: Record = {}
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
    send(channel, report)
    for _ in sys.stdin:
        send(channel, {"seconds": seconds_once(call, cell.device)})


# 主进程：逐格启动各实现，交替计时，汇总。


def measure(cell: Cell, implementations: list[str], repeats: int) -> list[Record]:
    """测一格，返回每个实现一条记录；没能给出结果的说明原因后略过。"""
    print(f"{cell}: float64 oracle", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        exact_path = str(Path(directory, "exact.pt"))
        subprocess.run(role_command(["oracle", "", asdict(cell), exact_path]), check=True)
        reports, seconds = take_turns(
            lambda name: Worker(["worker", name, asdict(cell), exact_path]),
            implementations,
            "first call, gradients, memory",
            repeats,
        )
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return [
        {
            "implementation": name,
            "version": implementation_version(name),
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


def implementation_version(implementation: str) -> str:
    """实现所在的发行包的版本；未安装发行包（从源码目录运行）时是 ``source``。"""
    package = PEERS.get(implementation, "torch" if implementation == "floor" else "distillab")
    return version_of(package) or "source"


def show(cell: Cell, records: list[Record]) -> None:
    """把一格的记录印成表。"""
    table = Table(title=f"{cell}, {cell.rows} rows, vocab {cell.vocab}, on {cell.device}")
    columns = ["implementation", "seconds", "/ floor", "/ distillab", "extra GiB"]
    for column in [*columns, "gradient error", "value error", "factor"]:
        left = column == "implementation"
        table.add_column(column, justify="left" if left else "right", no_wrap=True)

    for record in records:
        table.add_row(
            record["implementation"],
            number(record["seconds"], ".3f"),
            number(record["ratio_to_floor"], ".2f"),
            number(record["ratio_to_distillab"], ".2f"),
            number(record["extra_bytes"], ".2f", 2**30),
            number(record["gradient_error"], ".1e"),
            number(record.get("value_error"), ".1e"),
            number(record.get("factor"), "g"),
        )
    Console(width=max(110, Console().width)).print(table)


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
    counts = ("rows", "vocab", "student_width", "teacher_width", "repeats", "liger_chunk")
    check_least(parser, options, dict.fromkeys(counts, 1))
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
    implementations = installed(options.implementations, PEERS)
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
            device=choose_device(options.device),
            seed=options.seed,
        )
        records = measure(cell, implementations, options.repeats)
        show(cell, records)
        if options.json:
            save(options.json, records, Cell.__dataclass_fields__)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
