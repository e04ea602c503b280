"""蒸馏的一整步，从教师前向到参数更新：distillab 的训练循环与同类并排测量。

同样的模型、同一批 token、在线的完整分布、forward KL、T = 1。每个实现算的是：

* ``distillab``：``alpha * KL + (1 - alpha) * CE``，``DistillationTrainer._step``；
* ``distillab-compiled``：同上，``train.compile: true``；
* ``trl``：只有 ``KL``，``GKDTrainer``，``lmbda=0``，关掉激活重算，与其余的一样；
* ``trl-defaults``：同上，但按 ``GKDConfig`` 的缺省重算激活；
* ``liger``：与 ``distillab`` 相同，``transformers.Trainer`` 加 Liger 的损失与（GPU 上）内核；
* ``plain``：与 ``distillab`` 相同，一个手写的循环，两份完整的 logits。

每个实现一个进程，热身之后逐轮交替计时，取中位数。被测的东西在 ``train_step_implementations.py``。

    python benchmarks/train_step.py --case a --json out.json
    python benchmarks/train_step.py --case b --implementations distillab plain --profile
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

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
    save,
    take_turns,
    version_of,
)
from rich.console import Console
from rich.table import Table
from train_step_clock import Clock
from train_step_implementations import (
    IMPLEMENTATIONS,
    LOOPS,
    PEERS,
    STAGES,
    factor_to_mean,
)
from train_step_models import SHAPES, Cell

TOLERANCE = 1e-3
"""fp32 时第一步的损失与散度至多差这么多，相对误差；少除或多除一个位置差 ``1 / T``，会被发现。"""

LIBRARIES = ["distillab", "torch", "transformers", "accelerate", "trl"]


def start(implementation: str, cell: Cell, profiling: bool = False) -> Worker:
    """一个实现的子进程。"""
    return Worker([implementation, asdict(cell), profiling], hide_gpu=cell.device == "cpu")


def measure(cell: Cell, implementations: list[str], repeats: int) -> list[Record]:
    """每个实现一条记录；没能给出结果的说明原因后略过。"""
    print(cell, flush=True)
    reports, seconds = take_turns(
        lambda name: start(name, cell),
        implementations,
        "first steps, losses, memory",
        repeats,
        warm_up=1,
    )
    median = {name: statistics.median(times) for name, times in seconds.items()}
    fastest = min((median[name] for name in median if name in PEERS), default=None)
    return [
        {
            "implementation": name,
            **asdict(cell),
            "seconds": median[name],
            "seconds_all": times,
            "trained_tokens": cell.trained_tokens,
            "tokens_per_second": cell.trained_tokens / median[name],
            "ratio_to_fastest_peer": ratio(median[name], fastest),
            **reports[name],
            "loss_factor": factor_to_mean(name),
            "versions": versions(),
            **environment(cell.device),
        }
        for name, times in seconds.items()
    ]


def profile(cell: Cell, repeats: int) -> dict[str, float]:
    """``distillab`` 一步里各段的秒数，各取中位数；另一个进程，因为每段前后的等待会拖慢 GPU。"""
    print("  distillab: profile", flush=True)
    with contextlib.closing(start("distillab", cell, profiling=True)) as worker:
        worker.receive()
        rounds = [worker.ask() for _ in range(repeats + 1)][1:]
    stages = {
        stage: statistics.median(one["stages"].get(stage, 0.0) for one in rounds)
        for stage in STAGES
    }
    return {**stages, "step": statistics.median(one["seconds"] for one in rounds)}


def disagreements(records: list[Record]) -> list[str]:
    """与 ``distillab`` 算同一个量、第一步却不同的，每个一句话。

    ``trl`` 只有散度，``liger`` 只说得出总和。
    """
    by_name = {record["implementation"]: record for record in records}
    own = by_name.pop("distillab", None)
    found: list[str] = []
    if own is None:
        return found
    for name, record in by_name.items():
        only = {"trl": ["divergence"], "trl-defaults": ["divergence"], "liger": ["loss"]}
        for quantity in only.get(name, ["divergence", "loss"]):
            got, want = record[quantity] * record["loss_factor"], own[quantity]
            if not abs(got - want) <= TOLERANCE * abs(want):
                found.append(f"first {quantity} of {name} is {got:.6g}, of distillab {want:.6g}")
    return found


def versions() -> dict[str, str]:
    """结果依赖的各个库的版本，只列装了的。"""
    found = {library: version_of(library) for library in LIBRARIES}
    return {library: version for library, version in found.items() if version is not None}


def show(cell: Cell, records: list[Record]) -> None:
    """把记录印成表；测了 ``--profile`` 就再印一张。"""
    table = Table(title=f"one optimizer step, {cell}, on {cell.device}")
    columns = ["seconds", "tokens/s", "/ fastest peer", "extra GiB", "peak GiB"]
    table.add_column("implementation", no_wrap=True)
    for column in [*columns, "first loss", "first KL", "factor"]:
        table.add_column(column, justify="right", no_wrap=True)

    for record in records:
        table.add_row(
            record["implementation"],
            number(record["seconds"], ".4f"),
            number(record["tokens_per_second"], ".0f"),
            number(record["ratio_to_fastest_peer"], ".2f"),
            number(record["extra_bytes"], ".2f", 2**30),
            number(record["peak_bytes"], ".2f", 2**30),
            number(record["loss"], ".5f"),
            number(record["divergence"], ".5f"),
            number(record["loss_factor"], "g"),
        )
    console = Console(width=max(120, Console().width))
    console.print(table)
    for stages in (record["profile"] for record in records if "profile" in record):
        table = Table(title=f"where the step of distillab goes, {cell}, on {cell.device}")
        table.add_column("stage")
        table.add_column("seconds", justify="right")
        table.add_column("share", justify="right")
        for stage, value in stages.items():
            table.add_row(stage, f"{value:.4f}", f"{value / stages['step']:.1%}")
        console.print(table)


def parse(arguments: list[str]) -> argparse.Namespace:
    """命令行。"""
    parser = argparse.ArgumentParser(
        description="Time and memory of one whole step of online logit distillation.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    case_help = "a: SmolLM2-135M shapes to half its layers; b: Qwen2.5-0.5B shapes to 123M"
    add("--case", choices=["a", "b"], required="--role" not in arguments, help=case_help)
    add("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS)
    add("--batch-size", type=int, help="sequences per step; the case has its own")
    add("--seq-len", type=int, help="tokens per sequence; the case has its own")
    add("--precision", choices=["fp32", "bf16"], help="default: bf16 on cuda, else fp32")
    add("--alpha", type=float, default=0.5, help="share of the divergence; TRL has no other part")
    add("--repeats", type=int, default=5, help="timed rounds; the median is reported")
    add("--profile", action="store_true", help="also split the step of distillab into stages")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--seed", type=int, default=0, help="seeds the weights and the tokens")
    add("--scale", choices=["full", "tiny"], default="full", help="tiny: only to try the script")
    add("--json", type=Path, metavar="FILE", help="merge the records into this file")
    add("--role", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    check_least(parser, options, {"batch_size": 1, "seq_len": 2, "repeats": 1})
    if not 0 <= options.alpha <= 1:
        parser.error(f"--alpha is {options.alpha:g}, expected 0 to 1")
    return options


def worker(implementation: str, cell: Cell, profiling: bool = False) -> None:
    """一个实现的进程：它自己的循环，每步由 ``Clock`` 定怎样量。"""
    LOOPS[implementation](cell, Clock(cell.device, open_channel(), profiling))


def main(arguments: list[str]) -> int:
    """测一格；返回退出码。"""
    options = parse(arguments)
    if options.role:
        implementation, fields, profiling = json.loads(options.role)
        worker(implementation, Cell(**fields), profiling)
        return 0
    device = choose_device(options.device)
    implementations = installed(options.implementations, PEERS)
    if not implementations:
        print("nothing left to measure", file=sys.stderr)
        return 2
    batch_size, seq_len = SHAPES[options.case, options.scale]["size"][device]
    cell = Cell(
        case=options.case,
        scale=options.scale,
        batch_size=options.batch_size or batch_size,
        seq_len=options.seq_len or seq_len,
        precision=options.precision or ("bf16" if device == "cuda" else "fp32"),
        alpha=options.alpha,
        device=device,
        seed=options.seed,
    )
    records = measure(cell, implementations, options.repeats)
    for record in records:
        if options.profile and record["implementation"] == "distillab":
            record["profile"] = profile(cell, options.repeats)
    show(cell, records)
    if cell.precision == "fp32":
        for line in disagreements(records):
            print(f"warning: {line}")
    if options.json:
        save(options.json, records, Cell.__dataclass_fields__)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
