"""一份要评测的数据：哪些序列，其中哪些 token 要预测，它们是什么文字。"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..batch import Batch, Example, Tokens, chunk_example, collate_examples
from ..data.encoding import ArticleEncoder
from ..errors import DistillabError
from ..models.tokenizer import continuation_text, document_separator, own_vocabulary
from ..train.loaders import evenly
from ..vocabulary import Vocabulary
from .subjects import Side

logger = logging.getLogger("distillab")


class Sequences:
    """要评测的若干序列：只算 response token，一个也没有的序列不要。

    不在共有词表 ``vocabulary`` 里的 response token 不算，数目写进日志；一个也不剩时
    ``DistillabError``。留下的 response token 是 ``labels: [P]``，按序列的先后；``positions: [P]``
    是它在自己的序列里是第几个，从 1 起；``tokens: [S]`` 是每个序列有几个，``texts`` 是它们的文字
    （不含特殊 token），``bytes: [S]`` 是文字的 UTF-8 字节数。``sha256`` 是全部 token 的摘要；
    ``privileged``：教师读到学生读不到的。
    """

    def __init__(
        self,
        name: str,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: Vocabulary,
    ) -> None:
        self.name, self.vocabulary = name, vocabulary
        kept = [_within(example, vocabulary) for example in examples]
        before, after = (sum(len(e.student.response) for e in part) for part in (examples, kept))
        if after < before:
            logger.warning(
                f"{name}: {before - after:,} of {before:,} response tokens are not measured: "
                f"student and teacher do not share them"
            )
        self.examples = [example for example in kept if example.student.response]
        if not self.examples:
            raise DistillabError(f"{name}: no response token to evaluate on")
        labels = [example.student.labels for example in self.examples]
        self.tokens = np.array([len(part) for part in labels])
        self.labels = np.array(list(itertools.chain(*labels)))
        self.positions = np.concatenate([np.arange(1, count + 1) for count in self.tokens])
        self.texts = [
            continuation_text(tokenizer, view.ids[: view.response[0]], view.labels)
            for view in (example.student for example in self.examples)
        ]
        self.bytes = np.array([len(text.encode("utf-8", "replace")) for text in self.texts])
        self.sha256 = _digest(self.examples)
        self.privileged = any(example.teacher is not example.student for example in self.examples)

    def __len__(self) -> int:
        """序列数 ``S``。"""
        return len(self.examples)

    def longest(self, side: Side) -> int:
        """一个视角里最长的序列，单位 token。"""
        return max(len(getattr(example, side).ids) for example in self.examples)

    def batches(self, size: int) -> Iterator[tuple[NDArray[np.int64], Batch]]:
        """由长到短的各批，和批里每一行在 ``labels`` 里的下标：显存不够的话，第一批就知道。"""
        ends = self.tokens.cumsum()
        order = sorted(range(len(self)), key=lambda i: -len(self.examples[i].teacher.ids))
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            rows = [np.arange(ends[i] - self.tokens[i], ends[i]) for i in chosen]
            # 哪个 id 用来填充都一样：它不被算，也不被注意到。
            batch = collate_examples([self.examples[i] for i in chosen], pad_id=0)
            yield np.concatenate(rows), batch

    def sums(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """每个 token 一个的值 ``[P]`` 按序列求和，``[S]``。"""
        return np.add.reduceat(values, self.tokens.cumsum() - self.tokens)


def examples_of(dataset: Dataset[Any], limit: int | None) -> list[Example]:
    """数据集里均匀的至多 ``limit`` 条；文本块预测它的各个目标。"""
    items = (dataset[i] for i in evenly(len(dataset), limit))  # type: ignore[arg-type]
    rows = (chunk_example(item) if isinstance(item, dict) else item for item in items)
    return [one for row in rows for one in (row if isinstance(row, tuple) else (row,))]


def same_text(
    data: Sequences, tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase
) -> Sequences:
    """把文本块换成 ``other`` 的 token，次序不变：第一个 token 仍是上文，其余的文字仍要全部预测。"""
    ours, theirs = ArticleEncoder(tokenizer), ArticleEncoder(other)
    examples = []
    for example in data.examples:
        tokens = example.student
        before, rest = tokens.ids[: tokens.response[0]], tokens.ids[tokens.response[0] :]
        context = theirs.leading + _translated([], before, ours, theirs, ends=False)
        context = context or [document_separator(other)]
        whole = context + _translated(before, rest, ours, theirs)
        learned = range(len(context), len(whole))
        view = Tokens(whole, [i for i in learned if whole[i] not in theirs.unlearned])
        examples.append(Example(view, view))
    return Sequences(data.name, examples, other, own_vocabulary(other))


def _translated(
    before: list[int],
    ids: list[int],
    ours: ArticleEncoder,
    theirs: ArticleEncoder,
    ends: bool = True,
) -> list[int]:
    """``before`` 之后的文字一段段重新分词；文章之间的分隔换成对方的，连同对方的 BOS。"""
    # 分隔不一定是有名字的特殊 token：eos 可以是别的。
    special = {*ours.tokenizer.all_special_ids, document_separator(ours.tokenizer)}
    found: list[int] = []
    for is_special, part in itertools.groupby(ids, lambda token: token in special):
        tokens = list(part)
        if not is_special:
            text = continuation_text(ours.tokenizer, before, tokens)
            found += theirs.plain([text])[0]
        elif ends:
            found += [
                id for token in tokens if token not in ours.unlearned for id in theirs.between
            ]
        before = [*before, *tokens]
    return found


def _within(example: Example, vocabulary: Vocabulary) -> Example:
    """去掉共有词表之外的 response token，两个视角去掉的相同。"""
    kept = vocabulary.kept(example.student.labels)
    views = [Tokens(v.ids, list(itertools.compress(v.response, kept))) for v in example.views]
    return Example(views[0], views[-1])


def _digest(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for view in (view for example in examples for view in example.views):
        for part in (view.ids, view.response):
            digest.update(np.array([len(part), *part], dtype="<i4").tobytes())
    return digest.hexdigest()
