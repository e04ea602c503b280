"""lm-evaluation-harness 的任务，在本进程里由任意模型来做：配方的 ``evaluate.lm_eval``。

任务怎样出题、怎样判分都是它的；模型接口在 ``harness_lm.py``。
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..config.sections import LmEvalConfig
from ..errors import DistillabError, nearest
from ..models.interface import LanguageModel, PretrainedLM
from ..models.pretrained import load_pretrained, one_line_errors
from ..models.tokenizer import load_tokenizer

SEED, FEWSHOT_SEED = 0, 1234
"""lm-evaluation-harness 命令行缺省的种子；示例由后者抽取，结果才与发表的相同。"""


def evaluate_with_harness(
    model: LanguageModel | str,
    tokenizer: PreTrainedTokenizerBase | None,
    config: LmEvalConfig,
    *,
    batch_size: int = 16,
) -> dict[str, Any]:
    """用 lm-evaluation-harness 量一个模型，给出能写成 JSON 的字典。

    ``model`` 也可以是任意模型来源，以 float32 读入，那时不必给 ``tokenizer``。``tasks`` 里每个任务
    有 ``items``、``version``、``num_fewshot``、``metrics``（指标 → 值，名字是它的，如
    ``exact_match,strict``）、``higher_is_better`` 与 ``per_item``（指标 → 每题的值，次序固定，供成
    对比较；每题不是一个数的没有）；``groups`` 是任务组的指标。错误见 ``check_harness``；任务的数据
    读不了，要运行代码或看图，或放不进模型也是。
    """
    manager = check_harness(config)
    from lm_eval import __version__
    from lm_eval.evaluator import evaluate

    from .harness_lm import HarnessLM

    if isinstance(model, str):
        tokenizer = tokenizer or load_tokenizer(model)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = PretrainedLM(load_pretrained(model, dtype=torch.float32, device=device))
    if tokenizer is None:
        raise ValueError("a loaded model comes without a tokenizer: give it")
    names = ", ".join(config.tasks)
    with _quiet(), one_line_errors("the data of evaluate.lm_eval.tasks", names):
        loaded = manager.load(config.tasks)
    for name, task in loaded["tasks"].items():
        _prepare(name, task, config)
    random.seed(SEED)
    np.random.seed(FEWSHOT_SEED)  # noqa: NPY002 - 有的任务用全局的随机数出题
    started = time.perf_counter()
    with _quiet():
        found = evaluate(
            lm=HarnessLM(model, tokenizer, batch_size),
            task_dict=loaded,
            limit=config.limit,
            bootstrap_iters=0,  # 区间由每题的值另算
        )
    seconds = time.perf_counter() - started
    tasks = {name: _result(name, found) for name in loaded["tasks"]}
    return {
        "lm_eval": __version__,
        "tasks": tasks,
        "groups": {
            name: _metrics(found["groups"][name]) for name in sorted(found.get("groups", {}))
        },
        "items_per_second": round(sum(task["items"] for task in tasks.values()) / seconds, 2),
    }


def check_harness(config: LmEvalConfig) -> Any:
    """``TaskManager``；没有安装，或任务的名字不对，是 ``DistillabError``。不读数据，不要模型；只有
    自己的任务时很快，要查自带的，得先读它的一万多个 YAML。
    """
    path = config.include_path
    if path is not None and not Path(path).is_dir():
        raise DistillabError(f"evaluate.lm_eval.include_path: {path!r} is not a directory")
    own = None if path is None else _task_manager(path, own=True)
    if own is not None and set(config.tasks) <= set(own.all_subtasks):
        return own
    every = _task_manager(path, own=False)
    for name in config.tasks:
        if name not in every.all_tasks:
            hint = nearest(name, every.all_tasks, "list them with: lm-eval ls tasks")
            raise DistillabError(f"evaluate.lm_eval.tasks: no task named {name!r}; {hint}")
    return every


@cache
def _task_manager(include_path: str | None, own: bool) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise DistillabError(
            f"evaluate.lm_eval needs lm-eval ({error}): pip install 'distillab[lm-eval]'"
        ) from error
    with _quiet():
        return TaskManager(include_path=include_path, include_defaults=not own)


@contextmanager
def _quiet() -> Iterator[None]:
    """它的每个警告都以 WARNING 写到终端；错误会以异常到来。"""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _prepare(name: str, task: Any, config: LmEvalConfig) -> None:
    """示例的个数与种子，规则同 ``lm_eval.simple_evaluate``：任务写明 0 个的总是 0 个。"""
    unsupported = {
        "UNSAFE_CODE": "runs code that the model writes",
        "MULTIMODAL": "needs more than text",
    }
    for attribute, what in unsupported.items():
        if getattr(task, attribute, False):
            raise DistillabError(f"evaluate.lm_eval.tasks: {name} {what}, which is not supported")
    default = task.get_config("num_fewshot")
    if default is None or (config.num_fewshot is not None and default != 0):
        task.set_config(key="num_fewshot", value=config.num_fewshot or 0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


def _result(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    samples: Sequence[Mapping[str, Any]] = found["samples"][name]
    metrics = _metrics(found["results"][name])
    per_item = {}
    for key in metrics:
        metric, _, chosen = key.partition(",")
        values = [one.get(metric) for one in samples if one["filter"] == (chosen or "none")]
        if all(isinstance(value, (int, float, np.number)) for value in values):
            per_item[key] = [float(value) for value in values if value is not None]
    return {
        "items": found["n-samples"][name]["effective"],
        "version": found["versions"].get(name),
        "num_fewshot": found["n-shot"].get(name),
        "metrics": metrics,
        "higher_is_better": dict(found["higher_is_better"].get(name, {})),
        "per_item": per_item,
    }


def _metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """``acc,none`` → ``acc``；有过滤器的保留它的名字，如 ``exact_match,strict``。"""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in found.items()
        if "," in key and "_stderr," not in key and isinstance(value, (int, float, np.number))
    }
