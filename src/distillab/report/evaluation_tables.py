"""``evaluation.json`` 印在终端上的样子：每份数据一张表，80 列放得下。"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def evaluation_tables(evaluation: Mapping[str, Any]) -> list[Table]:
    """各份数据、on-policy 与各个任务的表；方括号里是 bootstrap 95 % 区间。

    Args:
        evaluation: ``evaluation.json`` 的内容。
    """
    labels = {name: model["label"] for name, model in evaluation["models"].items()}
    agreement = evaluation["agreement"]
    tables = [
        _text(f"{name}: {data['sequences']:,} sequences, {data['tokens']:,} tokens",
              data, agreement.get(name, {}), labels)
        for name, data in evaluation["texts"].items()
    ]  # fmt: skip
    if evaluation["on_policy"]:
        tables.append(_on_policy(evaluation["on_policy"], agreement, labels))
    tables += [_task(name, task, labels) for name, task in evaluation["tasks"].items()]
    tables += [_harness(name, task, labels) for name, task in evaluation["lm_eval"].items()]
    tables[0].title = f"{evaluation['name']}, {evaluation['checkpoint']}\n{tables[0].title}"
    return tables


def _text(
    title: str, data: Mapping[str, Any], agreement: Mapping[str, Any], labels: Mapping[str, str]
) -> Table:
    table = _table(title, "perplexity", "95 %", "bits/byte", "KL", "top-1")
    for model, figures in data["models"].items():
        row = agreement.get(model) or {}
        table.add_row(
            labels[model],
            _number(_value(figures, "perplexity")),
            _interval(figures["perplexity"]),
            _fixed(_value(figures, "bits_per_byte"), ".3f"),
            _fixed(_value(row, "forward_kl"), ".3f"),
            _fixed(_value(row, "top1"), ".1%"),
        )
    return _with_gap(table, data)


def _on_policy(
    on_policy: Mapping[str, Any], agreement: Mapping[str, Any], labels: Mapping[str, str]
) -> Table:
    table = _table("KL to the teacher: on validation data, on own samples",
                   "validation", "own", "95 %", "reverse", "top-1")  # fmt: skip
    for model, figures in on_policy.items():
        forced = agreement["validation"][model]
        table.add_row(
            labels[model],
            _fixed(_value(forced, "forward_kl"), ".3f"),
            _fixed(_value(figures, "forward_kl"), ".3f"),
            _interval(figures["forward_kl"], ".3f"),
            _fixed(_value(figures, "reverse_kl"), ".3f"),
            _fixed(_value(figures, "top1"), ".1%"),
        )
    return table


def _task(name: str, task: Mapping[str, Any], labels: Mapping[str, str]) -> Table:
    table = _table(f"{name}: {task['items']:,} items", "right", "95 %", "items/s")
    for model, figures in task["models"].items():
        table.add_row(
            labels[model],
            _fixed(_value(figures, "accuracy"), ".1%"),
            _interval(figures["accuracy"], ".1%"),
            f"{figures['items_per_second']:,.1f}",
        )
    _with_gap(table, task)
    for difference in task["differences"]:
        a, b = (labels[model] for model in difference["models"])
        figure = difference["difference"]
        line = f"{a} - {b}: {figure['value']:+.1%} {_bracketed(figure, '+.1%')}"
        table.caption = f"{table.caption}\n{line}" if table.caption else line
    return table


def _harness(name: str, task: Mapping[str, Any], labels: Mapping[str, str]) -> Table:
    table = _table(f"lm-eval {name}: {task['items']:,} items, {task['num_fewshot']}-shot",
                   "metric", "value", "95 %")  # fmt: skip
    for model, metrics in task["models"].items():
        for metric, figure in metrics.items():
            table.add_row(labels[model], metric, _fixed(figure["value"], ".4g"),
                          _interval(figure, ".4g"))  # fmt: skip
    lines = [
        f"{labels[a]} - {labels[b]}: {one['metric']} {one['difference']['value']:+.3f} "
        f"{_bracketed(one['difference'], '+.3f')}".rstrip()
        for one in task["differences"]
        for a, b in [one["models"]]
    ]
    table.caption = "\n".join(lines) or None
    return table


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("model", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _with_gap(table: Table, measured: Mapping[str, Any]) -> Table:
    gap = measured["gap_closed"]
    if gap is not None:
        table.caption = f"gap closed: {gap['value']:.1%} {_bracketed(gap, '.1%')}".rstrip()
    return table


def _value(figures: Mapping[str, Any], key: str) -> float | None:
    value: float | None = figures[key]["value"] if key in figures else None
    return value


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.1f}" if value < 1e5 else f"{value:.2e}"


def _fixed(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _interval(figure: Mapping[str, float | None], form: str | None = None) -> str:
    low, high = figure["low"], figure["high"]
    if low is None or high is None:
        return "-"
    if form is None:
        return f"{_number(low)}-{_number(high)}"
    return f"{format(low, form)}-{format(high, form)}"


def _bracketed(figure: Mapping[str, float | None], form: str) -> str:
    low, high = figure["low"], figure["high"]
    return "" if low is None or high is None else f"[{format(low, form)}, {format(high, form)}]"
