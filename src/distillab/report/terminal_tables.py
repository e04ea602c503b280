"""印在终端上的表，80 列放得下：训练结束时的、``distillab evaluate`` 与 ``distillab runs`` 的。

只读运行目录里的文件，不导入 torch。
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.table import Table

from ..figures import AFTER, BEFORE, LABELS, RUN_MODELS, TEACHER
from .measures import Measure, measures
from .run_data import RunData
from .tables import costs


def checks_table(summary: Mapping[str, Any]) -> Table | None:
    """``summary.json`` 里任务的正确率与旁的文本上的困惑度，训练前后；配方里都没有就是 ``None``。"""
    tasks, texts = summary.get("tasks", {}), dict(summary.get("texts", {}))
    for name in summary.get("sources", {}):
        key = f"{name}/perplexity"
        texts |= {name: {model: summary.get(model, {}).get(key) for model in RUN_MODELS}}
    if not tasks and not texts:
        return None
    columns = ("check", "teacher", "before", "after", "gap closed")
    table = _table(f"{summary['name']}: checks", *columns, fold=False)
    for name, scores in tasks.items():
        values = (scores.get(key) for key in (*RUN_MODELS, "gap_closed"))
        table.add_row(name, *(_fixed(value, ".1%") for value in values))
    for name, scores in texts.items():
        shown = (_fixed(scores.get(model), ",.2f") for model in RUN_MODELS)
        table.add_row(f"{name} (perplexity)", *shown, "-")
    return table


def closing_table(summary: Mapping[str, Any]) -> Table:
    """``summary.json`` 里教师、训练前、训练后在验证集上的成绩，与训练的花费。"""
    columns = ("model", "parameters", "perplexity", "CE", "KL(teacher)", "top-1")
    table = _table(f"{summary['name']}: validation, in nats per token", *columns, fold=False)
    for key in RUN_MODELS:
        if (metrics := summary.get(key)) is not None:
            size = summary["parameters"]["teacher" if key == TEACHER else "student"]
            table.add_row(
                LABELS[key].short,
                f"{size / 1e6:.1f}M",
                f"{metrics['perplexity']:,.1f}",
                f"{metrics['cross_entropy']:.3f}",
                _fixed(metrics["kl"], ".3f"),
                _fixed(metrics["top1_agreement"], ".1%"),
            )
    table.caption = (
        f"{summary['tokens']:,} tokens in {summary['seconds']:,.0f} s of training\n"
        f"{summary['tokens_per_second']:,.0f} tokens/s, "
        f"peak memory {summary['peak_memory_bytes'] / 2**30:.2f} GiB"
    )
    return table


# ---------------------------------------------------------------------- distillab runs


def runs_table(runs: Sequence[RunData]) -> Table:
    """一行一次运行，新的在前：到了哪一步，困惑度与头一个任务从多少到多少，花了多少。"""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("run", "state"):
        table.add_column(column, overflow="fold")
    for column in ("perplexity", "teacher", "task", "tokens", "time", "date"):
        table.add_column(column, justify="right", overflow="fold", no_wrap=True)
    for run in sorted(runs, key=lambda run: -run.changed):
        found, cost = measures(run), costs(run)
        validation = found.get(("perplexity", "validation"))
        task = next((measure for key, measure in found.items() if key[0] == "accuracy"), None)
        table.add_row(
            run.label,
            run.state,
            _from_to(validation, _short),
            "-" if validation is None else _short(validation.value(TEACHER)),
            _from_to(task, "{:.0%}".format),
            _short(cost["tokens"]),
            "-" if cost["seconds"] is None else f"{cost['seconds'] / 60:,.0f}m",
            datetime.fromtimestamp(run.changed).strftime("%m-%d"),
        )
    return table


def _from_to(measure: Measure | None, write: Callable[[float], str]) -> str:
    if measure is None:
        return "-"
    ends = (measure.value(BEFORE), measure.value(AFTER))
    return "→".join("?" if value is None else write(value) for value in ends)


def _short(value: float | None) -> str:
    """三位有效数字上下：``18.4``、``785k``、``1.2M``。"""
    if value is None:
        return "-"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


# ---------------------------------------------------------------------- distillab evaluate


def evaluation_tables(evaluation: Mapping[str, Any]) -> list[Table]:
    """``evaluation.json`` 的各份数据、on-policy 与各个任务；方括号里是 bootstrap 95 % 区间。"""
    labels = {name: model["label"] for name, model in evaluation["models"].items()}
    agreement = evaluation["agreement"]
    tables = [
        _text(name, data, agreement.get(name, {}), labels)
        for name, data in evaluation["texts"].items()
    ]
    if evaluation["on_policy"]:
        tables.append(_on_policy(evaluation["on_policy"], agreement["validation"], labels))
    tables += [_task(name, task, labels) for name, task in evaluation["tasks"].items()]
    tables += [_harness(name, task, labels) for name, task in evaluation["lm_eval"].items()]
    tables[0].title = f"{evaluation['name']}, {evaluation['checkpoint']}\n{tables[0].title}"
    return tables


Labels = Mapping[str, str]


def _text(
    name: str, data: Mapping[str, Any], agreement: Mapping[str, Any], labels: Labels
) -> Table:
    title = f"{name}: {data['sequences']:,} sequences, {data['tokens']:,} tokens"
    table = _table(title, "model", "perplexity", "95 %", "bits/byte", "KL", "top-1")
    for model, figures in data["models"].items():
        row = agreement.get(model) or {}
        table.add_row(
            labels[model],
            _value(figures, "perplexity"),
            _interval(figures["perplexity"]),
            _value(figures, "bits_per_byte", ".3f"),
            _value(row, "forward_kl", ".3f"),
            _value(row, "top1", ".1%"),
        )
    table.caption = "\n".join(_gap(data)) or None
    return table


def _on_policy(on_policy: Mapping[str, Any], forced: Mapping[str, Any], labels: Labels) -> Table:
    title = "KL to the teacher: on validation data, on own samples"
    table = _table(title, "model", "validation", "own", "95 %", "reverse", "top-1")
    for model, figures in on_policy.items():
        table.add_row(
            labels[model],
            _value(forced[model], "forward_kl", ".3f"),
            _value(figures, "forward_kl", ".3f"),
            _interval(figures["forward_kl"], ".3f"),
            _value(figures, "reverse_kl", ".3f"),
            _value(figures, "top1", ".1%"),
        )
    return table


def _task(name: str, task: Mapping[str, Any], labels: Labels) -> Table:
    table = _table(f"{name}: {task['items']:,} items", "model", "right", "95 %", "items/s")
    for model, figures in task["models"].items():
        right, interval = _value(figures, "accuracy", ".1%"), _interval(figures["accuracy"], ".1%")
        table.add_row(labels[model], right, interval, f"{figures['items_per_second']:,.1f}")
    table.caption = "\n".join([*_gap(task), *_differences(task, labels, "+.1%")]) or None
    return table


def _harness(name: str, task: Mapping[str, Any], labels: Labels) -> Table:
    title = f"lm-eval {name}: {task['items']:,} items, {task['num_fewshot']}-shot"
    table = _table(title, "model", "metric", "value", "95 %")
    for model, metrics in task["models"].items():
        for metric, figure in metrics.items():
            value = _value(metrics, metric, ".4g")
            table.add_row(labels[model], metric, value, _interval(figure, ".4g"))
    table.caption = "\n".join(_differences(task, labels, "+.3f")) or None
    return table


def _gap(measured: Mapping[str, Any]) -> list[str]:
    gap = measured["gap_closed"]
    return [] if gap is None else [f"gap closed: {_with_interval(gap, '.1%')}"]


def _differences(task: Mapping[str, Any], labels: Labels, form: str) -> Iterator[str]:
    for one in task["differences"]:
        a, b = (labels[model] for model in one["models"])
        metric = f"{one['metric']} " if "metric" in one else ""
        yield f"{a} - {b}: {metric}{_with_interval(one['difference'], form)}"


# ---------------------------------------------------------------------- 共用


def _table(title: str, *columns: str, fold: bool = True) -> Table:
    """头一栏是文字，放不下时折行（``fold``）或截短；其余是数，不折行。"""
    table = Table(title=title, title_justify="left", caption_justify="left")
    first, *numbers = columns
    table.add_column(first, overflow="fold" if fold else "ellipsis", no_wrap=not fold)
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _value(figures: Mapping[str, Any], key: str, form: str | None = None) -> str:
    return _fixed(figures[key]["value"] if key in figures else None, form)


def _fixed(value: float | None, form: str | None) -> str:
    """没有 ``form`` 的是困惑度，可以很大。"""
    if value is None:
        return "-"
    return format(value, form or (",.1f" if value < 1e5 else ".2e"))


def _interval(figure: Mapping[str, Any], form: str | None = None) -> str:
    ends = figure["low"], figure["high"]
    return "-" if None in ends else "-".join(_fixed(end, form) for end in ends)


def _with_interval(figure: Mapping[str, Any], form: str) -> str:
    value, *ends = (_fixed(figure[key], form) for key in ("value", "low", "high"))
    return value if "-" in ends else f"{value} [{', '.join(ends)}]"
