"""选择题的选项与正确的那一个，从一条记录里读出。"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import DistillabError, nearest, shown


class Choices(NamedTuple):
    """一道选择题的各个选项，正确的是第几个，从 0 数起。"""

    texts: list[str]
    right: int


def read_choices(record: Mapping[str, Any], where: str) -> Choices:
    """读出 ``choices`` 与 ``answer``；后者是从 0 数起的下标，或选项的原文。

    没有选项、选项不是各不相同的文字，或 ``answer`` 不是其中之一时 ``DistillabError``，以 ``where``
    开头。
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
