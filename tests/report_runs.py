"""手写的运行目录：报告的测试读它们，数值都看得出来处。"""

import json
import math
from pathlib import Path

INJECTION = "</script><script>window.injected = 1</script><img src=x onerror='window.injected = 1'>"


def figure(value, width=0.02):
    return {"value": value, "low": value * (1 - width), "high": value * (1 + width)}


def recipe(name, alpha=0.5, **train):
    return (
        f"name: {name}\n"
        f"description: 'tiny {INJECTION.replace(chr(39), chr(39) * 2)}'\n"
        "teacher: {path: big-model}\n"
        "student: {init: {from: teacher, layers: 2}}\n"
        "data: {source: text.jsonl, format: chat}\n"
        f"loss: {{divergence: forward_kl, alpha: {alpha}, temperature: 2.0}}\n"
        f"train: {json.dumps({'max_steps': 100} | train)}\n"
    )


def metrics(steps=100, scale=1.0, rollouts=False):
    rows = [
        {"kind": "reference", "step": 0, "model": "student_before", "perplexity": 900.0,
         "cross_entropy": math.log(900), "kl": 4.0, "top1_agreement": 0.1},
        {"kind": "reference", "step": 0, "model": "teacher", "perplexity": 18.0,
         "cross_entropy": math.log(18), "kl": 0.0, "top1_agreement": 1.0},
    ]  # fmt: skip
    for step in range(10, steps + 1, 10):
        left = scale * math.exp(-step / 40)
        row = {
            "kind": "train", "step": step, "epoch": step // 50, "tokens": 1000 * step,
            "seconds": 2.5 * step, "skipped_steps": int(step >= 30),
            "learning_rate": 1e-3 * (1 - step / 101), "loss": 1 + 5 * left,
            "divergence": 0.4 + 3 * left, "cross_entropy": 1.6 + 7 * left,
            "grad_norm": 0.5 + 2 * left, "tokens_per_second": 400.0 + step % 20,
        }  # fmt: skip
        if step == 30:  # 整个间隔都被跳过：没有损失
            for key in ("loss", "divergence", "cross_entropy", "grad_norm", "tokens_per_second"):
                del row[key]
        if rollouts:
            row |= {
                "rollout_responses": 8, "rollout_length": 20 + step / 10,
                "rollout_truncated": 0.1, "rollout_empty": 0.0, "rollout_repetition": 0.05,
                "rollout_student_entropy": 1.2 - step / 200, "rollout_teacher_logprob": -1.5,
            }  # fmt: skip
        rows.append(row)
        if step % 20 == 0:
            entropy = math.log(30) + 3 * left
            rows.append({"kind": "validation", "step": step, "tokens": 1000 * step,
                         "perplexity": math.exp(entropy), "cross_entropy": entropy,
                         "kl": 0.6 + 2 * left, "top1_agreement": 0.8 - left / 2})  # fmt: skip
    return rows


def summary(name, rows):
    last = [row for row in rows if row["kind"] == "validation"][-1]
    keep = ("perplexity", "cross_entropy", "kl", "top1_agreement")
    teacher, before = ({key: row[key] for key in keep} for row in (rows[1], rows[0]))
    return {
        "name": name, "teacher": teacher, "student_before": before,
        "student_after": {key: last[key] for key in keep},
        "tasks": {"arithmetic": {"teacher": 0.75, "student_before": 0.25, "student_after": 0.5,
                                 "gap_closed": 0.5}},
        "best_step": 100, "steps": 100, "skipped_steps": 1, "tokens": 100_000, "seconds": 250.0,
        "tokens_per_second": 400.0, "peak_memory_bytes": 3 * 2**29,
        "parameters": {"teacher": 134_500_000, "student": 81_400_000},
    }  # fmt: skip


def evaluation(after=41.5):
    def agreement(kl, top1):
        part = {"tokens": 500, "forward_kl": kl, "reverse_kl": kl + 0.2, "top1": top1, "top5": 0.9}
        return {
            "forward_kl": figure(kl), "reverse_kl": figure(kl + 0.2),
            "top1": figure(top1), "top5": figure(0.9),
            "by_position": [part | {"from": 8 * i, "to": 8 * i + 8, "forward_kl": kl + 1 / (1 + i)}
                            for i in range(6)],
            "by_frequency": [part | {"band": band, "forward_kl": kl * (i + 1) / 2}
                             for i, band in enumerate(("top 10", "top 100", "top 1000", "rest"))],
        }  # fmt: skip

    models = ("teacher", "student_before", "student_after")
    return {
        "format": 1, "name": "kd", "checkpoint": "best (step-00000100)", "seed": 0,
        "created": "2026-01-02T03:04:05Z", "bootstrap_samples": 1000, "environment": {},
        "models": {model: {"label": model, "source": model, "parameters": 1, "view": "same"}
                   for model in models},
        "texts": {"validation": {
            "sha256": "0", "sequences": 10, "tokens": 1000, "bytes": 4000,
            "models": {
                model: {"perplexity": figure(value), "cross_entropy": figure(math.log(value)),
                        "bits_per_byte": figure(math.log2(value) / 4), "items_per_second": 3.0}
                for model, value in zip(models, (18.0, 900.0, after), strict=True)
            },
            "gap_closed": figure(0.79),
        }},
        "agreement": {"validation": {"student_before": agreement(4.0, 0.1),
                                     "student_after": agreement(0.7, 0.75)}},
        "on_policy": {"student_after": {"forward_kl": figure(0.5), "reverse_kl": figure(0.4),
                                        "top1": figure(0.7), "tokens": 100, "sequences": 5}},
        "tasks": {"arithmetic": {
            "items": 40, "sha256": "0",
            "models": {
                model: {"accuracy": figure(value, 0.2), "correct": int(40 * value),
                        "items_per_second": 1.0}
                for model, value in zip(models, (0.75, 0.25, 0.6), strict=True)
            },
            "gap_closed": figure(0.7),
            "differences": [{"models": ["student_after", "student_before"],
                             "difference": figure(0.35)}],
        }},
        "lm_eval": {"tiny_choose": {
            "items": 7, "version": 1, "num_fewshot": 0,
            "models": {model: {"acc,none": figure(value), "perplexity": figure(3.0)}
                       for model, value in zip(models, (0.625, 0.25, 0.5), strict=True)},
            "differences": [{"models": ["student_after", "teacher"], "metric": "acc,none",
                             "difference": figure(-0.125)}],
        }},
        "samples": [{"prompt": f"Once {INJECTION}", "teacher": "upon a time",
                     "student_before": "xx xx", "student_after": f"upon {INJECTION}"}],
    }  # fmt: skip


def write_run(path: Path, *, alpha=0.5, scale=1.0, rollouts=False, evaluated=False) -> Path:
    """一次走完的运行。"""
    (path / "checks").mkdir(parents=True)
    rows = metrics(scale=scale, rollouts=rollouts)
    (path / "recipe.yaml").write_text(recipe(path.name, alpha))
    (path / "environment.json").write_text(
        json.dumps({"python": "3.11", "packages": {"torch": "2.13.0"}, "device": "cpu"})
    )
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "summary.json").write_text(json.dumps(summary(path.name, rows)))
    (path / "samples.jsonl").write_text(json.dumps({"prompt": "The sea", "student": " is blue"}))
    for model, right in (("teacher", 3), ("student_before", 1), ("student_after", 2)):
        (path / f"checks/arithmetic.{model}.jsonl").write_text("".join(
            json.dumps({"id": f"q{i}", "question": f"{i} + {i}?", "answer": str(2 * i),
                        "response": f"It is {2 * i if i < right else 0}.", "correct": i < right})
            + "\n" for i in range(4)
        ))  # fmt: skip
    if evaluated:
        (path / "evaluation.json").write_text(json.dumps(evaluation()))
    return path
