"""同样多的参数，裁短（几种选层的办法）、裁窄、两样都裁：quickstart 的教师与文字，训练前后的困惑度。

各种形状只给层数、通道与头，FFN 的宽度由参数的个数解出。每次运行是 ``runs/shape-...`` 里的一次
``distillab train quickstart --resume``：中断了再运行同一条命令，走完的不再走，没走完的接着走。

    python benchmarks/shapes.py --seeds 0 1 2 --json benchmarks/results/shapes-cpu.json
    python benchmarks/shapes.py --steps 30 --cases depth both-ffn --json shapes.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from measuring import Record, check_least, environment, save
from rich.console import Console
from rich.table import Table
from tables import SHAPES

RECIPE = "quickstart"
GROUP = {"num_heads": 6, "num_kv_heads": 2}
CASES: dict[str, dict[str, Any]] = {
    "depth": {"layers": 15},
    "depth-even": {"layers": 15, "choose": "even"},
    "depth-greedy": {"layers": 15, "choose": "greedy"},
    "width-ffn": {"layers": 30},
    "width-heads": {"layers": 30, **GROUP},
    "width-all": {"layers": 30, "hidden_size": 432, **GROUP},
    "both-ffn": {"layers": 20},
    "both-heads": {"layers": 20, **GROUP},
    "both-all": {"layers": 20, "hidden_size": 504, **GROUP},
    "both-twice": {"layers": 20},
}
"""``depth`` 定下参数的个数，另两个 ``depth-`` 只换选层的办法。``both-twice`` 走到一半时再裁一次，之
前的形状见 ``HALFWAY``。
"""
HALFWAY = {"layers": 25, "intermediate_size": 1280}
FINE = 8
"""FFN 的宽度是它的倍数。"""


def parameters(init: dict[str, Any]) -> int:
    """这样裁的学生有多少参数，不加载教师。"""
    from distillab.config.recipes import load_recipe
    from distillab.config.schema import Recipe
    from distillab.plan.hardware import find_device
    from distillab.plan.plan import plan

    values = load_recipe(RECIPE).values()
    values["student"]["init"] = {"from": "teacher", **init}
    return plan(Recipe.model_validate(values), find_device("cpu")).step.student.parameters


def solved(case: str) -> dict[str, Any]:
    """``CASES[case]``，添上使参数与 ``depth`` 最接近的 FFN 宽度。"""
    sizes = CASES[case]
    if case.startswith("depth"):
        return sizes
    none, one = (parameters({**sizes, "intermediate_size": FINE * i}) for i in (1, 2))
    units = 1 + round((parameters(CASES["depth"]) - none) / (one - none))
    return {**sizes, "intermediate_size": FINE * units}


def train(name: str, init: dict[str, Any], steps: int, seed: int) -> Path:
    """走完一次运行，返回它的目录；已经走完的立刻返回。"""
    values = {
        "name": name,
        "student.init": json.dumps({"choose": "influence", **init}),
        "train.max_steps": steps,
        "train.warmup_steps": min(20, steps // 3),
        "train.eval_interval": max(steps // 4, 1),
        "train.seed": seed,
    }
    sets = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "distillab", "train", RECIPE, "--resume", *sets]
    subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", **os.environ})
    return Path("runs", name)


def measure(case: str, steps: int, seed: int) -> Record:
    """一种形状、一个种子。"""
    name, init = f"shape-{case}-{steps}-{seed}", {"from": "teacher", **solved(case)}
    first = None
    if case == "both-twice":
        first = train(f"{name}-first", {"from": "teacher", **HALFWAY}, steps // 2, seed)
        init["from"] = str(first / "export")
    run = train(name, init, steps - steps // 2 if first else steps, seed)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    found = [summary] + ([json.loads((first / "summary.json").read_text())] if first else [])
    return {
        "implementation": case,
        "shape": init
        | ({f"first {name}": size for name, size in HALFWAY.items()} if first else {}),
        "shape_steps": steps,
        "seed": seed,
        "parameters": summary["parameters"]["student"],
        "before": found[-1]["student_before"]["perplexity"],
        "validations": {
            row["step"]: row["perplexity"] for row in rows if row["kind"] == "validation"
        },
        "after": summary["student_after"]["perplexity"],
        "kl": summary["student_after"]["kl"],
        "top1": summary["student_after"]["top1_agreement"],
        "tokens": sum(each["tokens"] for each in found),
        "seconds": sum(each["seconds"] for each in found),
        "tokens_per_second": summary["tokens_per_second"],
        **environment("cpu"),
    }


def show(records: list[Record]) -> None:
    """印成表。"""
    table = Table(*(name for name, _ in SHAPES), title="one number of parameters, several shapes")
    for record in records:
        table.add_row(*(text(record) for _, text in SHAPES))
    Console(width=max(130, Console().width)).print(table)


def main(arguments: list[str]) -> int:
    """一个种子走完各种形状，再走下一个种子。"""
    parser = argparse.ArgumentParser(description="Depth, width, or both, at equal parameters.")
    add: Any = parser.add_argument
    add("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="which shapes")
    add("--seeds", nargs="+", type=int, default=[0], help="of every shape")
    add("--steps", type=int, default=360, help="optimizer steps")
    add("--json", type=Path, metavar="FILE", help="merge the records into this file")
    options = parser.parse_args(arguments)
    check_least(parser, options, {"steps": 4})
    records = []
    for seed in options.seeds:
        for case in options.cases:
            print(f"  {case}, seed {seed}: {solved(case)}", flush=True)
            records.append(measure(case, options.steps, seed))
            if options.json:
                save(options.json, records[-1:], ["seed", "shape_steps"])
    show(records)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
