"""两个分词器不共有的 token：哪些、在数据里有多少，什么时候不能接着训练。"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..batch import IGNORE_INDEX, Example
from ..errors import DistillabError, some
from ..vocabulary import Vocabulary

logger = logging.getLogger("distillab")


@dataclass(frozen=True)
class LeftOut:
    """一个模型（``student`` 或 ``teacher``）的分词器里，不在共有词表里的 token：id → token。"""

    whose: str
    tokens: dict[int, str]

    @classmethod
    def of(cls, whose: str, tokenizer: PreTrainedTokenizerBase, shared: Vocabulary) -> LeftOut:
        """``tokenizer`` 定义了、``shared`` 里没有的。"""
        own = ((index, token) for token, index in tokenizer.get_vocab().items())
        return cls(whose, {i: token for i, token in sorted(own) if i not in shared})

    def check_stops(self, stops: Container[int]) -> None:
        """停止的 token 都要共有：不然学生学不会停下，或教师的概率无处可去。"""
        for index, token in self.tokens.items():
            if index in stops:
                other = "teacher" if self.whose == "student" else "student"
                raise DistillabError(
                    f"{token!r} (id {index}) ends the {self.whose}'s responses, but the "
                    f"{other}'s tokenizer does not define it under this id: the student could "
                    f"not learn to stop; expected one tokenizer for both"
                )

    def __str__(self) -> str:
        return f"{len(self.tokens):,} of the {self.whose}'s ({some(self.tokens.values())})"


def check_left_out(
    shared: Vocabulary, parts: Iterable[tuple[str, PreTrainedTokenizerBase, Container[int]]]
) -> None:
    """说出两边各有哪些 token 不共有，停止的在其中就拒绝；``parts`` 是各
    ``(谁, 分词器, 停止 token)``。
    """
    found = []
    for whose, tokenizer, stops in parts:
        left = LeftOut.of(whose, tokenizer, shared)
        left.check_stops(stops)
        found += [left] if left.tokens else []
    if found:
        logger.info(
            "student and teacher share %s token ids; without probability and not trained on: %s",
            f"{len(shared):,}",
            ", ".join(map(str, found)),
        )


def count_left_out(
    name: str,
    items: Iterable[Example | dict[str, Tensor]] | None,
    left: LeftOut,
    teacher_rows: int | None,
) -> None:
    """数出 ``name`` 的数据里学生有而教师没有的 token，写进日志。

    ``items`` 为 ``None`` 的是流，数不完，每个 token 都可能在其中；``teacher_rows`` 是教师的
    embedding 有几行，没有教师则为 ``None``。教师读不了其中的一个，或没有剩下可以训练的，是错误。
    """
    lost: Counter[int] = Counter()
    read: Counter[int] = Counter()
    trained = 0
    for item in items or ():
        labels, ids = _tokens(item)
        trained += len(labels)
        lost.update(index for index in labels if index in left.tokens)
        read.update(index for index in ids if index in left.tokens)
    possible = left.tokens if items is None else read
    if teacher_rows is not None and max(possible, default=0) >= teacher_rows:
        index = min(index for index in possible if index >= teacher_rows)
        raise DistillabError(
            f"{name}: the teacher cannot read {left.tokens[index]!r} (id {index}) of the student's "
            f"tokenizer, its embedding has {teacher_rows} rows; expected one tokenizer for both"
        )
    if trained and lost.total() == trained:
        raise DistillabError(
            f"{name}: not one of the {trained:,} response tokens is in the vocabulary that "
            f"student and teacher share; expected one tokenizer for both"
        )
    for counts, what in (
        (lost, f"of {trained:,} response tokens are not trained on"),
        (read, "tokens mean nothing to the teacher that reads them"),
    ):
        if counts:
            tokens = some(left.tokens[index] for index, _ in counts.most_common())
            logger.warning(
                f"{name}: {counts.total():,} {what}: only the student's tokenizer has {tokens}"
            )


def _tokens(item: Example | dict[str, Tensor]) -> tuple[list[int], list[int]]:
    """``(训练的 token, 教师读到的 token)``。"""
    if isinstance(item, Example):
        return item.student.labels, item.teacher.ids
    labels: list[int] = item["labels"].tolist()
    ids: list[int] = item["input_ids"].tolist()
    return [index for index in labels if index != IGNORE_INDEX], ids
