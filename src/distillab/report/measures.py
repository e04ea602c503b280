"""报告里的每个数：是什么，从哪个文件来，怎样写成文字。"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .run_data import RunData

Kind = Literal["perplexity", "nats", "fraction", "share", "points"]
Key = tuple[str, str]
Figure = dict[str, float | None]
"""``{"value", "low", "high"}``，后两个是 95 % 区间，可以没有。"""

LABELS = {
    "teacher": "teacher",
    "teacher_without": "teacher, without experience",
    "student_before": "student before",
    "student_after": "student after",
}
"""固定的模型名，按表中的先后；评测时另外给的模型排在后面，用自己的名字。"""

AGREEMENT: dict[str, tuple[str, Kind]] = {
    "forward_kl": ("KL(teacher ‖ student)", "nats"),
    "reverse_kl": ("KL(student ‖ teacher)", "nats"),
    "top1": ("same top-1 token", "share"),
    "top5": ("teacher's top-1 in student's top-5", "share"),
}

ON_POLICY = "on-policy "

SELF_EVIDENT = {("teacher", "forward_kl"), ("teacher", "top1")}
"""教师与自己相比：0 与 100 %，不必写。"""


@dataclass
class Measure:
    """一次运行的一项成绩。

    Attributes:
        label: 表中的名字。
        kind: 单位，决定怎样写、怎样相比。
        values: ``{模型: {"value", "low", "high"}}``。
        gap: 补上了教师与训练前之间差距的几成；可以没有。
    """

    label: str
    kind: Kind
    values: dict[str, Figure]
    gap: Figure | None = None

    def value(self, model: str) -> float | None:
        """一个模型的值，不含区间；没有则为 ``None``。"""
        return self.values[model]["value"] if model in self.values else None


def measures(run: RunData) -> dict[Key, Measure]:
    """一次运行的全部成绩，任务在前。

    Args:
        run: 运行目录。

    Returns:
        ``{(哪种, 哪份数据): Measure}``；``evaluation.json`` 里有的带区间，取代训练时的同一项。
    """
    found = _trained(run) | _evaluated(run.evaluation)
    order = ("accuracy", "perplexity", *AGREEMENT, *(ON_POLICY + kind for kind in AGREEMENT),
             "lm_eval", "bits_per_byte")  # fmt: skip
    kept = {key: measure for key, measure in found.items() if measure.values}
    return dict(sorted(kept.items(), key=lambda item: order.index(item[0][0])))


def headline(runs: Sequence[RunData]) -> Key | None:
    """一页的头条：每次运行都有的一项成绩，任务先于验证集的困惑度，有训练后成绩的先于没有的。"""
    each = [measures(run) for run in runs]
    shared = [
        key for key in each[0]
        if (key[0] == "accuracy" or key == ("perplexity", "validation"))
        and all(key in found for found in each)
    ]  # fmt: skip
    done = [key for key in shared
            if all("student_after" in found[key].values for found in each)]  # fmt: skip
    return next(iter(done or shared), None)


def _trained(run: RunData) -> dict[Key, Measure]:
    """训练自己留下的：验证集的成绩，任务与文本的检查；都没有区间。"""
    found: dict[Key, Measure] = {}
    columns: tuple[tuple[str, str, str, Kind], ...] = (
        ("perplexity", "perplexity", "perplexity", "perplexity"),
        ("forward_kl", "kl", *AGREEMENT["forward_kl"]),
        ("top1", "top1_agreement", *AGREEMENT["top1"]),
    )
    for kind, column, label, unit in columns:
        scores = {model: row.get(column) for model, row in run.models.items()
                  if (model, kind) not in SELF_EVIDENT}  # fmt: skip
        found[kind, "validation"] = _measure(f"{label}, validation", unit, scores)
    entropy = {model: row.get("cross_entropy") for model, row in run.models.items()}
    found["perplexity", "validation"].gap = _gap(entropy)
    tasks: dict[str, dict[str, Any]] = {
        task: {model: sum(bool(row.get("correct")) for row in rows) / len(rows)
               for model, rows in models.items() if rows}
        for task, models in run.answers.items()
    }  # fmt: skip
    for task, scores in (tasks | run.summary.get("tasks", {})).items():
        found["accuracy", task] = _measure(f"{task}, correct", "share", scores)
        wrong = {model: 1 - measured["value"]
                 for model, measured in found["accuracy", task].values.items()
                 if measured["value"] is not None}  # fmt: skip
        found["accuracy", task].gap = _gap(wrong)
    for text, scores in (run.texts | run.summary.get("texts", {})).items():
        measure = found["perplexity", text] = _measure(f"perplexity, {text}", "perplexity", scores)
        measure.gap = _gap({model: math.log(measured["value"])
                            for model, measured in measure.values.items()
                            if measured["value"]})  # fmt: skip
    return found


def _evaluated(evaluation: dict[str, Any]) -> dict[Key, Measure]:
    """``evaluation.json`` 里的，带区间。"""
    found: dict[Key, Measure] = {}
    for task, result in evaluation.get("tasks", {}).items():
        label = f"{task}, correct of {result['items']:,}"
        found["accuracy", task] = _column(result["models"], "accuracy", label, "share")
        found["accuracy", task].gap = result.get("gap_closed")
    for task, result in evaluation.get("lm_eval", {}).items():
        for metric in dict.fromkeys(key for row in result["models"].values() for key in row):
            label = f"lm-eval {task}, {metric} of {result['items']:,}"
            found["lm_eval", f"{task} {metric}"] = _column(
                result["models"], metric, label, "fraction"
            )
    for name, result in evaluation.get("texts", {}).items():
        models = result["models"]
        found["perplexity", name] = _column(
            models, "perplexity", f"perplexity, {name}", "perplexity"
        )
        found["perplexity", name].gap = result.get("gap_closed")
        found["bits_per_byte", name] = _column(
            models, "bits_per_byte", f"bits per byte, {name}", "fraction"
        )
    agreement = {name: (f"{{}}, {name}", "", models)
                 for name, models in evaluation.get("agreement", {}).items()}  # fmt: skip
    own = evaluation.get("on_policy", {})
    agreement["own responses"] = ("{}, on the student's own responses", ON_POLICY, own)
    for name, (label, prefix, models) in agreement.items():
        students = {model: row for model, row in models.items() if model != "teacher"}
        for kind, (said, unit) in AGREEMENT.items():
            found[prefix + kind, name] = _column(students, kind, label.format(said), unit)
    return found


def _column(models: dict[str, Any], column: str, label: str, kind: Kind) -> Measure:
    """各模型的一栏；不是有限值的不写。"""
    values = {model: row[column] for model, row in models.items()
              if (row.get(column) or {}).get("value") is not None}  # fmt: skip
    return Measure(label, kind, values)


def _measure(label: str, kind: Kind, scores: dict[str, Any]) -> Measure:
    values = {model: _exact(scores[model]) for model in LABELS if scores.get(model) is not None}
    return Measure(label, kind, values)


def _exact(value: float) -> Figure:
    return {"value": value, "low": None, "high": None}


def _gap(losses: dict[str, Any]) -> Figure | None:
    """``(before - after) / (before - teacher)``，越小越好的量；教师不比学生好时没有意义。"""
    teacher, before, after = map(losses.get, ("teacher", "student_before", "student_after"))
    if teacher is None or before is None or after is None or before <= teacher:
        return None
    return _exact((before - after) / (before - teacher))


# ---------------------------------------------------------------------- 写成文字


def number(value: float | None, kind: Kind) -> str:
    """按单位写一个数；``None`` 写成短横。"""
    if value is None:
        return "–"
    if kind == "share":
        return f"{value:.1%}"
    if kind == "points":
        return f"{100 * value:+.1f}"
    if kind in ("nats", "fraction"):
        return f"{value:.3f}"
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def difference(value: float | None, reference: float | None, kind: Kind) -> str:
    """与第一次运行相比：困惑度说百分比，份额说百分点，nat 说差。"""
    if value is None or reference is None:
        return "–"
    if kind == "share":
        return f"{100 * (value - reference):+.1f} points"
    if kind in ("nats", "fraction"):
        return f"{value - reference:+.3f}"
    return f"{value / reference - 1:+.1%}" if reference else "–"


def duration(seconds: float | None) -> str:
    """秒数写成人读的样子：``538 s``、``9.0 min``、``2.3 h``；不知道的是一道短横。"""
    if seconds is None:
        return "–"
    if seconds < 600:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def memory(size: float | None) -> str:
    """字节写成 GiB。"""
    return "–" if size is None else f"{size / 2**30:.2f} GiB"
