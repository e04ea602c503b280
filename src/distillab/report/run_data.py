"""把运行目录读成报告要的数据。只读文件，不导入 torch；训练到一半的目录也读得了。"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from .. import run_file_shapes as shapes
from ..credentials import without_secrets
from ..errors import DistillabError, foreign
from ..figures import AFTER, RUN_MODELS
from ..parsing import parse_json, parse_yaml
from ..run_file_shapes import check, read_metrics

FILES = ("recipe.yaml", "environment.json", "initial.json", "metrics.jsonl", "summary.json",
         "samples.jsonl", "evaluation.json", "checks/*.json", "checks/*.jsonl")  # fmt: skip
"""报告读的全部文件，相对于运行目录；除了头一个都可以没有。"""


@dataclass(frozen=True)
class RunData:
    """一个运行目录里报告用得上的东西；没有的文件是空的。

    ``label`` 在一页之内不重复；``recipe`` 里的密钥换成了 ``***``；``answers`` 是
    ``{任务: {模型: 各题的回答}}``，``texts`` 是 ``{文本: {模型: 困惑度}}``，都来自 ``checks/``；
    ``changed`` 是最后一次写这些文件的时间，Unix 秒。
    """

    path: Path
    label: str
    recipe: dict[str, Any]
    recipe_text: str
    rows: list[dict[str, Any]]
    environment: dict[str, Any]
    initial: dict[str, Any]
    summary: dict[str, Any]
    evaluation: dict[str, Any]
    samples: list[dict[str, Any]]
    answers: dict[str, dict[str, list[dict[str, Any]]]]
    texts: dict[str, dict[str, float | None]]
    changed: float

    @property
    def train(self) -> list[dict[str, Any]]:
        """训练的各行；整个间隔都被跳过的没有损失，只有步数。"""
        return [row for row in self.rows if row["kind"] == "train"]

    @property
    def validation(self) -> list[dict[str, Any]]:
        """验证的各行。"""
        return [row for row in self.rows if row["kind"] == "validation"]

    @property
    def reference(self) -> dict[str, dict[str, Any]]:
        """训练前的成绩：``{"teacher" 或 "student_before": 行}``。"""
        return {row["model"]: row for row in self.rows if row["kind"] == "reference"}

    @property
    def complete(self) -> bool:
        """是否已经走完。"""
        return bool(self.summary)

    @property
    def state(self) -> str:
        """``complete``、``step i of n``（总步数不在文件里时是第几轮），或 ``empty``。"""
        if self.complete:
            return "complete"
        if not self.train:
            return "not trained yet" if self.rows else "empty"
        last = self.train[-1]
        if (steps := self.get("train.max_steps")) is not None:
            return f"step {last['step']} of {steps}"
        epochs = self.get("train.num_epochs", 1)
        return f"step {last['step']}, epoch {min(last.get('epoch', 0) + 1, epochs)} of {epochs}"

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        """教师、训练前、训练后在验证集上的成绩；还没走完时，训练后取至今最好的一次。"""
        if self.summary:
            return {model: self.summary[model] for model in RUN_MODELS if model in self.summary}
        found = dict(self.reference)
        scored = [row for row in self.validation if row.get("cross_entropy") is not None]
        if scored:
            found[AFTER] = min(scored, key=lambda row: row["cross_entropy"])
        return found

    def get(self, key: str, default: Any = None) -> Any:
        """配方里的一个键，如 ``train.max_steps``；没有或为 null 时是 ``default``。"""
        value: Any = self.recipe
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return default if value is None else value


def read_runs(paths: Iterable[Path]) -> list[RunData]:
    """读若干个运行目录；同一个目录给了两次只算一次，重名的以路径相称。"""
    unique = {path.resolve(): path for path in paths}
    runs = [read_run(path) for path in unique.values()]
    names = [run.label for run in runs]
    return [
        replace(run, label=str(run.path)) if names.count(run.label) > 1 else run for run in runs
    ]


def read_run(path: Path) -> RunData:
    """读一个运行目录；``recipe.yaml`` 或一个 JSON 文件不成样子时 ``DistillabError``。"""
    file = path / "recipe.yaml"
    with foreign(f"{file}: not UTF-8 text"):
        text = file.read_text(encoding="utf-8")
    recipe = parse_yaml(text, str(file))
    if not isinstance(recipe, dict):
        raise DistillabError(f"{file}: expected the keys of a recipe")
    check(_given(recipe), shapes.RECIPE, str(file))
    if (cleaned := without_secrets(recipe)) != recipe:  # 配方从前收得下密钥
        recipe, text = cleaned, yaml.safe_dump(cleaned, sort_keys=False, allow_unicode=True)
    rows = finite(read_metrics(path / "metrics.jsonl"))
    for row in rows:
        check(row, shapes.METRICS_ROW, str(path / "metrics.jsonl"))
    answers: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for file in sorted(path.glob("checks/*.jsonl")):
        task, _, model = file.stem.rpartition(".")
        answers.setdefault(task, {})[model] = _lines(file, shapes.ANSWERS_ROW)
    texts: dict[str, dict[str, float | None]] = {}
    for file in sorted(path.glob("checks/*.json")):
        texts.setdefault(file.stem.rpartition(".")[0], {}).update(_object(file, shapes.TEXTS))
    return RunData(
        path=path,
        label=path.resolve().name,
        recipe=recipe,
        recipe_text=text,
        rows=rows,
        environment=_object(path / "environment.json", shapes.ENVIRONMENT),
        initial=_object(path / "initial.json", shapes.INITIAL),
        summary=_object(path / "summary.json", shapes.SUMMARY),
        evaluation=_object(path / "evaluation.json", shapes.EVALUATION),
        samples=_lines(path / "samples.jsonl", shapes.SAMPLES_ROW),
        answers=answers,
        texts=texts,
        changed=max(stamp[1] for stamp in signature(path)) / 1e9,
    )


def signature(path: Path) -> list[tuple[str, int, int]]:
    """``(文件, 修改时间, 大小)``；与上次的不同，报告就该重写。"""
    found = []
    for pattern in FILES:
        for file in sorted(path.glob(pattern)):
            stat = file.stat()
            found.append((str(file), stat.st_mtime_ns, stat.st_size))
    return found


def finite(value: Any) -> Any:
    """把不是有限值的数换成 ``None``：JSON 里没有它们，浏览器读到就会拒绝整页。"""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int):
        return value if abs(value) < 2**63 else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return value


def _given(value: Any) -> Any:
    """配方里的 null 与没有写是一回事。"""
    if isinstance(value, dict):
        return {key: _given(inner) for key, inner in value.items() if inner is not None}
    return value


def _object(path: Path, shape: shapes.Shape) -> dict[str, Any]:
    if not path.exists():
        return {}
    value: dict[str, Any] = finite(parse_json(path.read_bytes(), str(path)))
    check(value, shape, str(path))
    return value


def _lines(path: Path, shape: shapes.Shape) -> list[dict[str, Any]]:
    """一行一个对象的文件；写到一半的行被忽略。"""
    found = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            with suppress(DistillabError):
                found.append(finite(parse_json(line, str(path))))
        for row in found:
            check(row, shape, str(path))
    return found
