"""一份配方的训练集与验证集：选层时量的、训练与验证用的是同一份，只读一次、切一次。"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..config.schema import Recipe
from ..config.sections import DataSection
from ..data.chat_dataset import ChatDataset
from ..data.chunks import WikiDataset
from ..data.corpus import Corpus
from ..data.pairs import Pair, load_pairs
from ..data.streams import TextStream

logger = logging.getLogger("distillab")

_LONGEST_ROW = 512
"""量层时一条最多用这么多 token：几千个 token 要来自许多条。"""
_BUFFER = 64
"""量层时从流里一起打乱的块数：只要几块，不必等攒满训练用的 buffer。"""


class Sample(NamedTuple):
    """训练集里抽出的若干条，用到才读：``key()`` 认得出是哪些，``rows()`` 各是 ``[T]``，int64。"""

    key: Callable[[], list[Any]]
    rows: Callable[[], list[Tensor]]


class Splits:
    """配方 ``data`` 的两边；``pairs`` 不需要模型，写错的数据不必等几十亿参数装好才发现。"""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._made: dict[tuple[int, ...], tuple[tuple[Any, Any], Any, Any]] = {}

    @cached_property
    def pairs(self) -> list[Pair]:
        """对话读入并查对，不合格是 ``DistillabError``；文本没有对话。"""
        data, responses = self._recipe.data, self._recipe.responses
        if data.format != "chat":
            return []
        pairs, notes = load_pairs(data, need_response=not responses.only_sampled)
        for note in notes:
            logger.info("%s", note)
        return pairs

    def of(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_seq_len: int,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> tuple[Any, Any]:
        """``(训练集, 验证集)``，每条至多 ``max_seq_len`` 个 token；对话里教师的视角用
        ``teacher_tokenizer``，缺省相同。错误见 ``text_splits`` 与 ``ChatDataset.build``。
        """
        kept = tokenizer, teacher_tokenizer  # 还在用，id 就不会是别的
        key = id(tokenizer), id(teacher_tokenizer), max_seq_len
        if key not in self._made:
            if self._recipe.data.format == "chat":
                made = self._chat(tokenizer, max_seq_len, teacher_tokenizer)
            else:
                made = self._text(tokenizer, max_seq_len)
            self._made[key] = (kept, *made)
        return self._made[key][1:]

    def sample(self, tokenizer: PreTrainedTokenizerBase, longest: int, tokens: int) -> Sample:
        """训练集里由 ``train.seed`` 抽出的若干条，至少 ``tokens`` 个 token（没有那么多就是全部），
        每条不长于 ``longest``；对话是学生的视角。验证集从不在其中。
        """
        max_seq_len = min(longest, self._recipe.data.max_seq_len or longest)

        def key() -> list[Any]:
            train = self.of(tokenizer, max_seq_len)[0]
            return [train.fingerprint, self._recipe.train.seed, tokens, _LONGEST_ROW]

        def rows() -> list[Tensor]:
            found: list[Tensor] = []
            for row in self._shuffled(tokenizer, max_seq_len):
                found.append(row[:_LONGEST_ROW])
                if sum(map(len, found)) >= tokens:
                    break
            return found

        return Sample(key, rows)

    def _shuffled(self, tokenizer: PreTrainedTokenizerBase, max_seq_len: int) -> Iterator[Tensor]:
        data, seed = self._recipe.data, self._recipe.train.seed
        if data.streaming:
            corpus = Corpus.of(data, max_seq_len=max_seq_len, seed=seed)
            stream, _ = TextStream.build(corpus, tokenizer, min(_BUFFER, data.shuffle_buffer))
            yield from (item["input_ids"] for item in stream)
            return
        train = self.of(tokenizer, max_seq_len)[0]
        order = list(range(len(train)))
        random.Random(seed).shuffle(order)
        for index in order:
            item = train[index]
            yield item["input_ids"] if isinstance(item, dict) else torch.tensor(item.student.ids)

    def _text(self, tokenizer: PreTrainedTokenizerBase, max_seq_len: int) -> tuple[Any, Any]:
        return text_splits(self._recipe.data, tokenizer, max_seq_len, self._recipe.train.seed)

    def _chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_seq_len: int,
        teacher_tokenizer: PreTrainedTokenizerBase | None,
    ) -> tuple[Dataset[Any], Dataset[Any]]:
        train, validation, report = ChatDataset.build(
            self.pairs,
            self._recipe.data,
            tokenizer,
            max_seq_len=max_seq_len,
            seed=self._recipe.train.seed,
            only_prompts=self._recipe.responses.only_sampled,
            teacher_tokenizer=teacher_tokenizer,
        )
        for line in report.lines():
            logger.info("%s", line)
        return train, validation


def text_splits(
    data: DataSection, tokenizer: PreTrainedTokenizerBase, max_seq_len: int, seed: int
) -> tuple[WikiDataset | TextStream, WikiDataset]:
    """文本数据的训练集（或流）与验证集，每条 ``max_seq_len`` 个 token。

    切好的存在缓存里，第二次很快；错误见 ``WikiDataset.build``。
    """
    corpus = Corpus.of(data, max_seq_len=max_seq_len, seed=seed)
    if data.streaming:
        stream, held_out = TextStream.build(corpus, tokenizer, data.shuffle_buffer)
        logger.info(
            f"streaming the training text; {held_out.num_tokens:,} tokens for validation, from "
            f"its beginning, in sequences of {max_seq_len}"
        )
        return stream, held_out
    train, validation = WikiDataset.of(corpus, tokenizer)
    logger.info(
        f"{train.num_tokens:,} training tokens, {validation.num_tokens:,} for validation, "
        f"in sequences of {max_seq_len}"
    )
    return train, validation
