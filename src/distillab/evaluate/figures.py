"""由逐个 token、逐个问题的结果得出 ``evaluation.json`` 里带区间的数字。"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .agreement import by_frequency, by_position
from .bootstrap import Figure, difference_figure, gap_figure, ratio_figure
from .scores import Scores
from .sequences import Sequences
from .subjects import AFTER, BEFORE, TEACHER, WITHOUT
from .tasks import TaskRow


class Answers(NamedTuple):
    """一个模型对一个任务的全部回答。"""

    rows: Sequence[TaskRow]
    seconds: float


def text_figures(data: Sequences, scores: Mapping[str, Scores], seed: int) -> dict[str, Any]:
    """一份数据上各个模型的困惑度与每字节的比特数。

    Args:
        data: 数据。
        scores: 模型名 → 结果。
        seed: 重抽的种子。
    """
    gap = None
    if TEACHER in scores:  # 以 nat 计：(before - after) / (before - teacher)
        nats = {name: (-scores[name].nats).tolist() for name in (TEACHER, BEFORE, AFTER)}
        gap = gap_figure(nats[TEACHER], nats[BEFORE], nats[AFTER], seed)
    return {
        "sha256": data.sha256,
        "sequences": len(data),
        "tokens": int(data.tokens.sum()),
        "bytes": int(data.bytes.sum()),
        "models": {name: one.quality(data, seed) for name, one in scores.items()},
        "gap_closed": gap,
    }


def agreement_figures(data: Sequences, scores: Mapping[str, Scores], seed: int) -> dict[str, Any]:
    """一份数据上各个模型与教师的一致程度；tokenizer 不同的为 ``None``。参数同 ``text_figures``。"""
    return {
        name: {
            **one.agreement(seed),
            "by_position": by_position(one.rows, data.positions),
            "by_frequency": by_frequency(one.rows, data.labels),
        }
        if one.data is data
        else None
        for name, one in scores.items()
        if name != TEACHER
    }


def on_policy_figures(scores: Scores, seed: int) -> dict[str, Any]:
    """一个模型在自己的样本上与教师的一致程度。"""
    figures = scores.agreement(seed)
    return {
        **{name: figures[name] for name in ("forward_kl", "reverse_kl", "top1")},
        "tokens": int(scores.data.tokens.sum()),
        "sequences": len(scores.data),
    }


def task_figures(answers: Mapping[str, Answers], seed: int) -> dict[str, Any]:
    """一个任务上各个模型的正确率，与成对的差：训练后的学生减别人，教师减不读经验的教师。

    Args:
        answers: 模型名 → 回答；每个模型回答的是同样的问题。
        seed: 重抽的种子。
    """
    correct = {name: [float(row["correct"]) for row in one.rows] for name, one in answers.items()}
    rows = next(iter(answers.values())).rows
    items = json.dumps([[row["id"], row["question"], row["answer"]] for row in rows])
    gap: Figure | None = None
    if TEACHER in correct:
        gap = gap_figure(correct[TEACHER], correct[BEFORE], correct[AFTER], seed)
    pairs = [(AFTER, name) for name in correct if name != AFTER]
    if WITHOUT in correct:
        pairs.append((TEACHER, WITHOUT))
    return {
        "items": len(rows),
        "sha256": hashlib.sha256(items.encode()).hexdigest(),
        "models": {
            name: {
                "accuracy": ratio_figure(values, [1.0] * len(values), seed),
                "correct": int(sum(values)),
                "items_per_second": round(len(values) / answers[name].seconds, 2),
            }
            for name, values in correct.items()
        },
        "gap_closed": gap,
        "differences": [
            {"models": [a, b], "difference": difference_figure(correct[a], correct[b], seed)}
            for a, b in pairs
        ],
    }


def harness_figures(found: Mapping[str, Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """lm-evaluation-harness 的任务上各个模型的指标，与训练后的学生减别人的成对的差。

    Args:
        found: 模型名 → ``evaluate_with_harness`` 的返回值；做的是同样的任务。
        seed: 重抽的种子。

    Returns:
        任务名 → ``items``、``version``、``num_fewshot``、``models``（模型名 → 指标 → ``Figure``）与
        ``differences``。不是每题平均的指标（如困惑度）没有区间，也没有差。
    """
    return {
        name: {
            **{key: task[key] for key in ("items", "version", "num_fewshot")},
            "models": {
                model: {
                    metric: _metric(metric, one["tasks"][name], seed)
                    for metric in one["tasks"][name]["metrics"]
                }
                for model, one in found.items()
            },
            "differences": [
                {
                    "models": [AFTER, model],
                    "metric": metric,
                    "difference": difference_figure(ours, one["tasks"][name]["per_item"][metric],
                                                    seed),
                }
                for model, one in found.items()
                if model != AFTER
                for metric, ours in found[AFTER]["tasks"][name]["per_item"].items()
                if _is_mean(metric, found[AFTER]["tasks"][name])
            ],
        }
        for name, task in next(iter(found.values()))["tasks"].items()
    }  # fmt: skip


def _metric(metric: str, task: Mapping[str, Any], seed: int) -> Figure:
    if _is_mean(metric, task):
        values = task["per_item"][metric]
        return ratio_figure(values, [1.0] * len(values), seed)
    return Figure(value=task["metrics"][metric], low=None, high=None)


def _is_mean(metric: str, task: Mapping[str, Any]) -> bool:
    """这个指标是不是每题的平均：它怎样合起来由任务说了算，所以拿它给的总数来核对。"""
    values = task["per_item"].get(metric)
    return bool(values) and math.isclose(
        sum(values) / len(values), task["metrics"][metric], rel_tol=1e-6, abs_tol=1e-9
    )
