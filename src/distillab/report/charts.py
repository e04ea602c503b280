"""报告里的图：plotly.js 的 trace 与 layout，纯字典，不导入绘图库。

训练曲线的横轴（token、步、秒）由页面上的开关决定：trace 只带 y，``meta.axis`` 指向 ``axes`` 里它的
三列，由页面填上；同一次运行的各条曲线因而共用一份横轴，文件小得多。
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from markupsafe import escape

from ..figures import AFTER, AGREEMENT, BEFORE, LABELS, TEACHER
from .measures import Measure, measures
from .run_data import RunData

COLORS = ("#3b82f6", "#d97706", "#059669", "#8b5cf6", "#db2777", "#0891b2")
"""每次运行一种颜色，全页一致；在白底与深底上对比度都不低于 3:1。"""

TEACHER_COLOR = "#808a9a"
DASHES = ("solid", "dot", "dash")

MAX_POINTS = 1000
"""一条曲线最多这么多点，多的均匀地抽去：页面不随训练的长短无限变大。"""

Chart = dict[str, Any]


def color(index: int) -> str:
    """第 ``index`` 次运行的颜色。"""
    return COLORS[index % len(COLORS)]


def thinned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """均匀地留下至多 ``MAX_POINTS`` 行，末行总在。"""
    stride = -(-len(rows) // MAX_POINTS) or 1
    return rows[:-1][::stride] + rows[-1:]


def train_rows(run: RunData) -> list[dict[str, Any]]:
    """画训练曲线的行。"""
    return thinned(run.train)


def validation_rows(run: RunData) -> list[dict[str, Any]]:
    """画验证曲线的行：第 0 步是训练前的成绩；秒数取自同一步或之前的训练行。"""
    before = run.reference.get(BEFORE)
    rows = [{**before, "step": 0, "tokens": 0}] if before else []
    train = run.train
    steps = [row["step"] for row in train]
    for row in run.validation:
        position = bisect.bisect_right(steps, row["step"])
        seconds = train[position - 1].get("seconds") if position else 0
        rows.append(row | {"seconds": seconds})
    return thinned(rows)


def axes(runs: Sequence[RunData]) -> dict[str, dict[str, list[Any]]]:
    """每次运行两套横轴：``{"0/train": {"tokens": [...], "step": [...], "seconds": [...]}}``。"""
    found = {}
    for index, run in enumerate(runs):
        for kind, rows in (("train", train_rows(run)), ("validation", validation_rows(run))):
            found[f"{index}/{kind}"] = {
                key: [row.get(key, 0) for row in rows] for key in ("tokens", "step", "seconds")
            }
    return found


def curve_charts(runs: Sequence[RunData]) -> list[Chart]:
    """损失、困惑度、与教师的距离。"""
    loss, note = {"loss": "loss"}, ""
    if len(runs) == 1:
        loss |= {"divergence": "divergence", "cross_entropy": "cross-entropy"}
    else:
        note = "The objective of each run; runs with different objectives are not comparable."
    return [
        *_training(runs, "loss", "Training loss", loss, "nats per token", note),
        *_validation(runs, "perplexity", "Validation perplexity", "perplexity", "log scale",
                     type="log", tickformat="~s"),
        *_validation(runs, "kl", AGREEMENT["forward_kl"], "kl", "nats per token, validation"),
        *_validation(runs, "top1", f"{AGREEMENT['top1'].capitalize()} as the teacher",
                     "top1_agreement", "share of validation tokens", tickformat=".0%"),
    ]  # fmt: skip


def optimisation_charts(runs: Sequence[RunData]) -> list[Chart]:
    """学习率、梯度范数、速度、跳过的步。"""
    return [
        *_training(runs, "learning-rate", "Learning rate", {"learning_rate": ""}, tickformat="~e"),
        *_training(runs, "grad-norm", "Gradient norm", {"grad_norm": ""},
                   "mean of the interval, before clipping"),
        *_training(runs, "speed", "Speed", {"tokens_per_second": ""},
                   "tokens trained on per second"),
        *_training(runs, "skipped", "Skipped steps", {"skipped_steps": ""},
                   "steps so far whose loss or gradient was not finite", rangemode="tozero"),
    ]  # fmt: skip


def rollout_charts(runs: Sequence[RunData]) -> list[Chart]:
    """从学生采样的 response 是否还像样；没有 on-policy 的运行时为空。"""
    return [
        *_training(runs, "rollout-length", "Response length", {"rollout_length": ""},
                   "tokens, mean", rangemode="tozero"),
        *_training(runs, "rollout-shares", "Truncated, repeated, empty",
                   {"rollout_truncated": "truncated", "rollout_repetition": "repeated 4-grams",
                    "rollout_empty": "empty"},
                   "share of the sampled responses", tickformat=".0%", rangemode="tozero"),
        *_training(runs, "rollout-entropy", "Certainty on the student's own responses",
                   {"rollout_student_entropy": "student entropy",
                    "rollout_teacher_logprob": "teacher log-probability"}, "nats per token"),
    ]  # fmt: skip


def agreement_charts(runs: Sequence[RunData]) -> list[Chart]:
    """与教师的 KL 和 top-1 一致率，按 token 频率的档与在 response 里的位置。"""
    datasets = dict.fromkeys(name for run in runs for name in run.evaluation.get("agreement", {}))
    divisions = (("by_frequency", "token frequency"), ("by_position", "position"))
    columns = (
        ("forward_kl", AGREEMENT["forward_kl"], "nats per token", ""),
        ("top1", AGREEMENT["top1"].capitalize(), "share of tokens", ".0%"),
    )
    charts = []
    for name, (by, division), (kind, said, unit, form) in product(datasets, divisions, columns):
        data = [
            trace
            for index, run in enumerate(runs)
            for trace in _parts(run, index, len(runs) == 1, name, by, kind)
        ]
        key, title, unit = f"{by}-{kind}-{name}", f"{said} by {division}", f"{unit}, {name}"
        charts += _chart(key, title, unit, data, category=True, tickformat=form, rangemode="tozero")
    return charts


def task_charts(runs: Sequence[RunData]) -> list[Chart]:
    """各任务的正确率，带 95 % 区间；几次运行的教师或训练前相同时只画一次。"""
    each = [
        {key[1]: measure for key, measure in measures(run).items() if key[0] == "accuracy"}
        for run in runs
    ]
    tasks = list(dict.fromkeys(task for found in each for task in found))
    data = []
    for model in LABELS:
        drawn: dict[tuple[Any, ...], int] = {}
        for index, found in enumerate(each):
            values = tuple(found[task].value(model) if task in found else None for task in tasks)
            own = (index,) if model == AFTER else ()
            if any(value is not None for value in values):
                drawn.setdefault(values + own, index)
        for index in drawn.values():
            shared = len(drawn) == 1 and (len(runs) == 1 or model != AFTER)
            name = "" if shared else str(escape(runs[index].label))
            shade = TEACHER_COLOR if shared and len(runs) > 1 else color(index)
            data.append(_bars(each[index], model, tasks, name, shade))
    unit = "share of the items, with 95 % intervals where the run has been evaluated"
    return _chart(
        "tasks", "Correct answers", unit, data, category=True, tickformat=".0%", rangemode="tozero"
    )


def _bars(
    found: dict[str, Measure], model: str, tasks: list[str], run: str, shade: str
) -> dict[str, Any]:
    figures: list[Any] = [
        found[task].values.get(model) or {} if task in found else {} for task in tasks
    ]
    trace: dict[str, Any] = {
        "type": "bar",
        "name": ", ".join(filter(None, (LABELS[model].page, run))),
        "x": [str(escape(task)) for task in tasks],
        "y": [figure.get("value") for figure in figures],
        "marker": {
            "color": TEACHER_COLOR if model.startswith("teacher") else shade,
            "opacity": 1 if model in (TEACHER, AFTER) else 0.45,
        },
        "hovertemplate": "%{y:.1%}<extra>%{fullData.name}</extra>",
    }
    if any(figure.get("low") is not None for figure in figures):
        above, below = (
            [None if one.get(end) is None else abs(one[end] - one["value"]) for one in figures]
            for end in ("high", "low")
        )
        trace["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": above,
            "arrayminus": below,
            "thickness": 1.2,
            "width": 4,
        }
    return trace


def _parts(
    run: RunData, index: int, single: bool, data: str, by: str, kind: str
) -> list[dict[str, Any]]:
    """一次运行在一种划分上的 trace：训练前淡，训练后浓。"""
    models = run.evaluation.get("agreement", {}).get(data, {})
    traces = []
    for model, when in ((BEFORE, "before"), (AFTER, "after")):
        parts = models.get(model, {}).get(by)
        if not parts:
            continue
        labels = [part.get("band") or f"{part['from']}–{part['to']}" for part in parts]
        trace: dict[str, Any] = {
            "name": LABELS[model].page if single else f"{escape(run.label)}, {when}",
            "x": [str(escape(label)) for label in labels],
            "y": [part.get(kind) for part in parts],
            "customdata": [part.get("tokens") for part in parts],
            "hovertemplate": "%{y:.4~g} (%{customdata:,} tokens)<extra>%{fullData.name}</extra>",
            "opacity": 0.45 if model == BEFORE else 1,
        }
        if by == "by_frequency":
            trace |= {"type": "bar", "marker": {"color": color(index)}}
        else:
            trace |= {"type": "scatter", "mode": "lines+markers", "line": {"color": color(index)}}
        traces.append(trace)
    return traces


def _training(
    runs: Sequence[RunData],
    key: str,
    title: str,
    columns: Mapping[str, str],
    unit: str = "",
    note: str = "",
    **y: Any,
) -> list[Chart]:
    """由训练的各行画出；一次运行一种颜色，一列一种线型。"""
    data = []
    for index, run in enumerate(runs):
        rows = train_rows(run)
        for (column, name), dash in zip(columns.items(), DASHES, strict=False):
            values = [row.get(column) for row in rows]
            if any(values):  # 不计算的一项全是 0
                names = [str(escape(run.label))] * (len(runs) > 1) + [name] * (len(columns) > 1)
                label = ", ".join(names) or title.lower()
                data.append(_line(f"{index}/train", values, label, color(index), dash))
    return _chart(key, title, unit, data, note, **y)


def _validation(
    runs: Sequence[RunData], key: str, title: str, column: str, unit: str, **y: Any
) -> list[Chart]:
    """由验证的各行画出，教师是一条虚线；几次运行的教师相同时只画一条。"""
    data = []
    longest: dict[float, tuple[int, str]] = {}
    for index, run in enumerate(runs):
        rows = validation_rows(run)
        values = [row.get(column) for row in rows]
        if all(value is None for value in values):
            continue
        name = "student" if len(runs) == 1 else str(escape(run.label))
        data.append(_line(f"{index}/validation", values, name, color(index), markers=True))
        teacher = run.models.get(TEACHER, {}).get(column)
        if teacher is not None and column == "perplexity":
            drawn = rows[-1]["tokens"], f"{index}/validation"
            longest[teacher] = max(longest.get(teacher, (0, "")), drawn)
    for value, (_, axis) in longest.items():
        count = len(validation_rows(runs[int(axis.split("/")[0])]))
        data.append(_line(axis, [value] * count, "teacher", TEACHER_COLOR, "dash"))
    return _chart(key, title, unit, data, **y)


def _line(
    axis: str, values: list[Any], name: str, shade: str, dash: str = "solid", markers: bool = False
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers" if markers or len(values) == 1 else "lines",
        "name": name,
        "y": values,
        "meta": {"axis": axis},
        "line": {"color": shade, "dash": dash, "width": 2 if dash == "solid" else 1.5},
        "marker": {"size": 6},
        "hovertemplate": "%{y:.5~g}<extra>%{fullData.name}</extra>",
    }


def _chart(
    key: str,
    title: str,
    unit: str,
    data: list[dict[str, Any]],
    note: str = "",
    category: bool = False,
    **y: Any,
) -> list[Chart]:
    """没有东西可画，就没有这张图；``y`` 是纵轴的 layout。"""
    if not data:
        return []
    layout = {
        "yaxis": {"type": "-", "tickformat": "", "automargin": True, **y},
        "xaxis": {"type": "category"} if category else {"rangemode": "tozero"},
        "barmode": "group",
        "bargap": 0.35,
        "showlegend": len(data) > 1,
    }
    return [{"key": key, "title": title, "unit": unit, "note": note, "data": data,
             "layout": layout, "training": not category}]  # fmt: skip
