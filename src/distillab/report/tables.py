"""报告里的表：几次运行怎样并排。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from ..figures import AFTER, BEFORE, LABELS, RUN_MODELS, TEACHER, layers_said, widths_said
from ..parsing import leaves
from .measures import difference, measures
from .run_data import RunData

CHANGES = ("learned", "lost", "still wrong", "kept", "right", "wrong")
"""训练前后的变化，按列出的先后；只答过一次的只说对错。"""


def model_name(model: str, runs: Sequence[RunData]) -> str:
    """一个模型在页面上的名字；评测时另外给的用 ``evaluation.json`` 里的。"""
    if model in LABELS:
        return LABELS[model].page
    named = [run.evaluation.get("models", {}).get(model, {}).get("label") for run in runs]
    return next((str(name) for name in reversed(named) if name), model)


def results(runs: Sequence[RunData]) -> dict[str, Any]:
    """成绩表：每项成绩一组，组内每次运行一行；列是各模型。"""
    each = [measures(run) for run in runs]
    present = {model for found in each for measure in found.values() for model in measure.values}
    columns = [model for model in LABELS if model in present] + sorted(present - LABELS.keys())
    groups: list[dict[str, Any]] = []
    for key in dict.fromkeys(key for found in each for key in found):
        first = next(found[key] for found in each if key in found)
        baseline = each[0].get(key)
        reference = baseline.value(AFTER) if baseline else None
        rows = [
            {
                "run": index,
                "cells": [found[key].values.get(model) for model in columns],
                "gap": found[key].gap,
                "against": difference(found[key].value(AFTER), reference, first.kind)
                if index
                else "",
            }
            for index, found in enumerate(each)
            if key in found
        ]
        groups.append({"label": first.label, "kind": first.kind, "rows": rows})
    return {
        "columns": [model_name(model, runs) for model in columns],
        "groups": groups,
        "gaps": any(row["gap"] for group in groups for row in group["rows"]),
    }


def costs(run: RunData) -> dict[str, Any]:
    """花了多少：走完的取自 ``summary.json``，没走完的取自最后一行指标。"""
    last = run.train[-1] if run.train else {}
    keys = ("tokens", "seconds", "skipped_steps")
    found = {key: run.summary.get(key, last.get(key)) for key in keys}
    tokens, seconds = found["tokens"], found["seconds"]
    speed = tokens / seconds if tokens is not None and seconds else None
    measured = run.evaluation.get("models", {})
    parameters = run.summary.get("parameters", {}) or {
        model: info.get("parameters") for model, info in measured.items()
    }
    return found | {
        "steps": run.summary.get("steps", last.get("step")),
        "tokens_per_second": run.summary.get("tokens_per_second", speed),
        "peak_memory_bytes": run.summary.get("peak_memory_bytes"),
        "student": parameters.get("student", parameters.get("student_after")),
        "teacher": parameters.get("teacher"),
    }


def method(run: RunData) -> list[tuple[str, str]]:
    """配方在四个选择上各选了什么。"""
    fraction = run.get("responses.student_fraction", 0)
    final = run.get("responses.final_student_fraction")
    responses = run.get("data.responses")
    said = f"written ahead: {responses}" if responses else "dataset"
    if fraction or final:
        share = f"{fraction:.0%}" + ("" if final is None else f" to {final:.0%}")
        said = f"sampled from the student in {share} of the steps, otherwise {said}"
    data = run.get("data", {})
    privileged = any(map(_privileged, (data, *data.get("mixture", []))))
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
    init = run.get("student.init")
    student = run.get("student.path") or (_shaped(init) if init else "from scratch")
    vocabulary = _vocabulary(run)
    return [
        ("responses", said),
        ("teacher view", view if teacher and alpha else "not used in training"),
        ("objective", objective),
        ("teacher", str(teacher or "none")),
        ("student", str(student) + (", LoRA" if run.get("student.lora") else "")),
        *([("vocabulary", vocabulary)] if vocabulary else []),
        *_sources(run),
        *_alignment(run),
    ]


def _sources(run: RunData) -> list[tuple[str, str]]:
    """混在一起的各来源：份额，与用了多少。"""
    mixed = run.get("data.mixture", [])
    used, total = run.summary.get("sources", {}), sum(one.get("weight", 1) for one in mixed)
    rows = []
    for one in mixed:
        said = [f"{one.get('weight', 1) / (total or 1):.1%} of the sequences"]
        views = [one.get("format", "text"), "a teacher that reads experience" * _privileged(one)]
        if found := used.get(name := str(one.get("name"))):
            said.append(f"{found['sequences']:,} of them, {found['tokens']:,} response tokens")
            said += [f"{found['epochs']:.1f} epochs"] if "epochs" in found else []
        rows.append((f"source {name}", ", ".join([*filter(None, views), *said])))
    return rows


def _privileged(data: Mapping[str, Any]) -> bool:
    return bool(data.get("teacher_source") or data.get("experience"))


def _alignment(run: RunData) -> list[tuple[str, str]]:
    """两个分词器对得有多齐：各类字节里，各种对法的份额。"""
    text = run.summary.get("alignment", {}).get("text", {})
    return [
        (
            f"tokenizers, {name}",
            ", ".join(f"{share:.1%} {kind}" for kind, share in row.items() if kind != "bytes"),
        )
        for name, row in text.items()
    ]


def _shaped(init: Mapping[str, Any]) -> str:
    """``student.init`` 的一句话。"""
    widths = [
        f"{name} {init[name]}"
        for name in ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads")
        if init.get(name)
    ]
    layers = init.get("layers") or ("all" if widths else "some")
    origin = init.get("from", TEACHER)
    of = "the teacher" if origin == TEACHER else origin
    return ", ".join([f"{layers} layers of {of}", *widths])


MOST_LAYERS = 1000
"""表里至多这么多层：文件里的数不一定可信。"""


def initial_layers(runs: Sequence[RunData]) -> dict[str, Any]:
    """学生由哪些层开始：每层一行，每次运行一列，``notes`` 说各列是怎样选的；都没有裁剪就没有行。"""
    cut = [run for run in runs if run.initial]
    columns, notes = [], []
    for run in cut:
        found = run.initial
        total, layers = int(found["total"]), set(found["layers"])
        tokens = int(found.get("tokens", 0))
        said_of = layers_said(total, found["source"], found.get("choose"), tokens)
        widths = widths_said(found["kept"]) if found.get("kept") else ""
        notes.append(f"{len(layers)} layers of {said_of}{widths and f'; {widths}'}")
        said = {layer: f"{score:.4f}" for layer, score in enumerate(found.get("scores", []))}
        losses = zip(found.get("removed", []), found.get("losses", []), strict=False)
        for turn, (layer, loss) in enumerate(losses, start=1):
            said[layer] = f"removed {turn}: {loss:.3f}"
        columns.append(
            [
                {"kept": layer in layers, "said": said.get(layer, "")}
                for layer in range(min(total, MOST_LAYERS))
            ]
        )
    return {
        "labels": [run.label for run in cut],
        "colors": [list(runs).index(run) for run in cut],
        "rows": list(zip_longest(*columns)),
        "notes": notes,
        "scored": any(run.initial.get("scores") for run in cut),
        "removed": any(run.initial.get("removed") for run in cut),
    }


def _vocabulary(run: RunData) -> str:
    """学生自己的词表：留了几个 token，教师给了其余的多少概率；没有裁剪是空串。"""
    rule = run.get("student.vocab.outside")
    if rule is None:
        return ""
    found = run.summary.get("vocabulary", {})
    said = "only the tokens that the training text uses"
    if found.get("tokens") and found.get("before"):
        said = f"{found['tokens']:,} of {found['before']:,} tokens"
    lost = run.reference.get("teacher", {}).get("outside")
    if lost is not None:
        done = "moved to first pieces" if rule == "bucket" else "renormalised"
        said += f"; {lost:.2%} of the teacher's probability outside, {done}"
    return said


def samples(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """同一个 prompt 的续写并排：教师、训练前，然后每次运行训练后的。"""
    found: dict[str, dict[str, str]] = {}
    for run in runs:
        rows = run.evaluation.get("samples") or [
            {"prompt": row.get("prompt", ""), AFTER: row.get("student")} for row in run.samples
        ]
        for row in rows:
            texts = found.setdefault(str(row["prompt"]), {})
            for model in RUN_MODELS:
                if row.get(model) is not None:
                    texts.setdefault(_beside(model, run, runs), str(row[model]))
    return [{"prompt": prompt, "texts": texts} for prompt, texts in found.items()]


EACH = 3
"""每个任务里，每种变化列出几题。"""


def answers(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """每个任务的回答并排，按第一次运行把题分成学会的、忘掉的、一直错的、一直对的。"""
    found = []
    for task, models in runs[0].answers.items():
        columns = [(runs[0], TEACHER), (runs[0], BEFORE), *((run, AFTER) for run in runs)]
        by_model = {
            _beside(model, run, runs): {row.get("id"): row for row in rows}
            for run, model in columns
            if (rows := run.answers.get(task, {}).get(model))
        }
        before, after = (
            {row.get("id"): row for row in models.get(model, [])} for model in (BEFORE, AFTER)
        )
        groups: dict[str, list[Any]] = {}
        for key, row in (before or after).items():
            groups.setdefault(_change(before.get(key), after.get(key)), []).append((key, row))
        groups = {change: groups[change] for change in CHANGES if change in groups}
        items = [
            {
                "change": change,
                "question": row.get("question"),
                "answer": row.get("answer"),
                "texts": {label: rows[key] for label, rows in by_model.items() if key in rows},
            }
            for change, rows in groups.items()
            for key, row in rows[:EACH]
        ]
        counts = {change: len(rows) for change, rows in groups.items()}
        found.append({"task": task, "counts": counts, "items": items})
    return found


def _beside(model: str, run: RunData, runs: Sequence[RunData]) -> str:
    """几次运行并排时，训练后的以运行的名字相称。"""
    return run.label if model == AFTER and len(runs) > 1 else LABELS[model].page


def _change(before: dict[str, Any] | None, after: dict[str, Any] | None) -> str:
    if before is None or after is None:
        return "right" if (before or after or {}).get("correct") else "wrong"
    if before.get("correct"):
        return "kept" if after.get("correct") else "lost"
    return "learned" if after.get("correct") else "still wrong"


def shown(value: Any) -> str:
    """配方或环境里的一个值。"""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def flat(values: dict[str, Any]) -> list[tuple[str, str]]:
    """逐级的字典摊成两列。"""
    return [(key, shown(value)) for key, value in leaves(values, empty=True)]
