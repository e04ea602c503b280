"""由逐个 token、逐个问题的结果得出 ``evaluation.json`` 里带区间的数字。"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from ..figures import AFTER, TEACHER, WITHOUT, exact, gap_closed
from .agreement import by_frequency, by_position
from .bootstrap import difference_figure, mean_figure, ratio_figure
from .scores import Scores
from .sequences import Sequences
from .tasks import TaskRow


class Answers(NamedTuple):
    """一个模型对一个任务的全部回答。"""

    rows: Sequence[TaskRow]
    seconds: float


def text_figures(data: Sequences, scores: Mapping[str, Scores], seed: int) -> dict[str, Any]:
    """一份数据上各个模型的困惑度与每字节的比特数；``scores`` 是模型名 → 结果。"""
    nats = {name: (-one.nats).tolist() for name, one in scores.items()}
    return {
        "sha256": data.sha256,
        "sequences": len(data),
        "tokens": int(data.tokens.sum()),
        "bytes": int(data.bytes.sum()),
        "models": {name: one.quality(data, seed) for name, one in scores.items()},
        "gap_closed": gap_closed(nats, partial(ratio_figure, seed=seed)),
    }


def agreement_figures(data: Sequences, scores: Mapping[str, Scores], seed: int) -> dict[str, Any]:
    """一份数据上各个模型与教师的一致程度；tokenizer 不同的为 ``None``。"""
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
    """一个任务上各个模型的正确率，与成对的差：训练后的学生减别人，教师减不读经验的教师。"""
    correct = {name: [float(row["correct"]) for row in one.rows] for name, one in answers.items()}
    rows = next(iter(answers.values())).rows
    items = json.dumps([[row["id"], row["question"], row["answer"]] for row in rows])
    pairs = [(AFTER, name) for name in correct if name != AFTER]
    if WITHOUT in correct:
        pairs.append((TEACHER, WITHOUT))
    return {
        "items": len(rows),
        "sha256": hashlib.sha256(items.encode()).hexdigest(),
        "models": {
            name: {
                "accuracy": mean_figure(values, seed),
                "correct": int(sum(values)),
                "items_per_second": round(len(values) / answers[name].seconds, 2),
            }
            for name, values in correct.items()
        },
        "gap_closed": gap_closed(correct, partial(ratio_figure, seed=seed)),
        "differences": [
            {"models": [a, b], "difference": difference_figure(correct[a], correct[b], seed)}
            for a, b in pairs
        ],
    }


def harness_figures(found: Mapping[str, Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """lm-evaluation-harness 的任务上各个模型的指标，与训练后的学生减别人的成对的差；``found`` 是模
    型名 → ``evaluate_with_harness`` 的返回值。不是每题平均的指标（如困惑度）没有区间，也没有差。
    """
    return {name: _harness_task(name, found, seed) for name in next(iter(found.values()))["tasks"]}


def _harness_task(name: str, found: Mapping[str, Any], seed: int) -> dict[str, Any]:
    tasks = {model: one["tasks"][name] for model, one in found.items()}
    ours, first = tasks[AFTER], next(iter(tasks.values()))
    return {
        **{key: first[key] for key in ("items", "version", "num_fewshot")},
        "models": {
            model: {
                metric: mean_figure(task["per_item"][metric], seed)
                if _is_mean(metric, task)
                else exact(value)
                for metric, value in task["metrics"].items()
            }
            for model, task in tasks.items()
        },
        "differences": [
            {
                "models": [AFTER, model],
                "metric": metric,
                "difference": difference_figure(values, task["per_item"][metric], seed),
            }
            for model, task in tasks.items()
            if model != AFTER
            for metric, values in ours["per_item"].items()
            if _is_mean(metric, ours)
        ],
    }


def _is_mean(metric: str, task: Mapping[str, Any]) -> bool:
    """这个指标是不是每题的平均：它怎样合起来由任务说了算，所以拿它给的总数来核对。"""
    values = task["per_item"].get(metric)
    return bool(values) and math.isclose(
        sum(values) / len(values), task["metrics"][metric], rel_tol=1e-6, abs_tol=1e-9
    )
