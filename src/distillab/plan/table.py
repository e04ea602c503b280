"""``Plan`` 在终端里的样子，80 列放得下；只写字，不算数。"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator

from rich.table import Table

from .hardware import GIB
from .plan import Plan

MOMENTS = {
    "sampling": "while responses are sampled",
    "teacher": "in the teacher's forward pass",
    "loss": "in the loss, all activations kept",
    "backward": "as the backward pass starts",
    "embedding": "as the backward pass ends",
}
"""各个时刻的说法。"""


def memory_table(plan: Plan) -> Table:
    """一行一个部分：峰值那一刻占多少，自己最多时占多少，是什么。"""
    parts, largest = plan.parts, plan.largest
    table = Table(title=_title(plan), title_justify="left")
    table.add_column("component", no_wrap=True)
    for name in ("at the peak", "at most"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("what")
    for name, what in _rows(plan):
        if largest.get(name):
            table.add_row(name, _gib(parts.get(name, 0)), _gib(largest[name]), what)
    table.add_section()
    table.add_row("total", _gib(plan.total), "", f"peak {MOMENTS[plan.moment]}")
    return table


def summary(plan: Plan, width: int) -> str:
    """表下面的几行：放不放得下，要多少时间，假定了什么；每行不超过 ``width`` 列。"""
    indent = " " * len("verdict: ")
    lines = [
        textwrap.fill(line, width, subsequent_indent=indent, break_on_hyphens=False)
        for line in _summary(plan)
    ]
    return "\n".join(lines)


def _summary(plan: Plan) -> Iterator[str]:
    device, total = plan.device, plan.total
    spare = device.memory - total
    have = f"{_gib(total)} of {_gib(device.memory)}"
    if plan.fits:
        yield f"verdict: fits: {have}, {spare / device.memory:.0%} to spare"
    else:
        yield f"verdict: does not fit: {have}, {_gib(-spare)} too much"
    operations = sum(plan.operations.values()) * plan.step.processes
    shares = ", ".join(
        f"{name} {count * plan.step.processes / operations:.0%}"
        for name, count in plan.operations.items()
    )
    yield (
        f"work:    {operations / 1e12:,.2f} TFLOP a step of {plan.tokens:,} tokens, "
        f"{operations / plan.tokens / 1e9:,.2f} GFLOP a token ({shares})"
    )
    rate = device.flops[plan.step.precision]
    speed = plan.tokens_per_second
    yield (
        f"time:    {speed:,.0f} tokens/s, at {device.efficiency:.0%} of {rate / 1e12:,.3g} "
        f"TFLOP/s {plan.step.precision}; {1e6 / speed / 3600:,.2g} hours per million tokens"
    )
    if plan.steps is None:
        yield "         the number of steps is not known: set train.max_steps"
    else:
        yield (
            f"         {plan.steps:,} steps, {plan.steps * plan.tokens / 1e6:,.1f} million tokens: "
            f"{_hours(plan.steps * plan.seconds)}, validation and communication not counted"
        )
    if device.kind == "cpu":
        yield "omitted: freed blocks that malloc keeps: peaks were 1.1 to 1.5 times this"
    yield f"assumed: {device.basis}"
    for note in plan.notes:
        yield f"         {note}"


def change_table(changes: Iterable[tuple[str, Plan]]) -> Table | None:
    """依次改什么，改后的总和；没有可改的是 ``None``。"""
    table = Table(title="what to change, each on top of the ones before", title_justify="left")
    table.add_column("change (KEY=VALUE after --set)", overflow="fold")
    table.add_column("total", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for text, found in changes:
        table.add_row(text, _gib(found.total), "fits" if found.fits else "")
    return table if table.row_count else None


def _title(plan: Plan) -> str:
    step, device = plan.step, plan.device
    where = device.name
    if step.processes > 1:
        where = f"each of {step.processes} {where} processes, {step.engine}"
    return f"{plan.recipe.name} on {where}: a step of {step.batch_size} x {step.seq_len} tokens"


def _rows(plan: Plan) -> Iterator[tuple[str, str]]:
    step = plan.step
    millions = f"{step.student.parameters / 1e6:,.1f}M"
    compute = " and ".join(dict.fromkeys((step.precision, "fp32")))
    zero = step.processes > 1 and step.engine in ("zero2", "zero3")
    student = f"{millions} parameters, {compute if zero else 'fp32'}"
    if step.lora_rank is not None:
        student = f"{millions} {step.base_precision}, adapters {step.trained / 1e6:.1f}M fp32"
    yield "student weights", student
    yield "optimizer", "AdamW: two fp32 moments"
    yield "gradients", "fp32"
    activations = (
        "one layer at a time" if step.checkpointing else f"{step.student.num_layers} layers"
    )
    yield "student activations", f"{activations}, {step.precision}"
    yield "autocast weights", f"the layers' weights in {step.precision}"
    if step.teacher is not None:
        size = f"{step.teacher.parameters / 1e6:,.1f}M parameters, {step.teacher_precision}"
        yield "teacher weights", size
    yield "teacher forward", "one layer at a time, no graph"
    yield "loss", f"head buffers, {step.response_rows:,} rows in chunks"
    if step.sampling is not None:
        cells = f"{step.sampling.rows} x {step.sampling.room} tokens"
        yield "sampling", f"KV cache of {cells}, weights, logits"
    buckets = step.engine in ("ddp", "zero2")
    yield "communication", "gradient buckets" if buckets else "two gathered layers and the head"
    yield "overhead", "libraries" if plan.device.kind == "cpu" else "CUDA context, fragmentation"


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB"


def _hours(seconds: float) -> str:
    return f"{seconds / 60:,.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:,.1f} h"
