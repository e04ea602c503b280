"""放不进磁盘的语料：边读边分词，切成与 ``WikiDataset`` 相同的块，随时能从中间接着来。

块按来源的次序切出，攒满一个 buffer 就打乱、逐个给出，再攒下一个。每个进程读的是同一个流，各取自己
的那几批：分片数不能整除进程数时也不重不漏，几个进程看到的都是同样的步。
"""

from __future__ import annotations

import itertools
import json
import math
import random
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from ..cache import build_once, cache_dir
from .articles import ArticleStream
from .chunks import WikiDataset, too_short, write_chunks
from .corpus import Corpus, cache_key, text_digest
from .encoding import ArticleEncoder, cut_chunks

HEAD_MB = 50.0
"""验证集取自来源开头这么多正文，10^6 字节；整个来源要读上几天，不能等。"""

ARTICLES_TOGETHER = 256
"""一次最多分词的文章数。"""

BYTES_TOGETHER = 2**24
"""一次最多分词的正文，字节；文章再长，内存也够。"""


@dataclass(frozen=True)
class StreamState:
    """流读到了哪里；能存成 JSON，与进程数无关。"""

    epoch: int = 0  # 第几遍
    buffer: int = 0  # 这一遍的第几个 buffer
    source: dict[str, Any] | None = None  # 这个 buffer 开头处的 state_dict()；None 为来源的开头
    text_bytes: int = 0  # 在那之前读过的正文，字节
    carry: list[int] = field(default_factory=list)  # 在那之前不足一块的 token
    used: int = 0  # 这个 buffer 已给出几块


class TextStream(IterableDataset[dict[str, Tensor]]):
    """没有尽头的 token 块：来源读完一遍，又从头读起，换一种打乱的次序。

    大约 ``shuffle_buffer`` 块一起打乱，1 为不打乱；一遍最多读 ``corpus.size_mb`` 正文。摘要在
    ``held_out`` 里的是验证集里的文章，遇到就略过，重复的也不会泄漏。``fingerprint`` 是来源、分词器
    与参数的：检查点记着它，换了来源便不能接着训练。
    """

    def __init__(
        self,
        articles: ArticleStream,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerBase,
        shuffle_buffer: int = 10_000,
        held_out: frozenset[int] = frozenset(),
        fingerprint: str | None = None,
    ) -> None:
        self.articles, self.held_out, self.fingerprint = articles, held_out, fingerprint
        self.encoder = ArticleEncoder(tokenizer)
        self.max_seq_len, self.seed = corpus.max_seq_len, corpus.seed
        self.shuffle_buffer = shuffle_buffer
        self.limit = math.inf if corpus.size_mb is None else corpus.size_mb * 1e6

    @classmethod
    def build(
        cls, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, shuffle_buffer: int = 10_000
    ) -> tuple[TextStream, WikiDataset]:
        """``(训练的流, 验证集)``，没有一篇文章同时在两边；验证集取自来源开头的 ``HEAD_MB``，以后在
        缓存里。来源不超过它时，两边的文章与 ``WikiDataset.build`` 的完全相同，错误也相同。
        """
        articles, size_mb = ArticleStream.open(corpus), corpus.size_mb
        head = replace(corpus, size_mb=HEAD_MB if size_mb is None else min(size_mb, HEAD_MB))
        rules = corpus.chunk_rules(tokenizer) | {"head_mb": head.size_mb}
        key = cache_key([articles.local_identity, rules])
        directory = cache_dir() / "datasets" / f"stream-{key}"
        held_out_file = directory / "held-out.json"
        with build_once(directory) as building:
            if building is not None:
                with head.spooled(iter(articles), building) as texts:
                    chosen = corpus.held_out(texts.digests)
                    write_chunks(
                        building / "validation", texts, chosen, tokenizer, corpus.max_seq_len
                    )
                    held_out = set(itertools.compress(texts.digests, chosen))
                digests = [f"{digest:016x}" for digest in sorted(held_out)]
                (building / held_out_file.name).write_text(json.dumps(digests))
        read = frozenset(int(digest, 16) for digest in json.loads(held_out_file.read_text()))
        fingerprint = cache_key([articles.identity, rules, shuffle_buffer, size_mb])
        stream = cls(articles, corpus, tokenizer, shuffle_buffer, read, f"{fingerprint}-stream")
        return stream, WikiDataset(directory, "validation", key)

    def begin(self, saved: dict[str, Any] | None) -> StreamState:
        """``saved`` 是 ``StreamState`` 的各项；``None`` 为来源的开头。"""
        return StreamState(**saved) if saved else StreamState()

    def rows_in(self, epochs: int) -> int | None:
        """读 ``epochs`` 遍一共多少块：读完才知道。"""
        return None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (item for item, _ in self.items(StreamState()))

    def items(self, state: StreamState) -> Iterator[tuple[dict[str, Tensor], StreamState]]:
        """从 ``state`` 接着给出 ``(块, 给出它之后的状态)``；读完一遍也切不出一块是
        ``DistillabError``。
        """
        rows = self.articles.resume(state.source)
        start = state
        while True:
            chunks, after = self._buffer(rows, start)
            if start.buffer == 0 and after.epoch > start.epoch and not len(chunks):
                raise too_short("train", len(after.carry), self.max_seq_len)
            order = list(range(len(chunks)))
            if self.shuffle_buffer > 1:
                random.Random(f"{self.seed}/{start.epoch}/{start.buffer}").shuffle(order)
            for used in range(start.used, len(chunks)):
                item = WikiDataset.item(chunks[order[used]].long(), self.encoder.unlearned)
                yield item, replace(start, used=used + 1)
            if after.epoch > start.epoch:
                rows, after = self.articles.resume(None), StreamState(epoch=after.epoch)
            start = after

    def _buffer(self, rows: Iterator[str], state: StreamState) -> tuple[Tensor, StreamState]:
        """读到攒满一个 buffer 或读完一遍：``[N, max_seq_len]``，int32，与下一个 buffer 的开头。"""
        ids, text_bytes, ended = array("i", state.carry), state.text_bytes, False
        while not ended and (lacking := self.shuffle_buffer - len(ids) // self.max_seq_len) > 0:
            count = min(ARTICLES_TOGETHER, lacking)  # 一篇通常不止一块，多读的就少
            kept: list[str] = []
            size = 0
            for _ in range(count):
                text = next(rows, None)
                length = 0 if text is None else len(text.encode())
                if text is None or text_bytes + length > self.limit:
                    ended = True
                    break
                text_bytes += length
                if text_digest(text) not in self.held_out:
                    kept.append(text)
                    size += length
                if size > BYTES_TOGETHER:
                    break
            for piece in self.encoder.encode(kept):
                ids.frombytes(piece.tobytes())
        chunks, rest = cut_chunks(
            np.frombuffer(ids, np.int32), self.max_seq_len, self.encoder.leading
        )
        after = StreamState(
            epoch=state.epoch + ended,
            buffer=state.buffer + 1,
            source=self.articles.state_dict(),
            text_bytes=text_bytes,
            carry=rest.tolist(),
        )
        return torch.from_numpy(chunks.copy()), after
