"""``reasoning-gym`` 现出的题：同样的名字、选项与种子总是同样的题，由它自己判分。"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

from ..config.sections import GeneratorConfig
from ..data.conversations import Conversation
from ..errors import DistillabError, foreign, nearest

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
            return float(
                dataset.score_answer(extract_answer(response) or response.strip(), dict(record))
            )
        except Exception as error:  # 判分的代码读不懂的回答不是对的回答
            logger.warning(
                "%s: %s cannot score a response (%s: %s); it counts as wrong",
                where, config.name, type(error).__name__, error,
            )  # fmt: skip
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
