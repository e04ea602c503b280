"""``gpu.py`` 里真的训练的两段：随包的配方，以及 FSDP2 与 ZeRO-3。"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from gpu_processes import in_turn
from gpu_work import Work
from measuring import Record, open_channel, send

SETTINGS: dict[str, tuple[str, ...]] = {
    "quickstart": ("data.source={text}", "data.sha256=null"),
    "experience/demo-gkd": (
        "student.path={smollm2}",
        "student.sha256=null",
        "evaluate.texts.wikipedia.source={text}",
    ),
}
"""配方 -> 把它的来源换成给的文件。"""

TINY: dict[str, tuple[str, ...]] = {
    "quickstart": (
        "student.init.layers=2", "data.max_seq_len=16", "train.max_steps=3",
        "train.warmup_steps=1", "evaluate.prompts=[]",
    ),
    "experience/demo-gkd": (),
}  # fmt: skip

ENGINES: dict[str, dict[str, str]] = {
    "single": {},
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    },
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}
"""引擎 -> Accelerate 凭以启动它的环境变量。"""

STEPS = 8
TOLERANCE = 1e-2
"""半精度里各引擎的损失与一个进程的至多差这么多，相对误差。"""


def teacher_is(work: Work) -> tuple[str, ...]:
    """把配方的教师换成 ``--smollm2`` 给的。"""
    return (f"teacher.path={work.smollm2}", "teacher.sha256=null")


def recipes(work: Work) -> None:
    """两份配方走完：训练、评测、导出；秒数从装配之前算到导出之后。"""
    names = list(SETTINGS)[: 1 if work.tiny else None]
    for name in names:
        given = [one.format(text=work.text, smollm2=work.smollm2) for one in SETTINGS[name]]
        settings = [*teacher_is(work), *given, *(TINY[name] if work.tiny else ())]
        call = partial(train, work, name, settings)
        for _, found, _ in in_turn({name: call}, work.deadline, rounds=0):
            if "failed" in found:
                work.failure(name, "", found["failed"])
            else:
                work.record(name, "", said(found), **found)


def train(work: Work, name: str, settings: list[str]) -> None:
    """在自己的进程里走完一份配方；要教师的回答的，先合成。"""
    channel = open_channel()
    os.environ |= {
        "DISTILLAB_CACHE": str(work.directory / "cache"),
        "XDG_STATE_HOME": str(work.directory / "state"),
    }
    os.chdir(work.directory)
    from distillab import run
    from distillab.config.recipes import load_recipe

    recipe, started = load_recipe(name, settings), time.perf_counter()
    if recipe.data.responses is not None:
        run.synthesize(recipe)
    synthesized = time.perf_counter()
    _, summary = run.train(recipe)
    seconds = {
        "synthesis_seconds": synthesized - started,
        "wall_seconds": time.perf_counter() - synthesized,
    }
    send(channel, summary | seconds)


def said(found: Record) -> str:
    """表里怎么说一次训练。"""
    student, teacher = found["student_after"], found["teacher"]
    parts = [
        f"{found['wall_seconds']:.0f} s in all, training {found['seconds']:.0f} s",
        f"{found['tokens_per_second']:,.0f} tokens/s",
        f"perplexity {student['perplexity']:.1f} (teacher {teacher['perplexity']:.1f})",
        f"peak {found['peak_memory_bytes'] / 2**30:.2f} GiB",
    ]
    if found["synthesis_seconds"] > 1:
        parts.insert(0, f"synthesis {found['synthesis_seconds']:.0f} s")
    for name, scores in found.get("tasks", {}).items():
        before, after, best = (
            scores[key] for key in ("student_before", "student_after", "teacher")
        )
        parts.append(f"{name} {before:.0%} -> {after:.0%} (teacher {best:.0%})")
    return "; ".join(parts)


def engines(work: Work) -> None:
    """FSDP2 与 ZeRO-3，一个进程，bf16 与 fp16；损失与没有引擎时的比。CPU 上没有 FSDP 与 fp16。"""
    from train_step_models import SHAPES, Cell

    cuda = work.device == "cuda"
    batch_size, seq_len = SHAPES["b", "tiny"]["size"]["cuda"]
    kinds: tuple[Any, ...] = ("bf16", "fp16") if cuda else ("bf16",)
    for precision in kinds:
        cell = Cell("b", "tiny", batch_size, seq_len, precision, 0.5, work.device, 0)
        here = [name for name in ENGINES if cuda or name != "fsdp2"]
        names = work.available(here, {"zero3": "deepspeed"}, precision)
        calls = {name: partial(train_on, work, name, cell) for name in names}
        found = {name: first for name, first, _ in in_turn(calls, work.deadline, rounds=0)}
        base = found["single"].get("losses", {})
        for name, first in found.items():
            if "failed" in first:
                work.failure(name, precision, first["failed"])
                continue
            losses = first["losses"]
            steps = base.keys() & losses.keys()
            worst = max((abs(losses[s] / base[s] - 1) for s in steps), default=float("nan"))
            text = f"losses of {len(losses)} steps within {worst:.1e} of one process without it"
            work.record(
                name, precision, text, "ok" if worst <= TOLERANCE else "failed",
                difference=worst, losses=losses, skipped_steps=STEPS - len(losses),
            )  # fmt: skip


def train_on(work: Work, engine: str, cell: Any) -> None:
    """在一个引擎上走几步，报告每步的损失；跳过的没有。"""
    channel = open_channel()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    if engine != "single":
        os.environ |= {
            "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
    if cell.device == "cpu":
        name = "DS_ACCELERATOR" if engine == "zero3" else "ACCELERATE_USE_CPU"
        os.environ[name] = "cpu" if engine == "zero3" else "true"
    # DeepSpeed 编译时占着的锁，被杀掉就不会还；不用使用者自己的目录
    os.environ["TORCH_EXTENSIONS_DIR"] = str(work.directory / "extensions")
    os.environ |= ENGINES[engine]
    from train_step_implementations import make_trainer

    from distillab.run_file_shapes import read_metrics

    with tempfile.TemporaryDirectory() as directory:
        trainer, _ = make_trainer(cell, directory, max_steps=STEPS, log_interval=1)
        trainer.train()
        rows = read_metrics(Path(directory, "metrics.jsonl"))
    losses = {row["step"]: row["loss"] for row in rows if row["kind"] == "train" and "loss" in row}
    send(channel, {"losses": losses})
