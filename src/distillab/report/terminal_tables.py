"""把一次运行的结果变成给人看的表；只读运行目录里的文件，不导入 torch。"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from .measures import Measure, measures
from .run_data import RunData
from .tables import costs

if TYPE_CHECKING:
    from rich.table import Table

MODELS = {
    "teacher": "teacher",
    "student_before": "student before",
    "student_after": "student after",
}


def checks_table(summary: dict[str, Any]) -> Table | None:
    """任务的正确率与旁的文本上的困惑度，训练前后；配方里都没有就是 ``None``。

    Args:
        summary: ``summary.json`` 的内容。

    Returns:
        rich 的 ``Table``，80 列放得下。
    """
    from rich.table import Table

    tasks, texts = summary.get("tasks", {}), summary.get("texts", {})
    if not tasks and not texts:
        return None
    table = Table(title=f"{summary['name']}: checks", title_justify="left")
    for column in ("check", "teacher", "before", "after", "gap closed"):
        table.add_column(column, justify="left" if column == "check" else "right", no_wrap=True)
    for name, scores in tasks.items():
        values = [scores.get(model) for model in MODELS] + [scores.get("gap_closed")]
        table.add_row(name, *("-" if value is None else f"{value:.1%}" for value in values))
    for name, scores in texts.items():
        values = [scores.get(model) for model in MODELS]
        shown = ("-" if value is None else f"{value:,.2f}" for value in values)
        table.add_row(f"{name} (perplexity)", *shown, "-")
    return table


def closing_table(summary: dict[str, Any]) -> Table:
    """训练结束时的表：教师、训练前、训练后。

    Args:
        summary: ``summary.json`` 的内容。

    Returns:
        rich 的 ``Table``，80 列放得下。
    """
    from rich.table import Table

    table = Table(title=f"{summary['name']}: validation, in nats per token", title_justify="left")
    for column in ("model", "parameters", "perplexity", "CE", "KL(teacher)", "top-1"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for key, label in MODELS.items():
        metrics = summary.get(key)
        if metrics is None:
            continue
        kl, top1 = metrics["kl"], metrics["top1_agreement"]
        table.add_row(
            label,
            f"{summary['parameters']['teacher' if key == 'teacher' else 'student'] / 1e6:.1f}M",
            f"{metrics['perplexity']:,.1f}",
            f"{metrics['cross_entropy']:.3f}",
            "-" if kl is None else f"{kl:.3f}",
            "-" if top1 is None else f"{top1:.1%}",
        )
    table.caption_justify = "left"
    table.caption = (
        f"{summary['tokens']:,} tokens in {summary['seconds']:,.0f} s of training\n"
        f"{summary['tokens_per_second']:,.0f} tokens/s, "
        f"peak memory {summary['peak_memory_bytes'] / 2**30:.2f} GiB"
    )
    return table


def runs_table(runs: Sequence[RunData]) -> Table:
    """一行一次运行，新的在前：到了哪一步，困惑度与头一个任务从多少到多少，花了多少。

    Args:
        runs: 读好的运行目录。

    Returns:
        rich 的 ``Table``，80 列放得下。
    """
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("run", "state", "perplexity", "teacher", "task", "tokens", "time", "date"):
        words = column in ("run", "state")
        table.add_column(column, justify="left" if words else "right", overflow="fold",
                         no_wrap=column not in ("run", "state"))  # fmt: skip
    for run in sorted(runs, key=lambda run: -run.changed):
        found, cost = measures(run), costs(run)
        validation = found.get(("perplexity", "validation"))
        task = next((measure for key, measure in found.items() if key[0] == "accuracy"), None)
        table.add_row(
            run.label,
            run.state,
            _from_to(validation, _short),
            "-" if validation is None else _short(validation.value("teacher")),
            _from_to(task, "{:.0%}".format),
            _short(cost["tokens"]),
            "-" if cost["seconds"] is None else f"{cost['seconds'] / 60:,.0f}m",
            datetime.fromtimestamp(run.changed).strftime("%m-%d"),
        )  # fmt: skip
    return table


def _from_to(measure: Measure | None, write: Callable[[float], str]) -> str:
    if measure is None:
        return "-"
    ends = (measure.value("student_before"), measure.value("student_after"))
    return "→".join("?" if value is None else write(value) for value in ends)


def _short(value: float | None) -> str:
    """三位有效数字上下：``18.4``、``785k``、``1.2M``。"""
    if value is None:
        return "-"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
