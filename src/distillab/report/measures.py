"""报告里的每个数：是什么，从哪个文件来，怎样写成文字。"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..figures import AFTER, AGREEMENT, LABELS, TEACHER, Figure, exact, gap_closed
from .run_data import RunData

Kind = Literal["perplexity", "nats", "fraction", "share", "points"]
"""单位，决定怎样写、怎样相比。"""

Key = tuple[str, str]
Scores = Mapping[str, Any]

ON_POLICY = "on-policy "

KINDS: dict[str, Kind] = {name: "nats" if "kl" in name else "share" for name in AGREEMENT}


@dataclass
class Measure:
    """一次运行的一项成绩：表中的名字，单位，各模型的值；``gap`` 是补上了差距的几成，可以没有。"""

    label: str
    kind: Kind
    values: dict[str, Figure]
    gap: Figure | None = None

    def value(self, model: str) -> float | None:
        """一个模型的值，不含区间；没有则为 ``None``。"""
        return self.values[model]["value"] if model in self.values else None


def measures(run: RunData) -> dict[Key, Measure]:
    """一次运行的全部成绩，``{(哪种, 哪份数据): Measure}``，任务在前；``evaluation.json`` 里的取代训
    练时的。
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
        key
        for key in each[0]
        if (key[0] == "accuracy" or key == ("perplexity", "validation"))
        and all(key in found for found in each)
    ]
    done = [key for key in shared if all(AFTER in found[key].values for found in each)]
    return next(iter(done or shared), None)


def _trained(run: RunData) -> dict[Key, Measure]:
    """训练自己留下的：验证集的成绩，任务与文本的检查；都没有区间。"""
    found: dict[Key, Measure] = {}
    models = run.models
    entropy = {model: row.get("cross_entropy") for model, row in models.items()}
    scores = {model: row.get("perplexity") for model, row in models.items()}
    found["perplexity", "validation"] = _exact(
        "perplexity, validation", "perplexity", scores, entropy
    )
    for kind, column in (("forward_kl", "kl"), ("top1", "top1_agreement")):
        # 教师与自己相比：0 与 100 %，不必写。
        scores = {model: row.get(column) for model, row in models.items() if model != TEACHER}
        label = f"{AGREEMENT[kind]}, validation"
        found[kind, "validation"] = _exact(label, KINDS[kind], scores)
    scores = {model: row.get("bits_per_byte") for model, row in models.items()}
    found["bits_per_byte", "validation"] = _exact("bits per byte, validation", "fraction", scores)
    names = dict.fromkeys(key.partition("/")[0] for row in models.values() for key in row
                          if key.endswith("/perplexity"))  # fmt: skip
    for name in names:
        scores, entropy = (
            {model: row.get(f"{name}/{key}") for model, row in models.items()}
            for key in ("perplexity", "cross_entropy")
        )
        label = f"perplexity, validation of {name}"
        found["perplexity", f"validation of {name}"] = _exact(label, "perplexity", scores, entropy)
    answered = {
        task: {
            model: sum(bool(row.get("correct")) for row in rows) / len(rows)
            for model, rows in by_model.items()
            if rows
        }
        for task, by_model in run.answers.items()
    }
    for task, scores in (answered | run.summary.get("tasks", {})).items():
        wrong = {model: None if share is None else 1 - share for model, share in scores.items()}
        found["accuracy", task] = _exact(f"{task}, correct", "share", scores, wrong)
    for text, scores in (run.texts | run.summary.get("texts", {})).items():
        nats = {model: math.log(value) for model, value in scores.items() if value}
        found["perplexity", text] = _exact(f"perplexity, {text}", "perplexity", scores, nats)
    return found


def _evaluated(evaluation: Mapping[str, Any]) -> dict[Key, Measure]:
    """``evaluation.json`` 里的，带区间。"""
    found: dict[Key, Measure] = {}
    for task, result in evaluation.get("tasks", {}).items():
        label = f"{task}, correct of {result['items']:,}"
        found["accuracy", task] = _column(result, "accuracy", label, "share")
    for task, result in evaluation.get("lm_eval", {}).items():
        for metric in dict.fromkeys(key for row in result["models"].values() for key in row):
            label = f"lm-eval {task}, {metric} of {result['items']:,}"
            found["lm_eval", f"{task} {metric}"] = _column(result, metric, label, "fraction")
    for name, result in evaluation.get("texts", {}).items():
        label = f"perplexity, {name}"
        found["perplexity", name] = _column(result, "perplexity", label, "perplexity")
        bits = {"models": result["models"]}
        label = f"bits per byte, {name}"
        found["bits_per_byte", name] = _column(bits, "bits_per_byte", label, "fraction")
    agreement = [("", name, name, row) for name, row in evaluation.get("agreement", {}).items()]
    own = evaluation.get("on_policy", {})
    agreement.append((ON_POLICY, "own responses", "on the student's own responses", own))
    for prefix, name, data, models in agreement:
        students = {model: row for model, row in models.items() if model != TEACHER}
        for kind, said in AGREEMENT.items():
            found[prefix + kind, name] = _column(
                {"models": students}, kind, f"{said}, {data}", KINDS[kind]
            )
    return found


def _column(result: Mapping[str, Any], column: str, label: str, kind: Kind) -> Measure:
    """各模型的一栏；不是有限值的不写。"""
    values = {
        model: row[column]
        for model, row in result["models"].items()
        if row and (row.get(column) or {}).get("value") is not None
    }
    return Measure(label, kind, values, result.get("gap_closed"))


def _exact(label: str, kind: Kind, scores: Scores, losses: Scores | None = None) -> Measure:
    """没有区间的一项；``losses`` 是同一项以越小越好的量来说，差距由它们得出。"""
    values = {model: exact(scores[model]) for model in LABELS if scores.get(model) is not None}
    known = {model: [-loss] for model, loss in (losses or {}).items() if loss is not None}
    return Measure(label, kind, values, gap_closed(known))


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
