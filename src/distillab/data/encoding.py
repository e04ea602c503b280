"""文章变成 token、token 切成等长的块；占的内存与文章多长、一共多少都无关。

分词器自己会在文字之前加 BOS 的（Llama、Gemma 等），每篇文章、每一块都以它开头：这样的模型没见过
没有 BOS 的上文。它只是上文，从不是要预测的目标。
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Sized
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ..errors import DistillabError
from ..models.tokenizer import document_separator, leading_ids

_Sized = TypeVar("_Sized", bound=Sized)
Ids = NDArray[np.int32]

TOGETHER = 2**18
"""一次分词至多这么多字符：分词器给每个 token 记的东西有一两百字节。"""

WRITTEN_TOGETHER = 2**21
"""这么多个 token 一起切块、写出。"""

_MARGIN = 2**10
"""一段的结尾有这么多字符不用：切词的规则会往后看。"""

_OVERLAP = 64
"""下一段从前一段切口之前这么多个 token 处开始，对上了才接得起来。"""

_BYTE = re.compile(r"<0x..>", re.DOTALL)
_TRIES = 2000
"""在一段里至多试这么多处切口。"""


class ArticleEncoder:
    """把文章变成 token。

    ``leading`` 是分词器自己加在文字之前的，``between`` 是两篇文章之间的；``unlearned`` 是
    ``leading`` 里从不作为目标的：与文章的分隔是同一个 token 时，那个分隔仍要学。
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.leading = leading_ids(tokenizer)
        self._separator = document_separator(tokenizer)
        self.unlearned = sorted(set(self.leading) - {self._separator})
        # BOS 就是分隔的（OPT），前一篇的分隔就是这一篇的 BOS。
        self._before = [] if self.leading[-1:] == [self._separator] else self.leading
        self.between = [self._separator, *self._before]
        self._vocab: str | None = None
        self._pairs: dict[str, bool] = {}

    def encode(self, texts: list[str]) -> list[Ids]:
        """每篇的 token，``[N]``，int32：BOS（如果有）、正文、一个分隔；不加别的特殊 token。"""
        found: list[Ids] = []
        before, after = np.array(self._before, np.int32), np.array([self._separator], np.int32)
        for batch in batches(texts, TOGETHER):
            long = len(batch) == 1 and len(batch[0]) > TOGETHER and self.tokenizer.is_fast
            if long and (pieces := self._pieces(batch[0])) is not None:
                found.append(np.concatenate([before, *pieces, after]))
                continue
            rows = (np.asarray(ids, np.int32) for ids in self.plain(batch))
            found += [np.concatenate([before, ids, after]) for ids in rows]
        return found

    def plain(self, texts: list[str]) -> list[list[int]]:
        """每段文字的 token，什么也不加。"""
        ids: list[list[int]] = self._tokenised(texts)["input_ids"]
        return ids

    def _tokenised(self, texts: str | list[str], **options: Any) -> Any:
        # 正文里字面上的 "<|endoftext|>" 只是文字：文章的边界由我们来放。
        return self.tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, verbose=False, **options
        )

    def _pieces(self, text: str) -> list[Ids] | None:
        """一段一段地分词，结果与整篇一次相同；找不到可靠的切口则为 ``None``。

        切口在两段里都是词的边界，或在哪个 token 都不会跨过的两个字符之间：切词从词的边界往后走，不
        看前面；没有 token 会跨过的地方，合并也不会跨过。
        """
        pieces: list[Ids] = []
        begin, start, before = 0, 0, np.empty(0, np.int32)
        while True:
            end = min(begin + TOGETHER, len(text))
            window = _Window(
                self._tokenised(text[begin:end], return_offsets_mapping=True), end - begin
            )
            first = window.index_of(start - begin) if start else 0
            if first is None:
                return None
            # 前一段的切口在这一段里也是切口，之前的 token 也相同。
            own = window.ids[max(0, first - len(before)) : first]
            if start and not (np.array_equal(own, before) and self._can_cut(window, first)):
                return None
            if end == len(text):
                return [*pieces, window.ids[first:]]
            cut = self._last_cut(window, first)
            if cut is None:
                return None
            pieces.append(window.ids[first:cut])
            before = window.ids[cut - _OVERLAP // 2 : cut]
            start = begin + int(window.starts[cut])
            begin += int(window.starts[cut - _OVERLAP])

    def _last_cut(self, window: _Window, first: int) -> int | None:
        last = int(np.searchsorted(window.starts, window.length - _MARGIN, "right")) - 1
        cuts = range(last, max(first + _OVERLAP, last - _TRIES), -1)
        return next((index for index in cuts if self._can_cut(window, index)), None)

    def _can_cut(self, window: _Window, index: int) -> bool:
        # 几个 token 拼成的一个字符，中间不能切。
        return bool(window.starts[index] > window.starts[index - 1]) and (
            window.between_words(index) or self._never_joined(window, index)
        )

    def _never_joined(self, window: _Window, index: int) -> bool:
        left, right = window.tokens[index - 1], window.tokens[index]
        for token in (left, right):
            if token in ("", self.tokenizer.unk_token) or _BYTE.fullmatch(token):
                return False
        pair = left[-1] + right[0]
        if pair not in self._pairs:
            if self._vocab is None:
                self._vocab = "\0".join(self.tokenizer.get_vocab())
            self._pairs[pair] = pair not in self._vocab
        return self._pairs[pair]


class _Window:
    """一段文字的 token，与它们在哪里。"""

    def __init__(self, encoded: Any, length: int) -> None:
        self.ids: Ids = np.asarray(encoded["input_ids"], np.int32)
        self.starts = np.array([start for start, _ in encoded["offset_mapping"]])
        self.tokens: list[str] = encoded.tokens()
        self.length = length
        self._words: list[int | None] = encoded.word_ids()

    def index_of(self, start: int) -> int | None:
        """从 ``start`` 处的字符开始的第一个 token。"""
        index = int(np.searchsorted(self.starts, start))
        found = index < len(self.starts) and self.starts[index] == start
        return index if found else None

    def between_words(self, index: int) -> bool:
        """这个 token 之前是词的边界，之后在这一段里还有两个完整的词。"""
        words = self._words
        return words[index] != words[index - 1] and len(set(words[index : index + 64])) > 3


def encoded_articles(
    articles: Iterable[str], encoder: ArticleEncoder, num_proc: int | None = None
) -> Iterator[Ids]:
    """依次给出每篇的 token，见 ``ArticleEncoder.encode``；用 ``num_proc`` 个进程，``None`` 为就在这
    里。
    """
    parts = batches(articles, TOGETHER)
    if num_proc is None or num_proc < 2:
        for batch in parts:
            yield from encoder.encode(batch)
        return
    pending: deque[Future[list[Ids]]] = deque()
    with ProcessPoolExecutor(num_proc, initializer=_start, initargs=(encoder,)) as pool:
        for batch in parts:
            pending.append(pool.submit(_encode, batch))
            if len(pending) > 2 * num_proc:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


_encoder: ArticleEncoder  # 各个工作进程自己的


def _start(encoder: ArticleEncoder) -> None:
    global _encoder  # 每个任务都带上分词器太慢
    _encoder = encoder


def _encode(batch: list[str]) -> list[Ids]:
    return _encoder.encode(batch)


def batches(items: Iterable[_Sized], limit: int) -> Iterator[list[_Sized]]:
    """相连的几个一起，长度一共至多 ``limit``；更长的一个自成一份。"""
    batch: list[_Sized] = []
    total = 0
    for item in items:
        if batch and total + len(item) > limit:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += len(item)
    if batch:
        yield batch


def cut_chunks(ids: Ids, max_seq_len: int, leading: list[int]) -> tuple[Ids, Ids]:
    """从头切成等长的块 ``[M, max_seq_len]``；每块以 ``leading`` 开头，正是文章开头的不重复。

    ``ids`` 是首尾相接的各篇，``[N]``。剩下的也返回，接上后文再切，与一次切的相同。
    """
    size = len(leading)
    if max_seq_len <= size:
        raise DistillabError(
            f"max_seq_len is {max_seq_len}; expected at least {size + 1}: the tokenizer begins "
            f"every text with {size} tokens"
        )
    if not size:
        whole = len(ids) // max_seq_len * max_seq_len
        return ids[:whole].reshape(-1, max_seq_len), ids[whole:]
    head = np.asarray(leading, np.int32)
    chunks, start = [], 0
    while True:
        own = np.array_equal(ids[start : start + size], head)
        end = start + max_seq_len - (0 if own else size)
        if end > len(ids):
            break
        piece = ids[start:end]
        chunks.append(piece if own else np.concatenate([head, piece]))
        start = end
    rows = np.stack(chunks) if chunks else np.empty((0, max_seq_len), np.int32)
    return rows, ids[start:]
