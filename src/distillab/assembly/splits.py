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

from ..config.mixture import MixtureSource
from ..config.schema import Recipe
from ..config.sections import DataSection
from ..data.chat_dataset import ChatDataset
from ..data.chunks import WikiDataset
from ..data.corpus import Corpus
from ..data.mixing import next_source, shares
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
    """配方 ``data`` 的各个来源（``sources``），以及从它们的训练集里抽样。"""

    def __init__(self, recipe: Recipe) -> None:
        self.sources = [SourceSplits(source, recipe) for source in recipe.data.sources]
        found = recipe.data.sources
        self.weights = [one.weight if isinstance(one, MixtureSource) else 1.0 for one in found]

    @property
    def pairs(self) -> list[Pair]:
        """各来源的对话，一个接一个。"""
        return [pair for source in self.sources for pair in source.pairs]

    def sample(self, tokenizer: PreTrainedTokenizerBase, longest: int, tokens: int) -> Sample:
        """训练集里由 ``train.seed`` 抽出的若干条，至少 ``tokens`` 个 token（没有那么多就是全部），
        每条不长于 ``longest``，各来源按权重；对话是学生的视角。验证集从不在其中。
        """
        limits = [tokens, _LONGEST_ROW]

        def key() -> list[Any]:
            own = [source.key(tokenizer, longest) for source in self.sources]
            return own[0] + limits if len(own) == 1 else [own, self.weights, *limits]

        def rows() -> list[Tensor]:
            found: list[Tensor] = []
            left = {k: source.shuffled(tokenizer, longest) for k, source in enumerate(self.sources)}
            drawn = [0] * len(left)
            while left and sum(map(len, found)) < tokens:
                open_ = [weight * (k in left) for k, weight in enumerate(self.weights)]
                k = next_source(shares(open_), drawn)
                row = next(left[k], None)
                if row is None:
                    del left[k]
                else:
                    drawn[k] += 1
                    found.append(row[:_LONGEST_ROW])
            return found

        return Sample(key, rows)


class SourceSplits:
    """一个来源的两边；``pairs`` 不需要模型，写错的数据不必等几十亿参数装好才发现。"""

    def __init__(self, data: DataSection, recipe: Recipe) -> None:
        self.data, self._responses, self._seed = data, recipe.responses, recipe.train.seed
        self._prefix = f"{data.name}: " if isinstance(data, MixtureSource) else ""
        self._made: dict[tuple[int, ...], tuple[tuple[Any, Any], Any, Any]] = {}

    @cached_property
    def pairs(self) -> list[Pair]:
        """对话读入并查对，不合格是 ``DistillabError``；文本没有对话。"""
        if self.data.format != "chat":
            return []
        pairs, notes = load_pairs(self.data, need_response=not self._responses.only_sampled)
        for note in notes:
            logger.info("%s%s", self._prefix, note)
        return pairs

    def of(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_seq_len: int,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> tuple[Any, Any]:
        """``(训练集, 验证集)``，每条至多 ``max_seq_len`` 个 token；对话里教师的视角用
        ``teacher_tokenizer``，缺省相同。错误见 ``WikiDataset.build`` 与 ``ChatDataset.build``。
        """
        kept = tokenizer, teacher_tokenizer  # 还在用，id 就不会是别的
        key = id(tokenizer), id(teacher_tokenizer), max_seq_len
        if key not in self._made:
            if self.data.format == "chat":
                made = self._chat(tokenizer, max_seq_len, teacher_tokenizer)
            else:
                made = self._text(tokenizer, max_seq_len)
            self._made[key] = (kept, *made)
        return self._made[key][1:]

    def key(self, tokenizer: PreTrainedTokenizerBase, longest: int) -> list[Any]:
        """认得出 ``shuffled`` 给出的是哪些。"""
        return [self.of(tokenizer, self._longest(longest))[0].fingerprint, self._seed]

    def shuffled(self, tokenizer: PreTrainedTokenizerBase, longest: int) -> Iterator[Tensor]:
        """训练集的各条 ``[T]``，int64，由种子打乱，不长于 ``longest``。"""
        data, seed, max_seq_len = self.data, self._seed, self._longest(longest)
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

    def _longest(self, longest: int) -> int:
        return min(longest, self.data.max_seq_len or longest)

    def _chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_seq_len: int,
        teacher_tokenizer: PreTrainedTokenizerBase | None,
    ) -> tuple[Dataset[Any], Dataset[Any]]:
        train, validation, report = ChatDataset.build(
            self.pairs,
            self.data,
            tokenizer,
            max_seq_len=max_seq_len,
            seed=self._seed,
            only_prompts=self._responses.only_sampled,
            teacher_tokenizer=teacher_tokenizer,
        )
        for line in report.lines():
            logger.info("%s%s", self._prefix, line)
        return train, validation

    def _text(
        self, tokenizer: PreTrainedTokenizerBase, max_seq_len: int
    ) -> tuple[WikiDataset | TextStream, WikiDataset]:
        corpus = Corpus.of(self.data, max_seq_len=max_seq_len, seed=self._seed)
        if self.data.streaming:
            stream, held_out = TextStream.build(corpus, tokenizer, self.data.shuffle_buffer)
            logger.info(
                f"{self._prefix}streaming the training text; {held_out.num_tokens:,} tokens for "
                f"validation, from its beginning, in sequences of {max_seq_len}"
            )
            return stream, held_out
        train, validation = WikiDataset.of(corpus, tokenizer)
        logger.info(
            f"{self._prefix}{train.num_tokens:,} training tokens, {validation.num_tokens:,} for "
            f"validation, in sequences of {max_seq_len}"
        )
        return train, validation
