"""任务的题目从哪里来：记录里的选择题，与 ``reasoning-gym`` 现出的、由它自己判分的题。"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..config.sections import GeneratorConfig
from ..data.conversations import Conversation
from ..errors import DistillabError, foreign, nearest, shown

logger = logging.getLogger("distillab")

Score = Callable[[Mapping[str, Any], "str | None", str], float]
"""``(record, answer, response)`` → 得分；1 为全对，``Filter`` 的真假也算得分。"""


def generated(config: GeneratorConfig, where: str) -> tuple[list[Conversation], Score]:
    """``(各题, 判分)``；判分是这个数据集自己的 ``score_answer``，在 ``[0, 1]`` 里。

    回答里有 ``<answer>...</answer>`` 就判其中的文字（最后一处），没有就判整个回答。没有安装
    ``reasoning-gym``、没有这种题或选项有误时 ``DistillabError``，以配方里的键 ``where`` 开头。
    """
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
        from reasoning_gym.utils import extract_answer
    except ImportError as error:
        raise DistillabError(
            f"{where} needs reasoning-gym ({error}): pip install 'distillab[tasks]'"
        ) from error
    if config.name not in DATASETS:
        raise DistillabError(
            f"{where}.name: reasoning-gym has no data set {config.name!r}; "
            f"{nearest(config.name, DATASETS)}"
        )
    known = {field.name for field in dataclasses.fields(DATASETS[config.name][1])}
    for key in config.options:
        if key in ("seed", "size"):
            raise DistillabError(f"{where}.options.{key}: set {where}.{key}")
        if key not in known:
            choices = known - {"seed", "size"}
            raise DistillabError(
                f"{where}.options: {config.name} has no option {key!r}; {nearest(key, choices)}"
            )
    with foreign(f"{where}.options: {config.name} refuses them"):
        dataset = create_dataset(config.name, seed=config.seed, size=config.size, **config.options)
        entries = [dataset[index] for index in range(config.size)]

    def score(record: Mapping[str, Any], answer: str | None, response: str) -> float:
        try:
            answered = extract_answer(response) or response.strip()
            return float(dataset.score_answer(answered, dict(record)))
        except Exception as error:  # 判分的代码读不懂的回答不是对的回答
            why = f"{type(error).__name__}: {error}"
            logger.warning(
                f"{where}: {config.name} cannot score a response ({why}); it counts as wrong"
            )
            return 0.0

    conversations = [
        Conversation(
            id=f"{config.name}-{index}",
            messages=[{"role": "user", "content": entry["question"]}],
            answer=entry["answer"],
            record=entry,
            where=f"{config.name}[{index}]",
        )
        for index, entry in enumerate(entries)
    ]
    return conversations, score


class Choices(NamedTuple):
    """一道选择题的各个选项，正确的是第几个，从 0 数起。"""

    texts: list[str]
    right: int


def read_choices(record: Mapping[str, Any], where: str) -> Choices:
    """读出 ``choices`` 与 ``answer``，后者是从 0 数起的下标或原文；不成样子是 ``DistillabError``，
    以 ``where`` 开头。
    """
    texts, answer = record.get("choices"), record.get("answer")
    if texts is None:
        raise DistillabError(f"{where}: expected choices, a list of texts to choose from")
    if (
        not isinstance(texts, list)
        or not all(isinstance(text, str) and text.strip() for text in texts)
        or not 1 < len(texts) == len(set(texts))
    ):
        found = json.dumps(texts, ensure_ascii=False, default=str)
        raise DistillabError(
            f"{where}: choices is {found if len(found) <= 60 else f'{found[:57]}...'}, expected a "
            f"list of at least two different texts"
        )
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(texts):
            raise DistillabError(
                f"{where}: answer {answer} is no index of its {len(texts)} choices, expected 0 to "
                f"{len(texts) - 1}"
            )
        return Choices(texts, answer)
    if not isinstance(answer, str):
        raise DistillabError(
            f"{where}: expected answer, the index (from 0) or the text of the right choice"
        )
    if answer not in texts:
        raise DistillabError(
            f"{where}: answer {shown(answer)} is not among the choices; {nearest(answer, texts)}"
        )
    return Choices(texts, texts.index(answer))
