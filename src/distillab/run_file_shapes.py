"""运行目录里的文件该是什么样子：报告先照此查一遍，坏的文件是一行，不是后面某处的 traceback。"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import DistillabError, shown
from .figures import AFTER, BEFORE, RUN_MODELS, TEACHER
from .parsing import parse_json

NUMBER, TEXT, FLAG = "a number", "text", "true or false"
_TYPES: dict[str, tuple[type, ...]] = {NUMBER: (int, float), TEXT: (str,), FLAG: (bool,)}

Shape = Any
"""``NUMBER`` 等；``[形状]`` 是列表；``{键: 形状}`` 是对象，``"*"`` 是其余的键，没有写到的不问。

键尾的 ``!`` 是必有，``?`` 是必有而可以是 null；别的可以没有，其中的值、区间与换了 tokenizer 的模型
的一致程度也可以是 null。
"""

_ROW = {"by_position": [{"from!": NUMBER, "to!": NUMBER, "*": NUMBER}],
        "by_frequency": [{"band!": TEXT, "*": NUMBER}]}  # fmt: skip
_FIGURE = {"value?": NUMBER, "low?": NUMBER, "high?": NUMBER}
_DIFFERENCES = [{"models!": [TEXT], "metric": TEXT, "difference!": _FIGURE}]
_SCORES = {"*": NUMBER}
_AGREES = {**_ROW, "tokens": NUMBER, "sequences": NUMBER, "*": _FIGURE}
_AGREEMENT = {"*": _AGREES}
_MODELS = {
    "*": dict.fromkeys(("perplexity", "cross_entropy", "bits_per_byte", "accuracy"), _FIGURE)
}
_MEASURED = {"models!": _MODELS, "gap_closed": _FIGURE, "tokens": NUMBER, "sequences": NUMBER,
             "bytes": NUMBER}  # fmt: skip
_TASK = {**_MEASURED, "items!": NUMBER, "differences": _DIFFERENCES}
_LM_EVAL = {**_TASK, "models!": {"*": {"items_per_second": NUMBER, "*": _FIGURE}}}

_SOURCE = dict.fromkeys(("source", "responses", "teacher_source", "experience"), TEXT)
RECIPE: Shape = {
    "name": TEXT,
    "description": TEXT,
    "teacher": {"path": TEXT},
    "student": {"path": TEXT, "vocab": {"outside": TEXT}, "init": {
        "from": TEXT, "layers": NUMBER, "hidden_size": NUMBER, "intermediate_size": NUMBER,
        "num_heads": NUMBER, "num_kv_heads": NUMBER,
    }},
    "data": {**_SOURCE, "mixture": [{**_SOURCE, "name": TEXT, "format": TEXT, "weight": NUMBER}]},
    "responses": {"student_fraction": NUMBER, "final_student_fraction": NUMBER},
    "loss": {"divergence": TEXT, "alpha": NUMBER, "temperature": NUMBER, "beta": NUMBER,
             "skew": NUMBER},
    "train": {"max_steps": NUMBER, "num_epochs": NUMBER},
}  # fmt: skip
METRICS_ROW: Shape = {"kind!": TEXT, "step!": NUMBER, "model": TEXT, "*": NUMBER}
SUMMARY: Shape = {
    **dict.fromkeys(RUN_MODELS, _SCORES),
    "tasks": {"*": _SCORES},
    "texts": {"*": _SCORES},
    "parameters": _SCORES,
    "alignment": {"text": {"*": _SCORES}},
    "vocabulary": _SCORES,
    "sources": {"*": _SCORES},
    "name": TEXT,
    **dict.fromkeys(("best_step", "steps", "skipped_steps", "failed_rows", "tokens", "seconds",
                     "tokens_per_second", "peak_memory_bytes"), NUMBER),
}  # fmt: skip
_NEEDED = ("name", "parameters", AFTER, "tokens", "seconds", "tokens_per_second",
           "peak_memory_bytes")  # fmt: skip
FINISHED: Shape = {f"{key}!" if key in _NEEDED else key: shape for key, shape in SUMMARY.items()}
FINISHED |= {
    key: dict.fromkeys(("perplexity!", "cross_entropy!", "kl?", "top1_agreement?"), NUMBER)
    for key in (TEACHER, BEFORE, f"{AFTER}!")
}
"""走完的运行的 ``summary.json``：训练结束时印的表用得着的都在。"""
EVALUATION: Shape = {
    "models": {"*": {"label": TEXT, "source": TEXT, "parameters": NUMBER, "view": TEXT,
                     "dtype": TEXT}},
    "texts": {"*": _MEASURED},
    "agreement": {"*": _AGREEMENT},
    "on_policy": _AGREEMENT,
    "tasks": {"*": _TASK},
    "lm_eval": {"*": _LM_EVAL},
    "samples": [{"prompt!": TEXT, "*": TEXT}],
}  # fmt: skip
ENVIRONMENT: Shape = {}
INITIAL: Shape = {"source!": TEXT, "total!": NUMBER, "layers!": [NUMBER], "scores": [NUMBER],
                  "removed": [NUMBER], "losses": [NUMBER], "tokens": NUMBER,
                  "kept": {"channels!": [NUMBER], "heads!": [[NUMBER]], "kv_heads!": [[[NUMBER]]],
                           "neurons!": [[NUMBER]], "shares!": {"*": NUMBER}}}  # fmt: skip
SAMPLES_ROW: Shape = {"prompt": TEXT, "student": TEXT}
ANSWERS_ROW: Shape = {"id": TEXT, "question": TEXT, "answer": TEXT, "response!": TEXT,
                      "correct!": FLAG}  # fmt: skip
TEXTS: Shape = _SCORES


def check(value: Any, shape: Shape, where: str) -> None:
    """核对从 JSON 或 YAML 读出的一个值；不是 ``shape`` 时 ``DistillabError``，由 ``where`` 与深处的
    键说起。
    """
    if isinstance(shape, str):
        kinds = _TYPES[shape]
        if not isinstance(value, kinds) or (shape == NUMBER and isinstance(value, bool)):
            raise _wrong(value, shape, where)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise _wrong(value, "a list", where)
        for index, inner in enumerate(value):
            check(inner, shape[0], f"{where}[{index}]")
    else:
        if not isinstance(value, dict):
            raise _wrong(value, "an object", where)
        for key in shape:
            name, needed = key[:-1], key[-1]
            if (needed == "!" and value.get(name) is None) or (needed == "?" and name not in value):
                raise DistillabError(f"{where}: {name} is missing")
        named = {key.rstrip("!?"): inner for key, inner in shape.items()}
        for key, inner in value.items():
            expected = named.get(key, shape.get("*"))
            nullable = isinstance(expected, str) or expected in (_FIGURE, _AGREES)
            if expected is not None and not (inner is None and nullable):
                check(inner, expected, f"{where}: {key}" if ": " not in where else f"{where}.{key}")


def _wrong(value: Any, expected: str, where: str) -> DistillabError:
    return DistillabError(f"{where}: found {shown(str(value))}, expected {expected}")


_KINDS: dict[str, Shape] = {
    "train": {"tokens!": NUMBER},
    "loss": {"tokens!": NUMBER, "divergence?": NUMBER, "cross_entropy?": NUMBER},
    "validation": {"tokens!": NUMBER, "perplexity?": NUMBER},
    "reference": {"model!": TEXT, "perplexity?": NUMBER},
}
"""各种行少不了的键；跳过的一步没有损失。"""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """读回 ``metrics.jsonl``；没有文件则为空，写到一半的、读不懂的行被忽略。

    各行都有 ``kind`` 与整数的 ``step``，别的值是数或 ``None``，``model`` 是文字。
    """
    content = path.read_bytes() if path.exists() else b""
    return [row for line in content.splitlines() if (row := metrics_row(line)) is not None]


def metrics_row(line: bytes) -> dict[str, Any] | None:
    """``metrics.jsonl`` 的一行；读不懂则为 ``None``。"""
    try:
        row: dict[str, Any] = parse_json(line, "metrics")
        check(row, METRICS_ROW, "metrics")
        check(row, _KINDS.get("loss" if "loss" in row else row["kind"], {}), "metrics")
    except DistillabError:
        return None
    return row if type(row["step"]) is int else None
