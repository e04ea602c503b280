"""报告里的表：每个数是什么，从哪个文件来，几次运行怎样并排。"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .report_data import RunData, leaves

Kind = Literal["perplexity", "nats", "share"]
Key = tuple[str, str]

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
    values: dict[str, dict[str, float | None]]
    gap: dict[str, float | None] | None = None

    def value(self, model: str) -> float | None:
        """一个模型的值，不含区间；没有则为 ``None``。"""
        return self.values.get(model, {}).get("value")


def measures(run: RunData) -> dict[Key, Measure]:
    """一次运行的全部成绩，任务在前。

    Args:
        run: 运行目录。

    Returns:
        ``{(哪种, 哪份数据): Measure}``；``evaluation.json`` 里有的带区间，取代训练时的同一项。
    """
    found = _trained(run) | _evaluated(run.evaluation)
    order = ("accuracy", "perplexity", *AGREEMENT, "on-policy forward_kl", "on-policy reverse_kl",
             "on-policy top1", "bits_per_byte")  # fmt: skip
    kept = {key: measure for key, measure in found.items() if measure.values}
    return dict(sorted(kept.items(), key=lambda item: order.index(item[0][0])))


def _trained(run: RunData) -> dict[Key, Measure]:
    """训练自己留下的：验证集的成绩，任务与文本的检查。"""
    found: dict[Key, Measure] = {}
    columns: tuple[tuple[str, str, str, Kind], ...] = (
        ("perplexity", "perplexity", "perplexity, validation", "perplexity"),
        ("forward_kl", "kl", f"{AGREEMENT['forward_kl'][0]}, validation", "nats"),
        ("top1", "top1_agreement", f"{AGREEMENT['top1'][0]}, validation", "share"),
    )
    for kind, column, label, unit in columns:
        values = {model: figure(row.get(column)) for model, row in run.models.items()
                  if row.get(column) is not None}  # fmt: skip
        found[kind, "validation"] = Measure(label, unit, values)
    entropy = {model: row.get("cross_entropy") for model, row in run.models.items()}
    found["perplexity", "validation"].gap = figure(_gap(*_ends(entropy)))
    tasks: dict[str, dict[str, Any]] = {
        task: {model: sum(bool(row.get("correct")) for row in rows) / len(rows)
               for model, rows in models.items() if rows}
        for task, models in run.answers.items()
    }  # fmt: skip
    for task, scores in (tasks | run.summary.get("tasks", {})).items():
        found["accuracy", task] = _measure(f"{task}, correct", "share", scores)
        found["accuracy", task].gap = figure(_gap(*_ends(scores)))
    for text, scores in (run.texts | run.summary.get("texts", {})).items():
        measure = found["perplexity", text] = _measure(f"perplexity, {text}", "perplexity", scores)
        logs = {model: math.log(value) for model, value in scores.items()
                if model in measure.values and value > 0}  # fmt: skip
        measure.gap = figure(_gap(*_ends(logs)))
    return found


def _evaluated(evaluation: dict[str, Any]) -> dict[Key, Measure]:
    """``evaluation.json`` 里的。"""
    found: dict[Key, Measure] = {}
    for task, result in evaluation.get("tasks", {}).items():
        values = {model: row["accuracy"] for model, row in result["models"].items()}
        label = f"{task}, correct of {result['items']:,}"
        found["accuracy", task] = Measure(label, "share", values, result.get("gap_closed"))
    for name, result in evaluation.get("texts", {}).items():
        for kind, label, unit in (("perplexity", "perplexity", "perplexity"),
                                  ("bits_per_byte", "bits per byte", "nats")):  # fmt: skip
            values = {model: row[kind] for model, row in result["models"].items() if row.get(kind)}
            gap = result.get("gap_closed") if kind == "perplexity" else None
            found[kind, name] = Measure(f"{label}, {name}", unit, values, gap)  # type: ignore[arg-type]
    for name, models in evaluation.get("agreement", {}).items():
        for kind, (label, unit) in AGREEMENT.items():
            values = {model: row[kind] for model, row in models.items() if row.get(kind)}
            found[kind, name] = Measure(f"{label}, {name}", unit, values)
    for kind, (label, unit) in AGREEMENT.items():
        values = {model: row[kind] for model, row in evaluation.get("on_policy", {}).items()
                  if row.get(kind)}  # fmt: skip
        if values:
            found[f"on-policy {kind}", "own responses"] = Measure(
                f"{label}, on the student's own responses", unit, values
            )
    return found


def figure(value: float | None) -> dict[str, float | None] | None:
    """没有区间的数；``None`` 仍是 ``None``。"""
    return None if value is None else {"value": value, "low": None, "high": None}


def _measure(label: str, kind: Kind, scores: dict[str, Any]) -> Measure:
    values = {model: figure(scores[model]) for model in LABELS if scores.get(model) is not None}
    return Measure(label, kind, {model: value for model, value in values.items() if value})


def _ends(scores: dict[str, Any]) -> tuple[float | None, float | None, float | None]:
    return scores.get("teacher"), scores.get("student_before"), scores.get("student_after")


def _gap(teacher: float | None, before: float | None, after: float | None) -> float | None:
    """``(before - after) / (before - teacher)``；教师与训练前没有差别时无从说起。"""
    if teacher is None or before is None or after is None or before == teacher:
        return None
    return (before - after) / (before - teacher)


# ---------------------------------------------------------------------- 写成文字


def number(value: float | None, kind: Kind) -> str:
    """按单位写一个数；``None`` 写成短横。"""
    if value is None:
        return "–"
    if kind == "share":
        return f"{value:.1%}"
    if kind == "nats":
        return f"{value:.3f}"
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def difference(value: float | None, reference: float | None, kind: Kind) -> str:
    """与第一次运行相比：困惑度说百分比，份额说百分点，nat 说差。"""
    if value is None or reference is None:
        return "–"
    if kind == "share":
        return f"{100 * (value - reference):+.1f} points"
    if kind == "nats":
        return f"{value - reference:+.3f}"
    return f"{value / reference - 1:+.1%}" if reference else "–"


def duration(seconds: float | None) -> str:
    """``538 s``、``9.0 min``、``2.3 h``。"""
    if seconds is None:
        return "–"
    if seconds < 600:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def memory(size: float | None) -> str:
    """字节写成 GiB。"""
    return "–" if size is None else f"{size / 2**30:.2f} GiB"


# ---------------------------------------------------------------------- 页面各节


def results(runs: Sequence[RunData]) -> dict[str, Any]:
    """成绩表：每项成绩一组，组内每次运行一行；列是各模型。"""
    each = [measures(run) for run in runs]
    keys = dict.fromkeys(key for found in each for key in found)
    present = {model for found in each for measure in found.values() for model in measure.values}
    named = {model: str(info.get("label", model)) for run in runs
             for model, info in run.evaluation.get("models", {}).items()}  # fmt: skip
    columns = [model for model in LABELS if model in present]
    columns += sorted(present - set(LABELS))
    groups = []
    for key in keys:
        first = next(found[key] for found in each if key in found)
        baseline = each[0].get(key)
        reference = baseline.value("student_after") if baseline else None
        groups.append({
            "label": first.label,
            "kind": first.kind,
            "rows": [
                {
                    "run": index,
                    "cells": [found[key].values.get(model) for model in columns],
                    "gap": found[key].gap,
                    "against": difference(
                        found[key].value("student_after"), reference, first.kind
                    ) if index else "",
                }
                for index, found in enumerate(each) if key in found
            ],
        })  # fmt: skip
    headers = [LABELS.get(model) or named.get(model, model) for model in columns]
    return {"columns": headers, "groups": groups, "gaps": any(
        row["gap"] for group in groups for row in group["rows"])}  # fmt: skip


def costs(run: RunData) -> dict[str, Any]:
    """花了多少：走完的取自 ``summary.json``，没走完的取自最后一行指标。"""
    last = run.train[-1] if run.train else {}
    found = {key: run.summary.get(key, last.get(key))
             for key in ("tokens", "seconds", "skipped_steps")}  # fmt: skip
    speed = run.summary.get("tokens_per_second", last.get("tokens_per_second"))
    parameters = run.summary.get("parameters", {}) or {
        model: info.get("parameters")
        for model, info in run.evaluation.get("models", {}).items()
    }  # fmt: skip
    return found | {
        "steps": run.summary.get("steps", last.get("step")),
        "tokens_per_second": speed,
        "peak_memory_bytes": run.summary.get("peak_memory_bytes"),
        "student": parameters.get("student", parameters.get("student_after")),
        "teacher": parameters.get("teacher"),
    }


def headline(runs: Sequence[RunData]) -> Key | None:
    """一页的头条：每次运行都有的一项成绩，任务先于验证集的困惑度，有训练后成绩的先于没有的。"""
    each = [measures(run) for run in runs]
    shared = [
        key for key in each[0]
        if (key[0] == "accuracy" or key == ("perplexity", "validation"))
        and all(key in found for found in each)
    ]  # fmt: skip
    done = [key for key in shared if all(found[key].value("student_after") for found in each)]
    return (done or shared or [None])[0]


def method(run: RunData) -> list[tuple[str, str]]:
    """配方在四个选择上各选了什么。"""
    fraction = run.get("responses.student_fraction", 0)
    final = run.get("responses.final_student_fraction")
    responses = run.get("data.responses")
    said = f"written ahead: {responses}" if responses else "dataset"
    if fraction or final:
        share = f"{fraction:.0%}" + ("" if final is None else f" to {final:.0%}")
        said = f"sampled from the student in {share} of the steps, otherwise {said}"
    privileged = run.get("data.teacher_source") or run.get("data.experience")
    loss, alpha = run.get("loss", {}), run.get("loss.alpha", 0)
    divergence = str(loss.get("divergence"))
    extra = [f"{key} {loss[key]:g}" for key in ("beta", "skew") if loss.get(key) is not None]
    if (temperature := loss.get("temperature")) not in (None, 1):
        extra.append(f"T {temperature:g}")
    divergence += f" ({', '.join(extra)})" if extra else ""
    objective = "cross-entropy" if alpha == 0 else divergence
    if 0 < alpha < 1:
        objective = f"{alpha:g} {divergence} + {1 - alpha:g} cross-entropy"
    teacher = run.get("teacher.path")
    view = "reads experience that the student never sees" if privileged else "same prompt"
    student = run.get("student.path") or (
        f"{run.get('student.init.layers', 'some')} layers of the teacher"
        if run.get("student.init") else "from scratch"
    )  # fmt: skip
    return [
        ("responses", said),
        ("teacher view", view if teacher and alpha else "not used in training"),
        ("objective", objective),
        ("teacher", str(teacher or "none")),
        ("student", str(student) + (", LoRA" if run.get("student.lora") else "")),
    ]


def samples(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """同一个 prompt 的续写并排：教师、训练前，然后每次运行训练后的。"""
    found: dict[str, dict[str, str]] = {}
    for run in runs:
        after = run.label if len(runs) > 1 else LABELS["student_after"]
        rows = run.evaluation.get("samples") or [
            {"prompt": row.get("prompt", ""), "student_after": row.get("student")}
            for row in run.samples
        ]
        for row in rows:
            texts = found.setdefault(str(row["prompt"]), {})
            for model in ("teacher", "student_before", "student_after"):
                if row.get(model) is not None:
                    label = after if model == "student_after" else LABELS[model]
                    texts.setdefault(label, str(row[model]))
    return [{"prompt": prompt, "texts": texts} for prompt, texts in found.items()]


EACH = 3
"""每个任务里，每种变化列出几题。"""


def answers(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """每个任务的回答并排，按第一次运行把题分成学会的、忘掉的、一直错的、一直对的。"""
    found = []
    for task, models in runs[0].answers.items():
        before = {row.get("id"): row for row in models.get("student_before", [])}
        after = {row.get("id"): row for row in models.get("student_after", [])}
        others = {LABELS["teacher"]: models.get("teacher", []), LABELS["student_before"]:
                  models.get("student_before", [])}  # fmt: skip
        for run in runs:
            label = run.label if len(runs) > 1 else LABELS["student_after"]
            others[label] = run.answers.get(task, {}).get("student_after", [])
        by_model = {label: {row.get("id"): row for row in rows}
                    for label, rows in others.items() if rows}  # fmt: skip
        groups: dict[str, list[Any]] = {}
        for key, row in (before or after).items():
            groups.setdefault(_change(before.get(key), after.get(key)), []).append((key, row))
        found.append({
            "task": task,
            "counts": {change: len(rows) for change, rows in groups.items()},
            "items": [
                {"change": change, "question": row.get("question"), "answer": row.get("answer"),
                 "texts": {label: rows[key] for label, rows in by_model.items() if key in rows}}
                for change, rows in groups.items() for key, row in rows[:EACH]
            ],
        })  # fmt: skip
    return found


def _change(before: dict[str, Any] | None, after: dict[str, Any] | None) -> str:
    if before is None or after is None:
        return "right" if (before or after or {}).get("correct") else "wrong"
    names = {(False, True): "learned", (True, False): "lost",
             (True, True): "kept", (False, False): "still wrong"}  # fmt: skip
    return names[bool(before.get("correct")), bool(after.get("correct"))]


def shown(value: Any) -> str:
    """配方或环境里的一个值。"""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def flat(values: dict[str, Any]) -> list[tuple[str, str]]:
    """逐级的字典摊成两列。"""
    return [(key, shown(value)) for key, value in leaves(values)]
