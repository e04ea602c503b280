"""训练数据用到哪些 token、各多少次；裁剪学生的词表用。只数训练的一边，验证的不看。"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ..bars import track
from ..cache import build_once, cache_dir
from ..config.sections import DataSection
from ..models.tokenizer import vocab_limit
from .articles import ArticleStream, open_articles
from .chat_dataset import ChatDataset
from .corpus import Corpus, cache_key
from .encoding import ArticleEncoder, encoded_articles
from .pairs import Pair
from .streams import HEAD_MB

Counts = NDArray[np.int64]

_NO_LIMIT = 2**31 - 1
"""对话不截断：截断之前的也数。"""


def count_articles(data: DataSection, tokenizer: PreTrainedTokenizerBase, seed: int) -> Counts:
    """文本数据训练的一边每个 id 的次数，``[V]``；第二次来自缓存。流数不完，只数开头的 ``HEAD_MB``。

    错误见 ``WikiDataset.build``。
    """
    corpus = Corpus.of(data, max_seq_len=2, seed=seed)
    if data.streaming:
        size_mb = HEAD_MB if corpus.size_mb is None else min(corpus.size_mb, HEAD_MB)
        corpus, stream = replace(corpus, size_mb=size_mb), ArticleStream.open(corpus)
        articles, identity = iter(stream), stream.local_identity
    else:
        articles, identity = open_articles(corpus)
    key = cache_key([corpus.chunk_rules(tokenizer), identity, corpus.size_mb])
    directory = cache_dir() / "datasets" / f"counts-{key}"
    with build_once(directory) as building:
        if building is not None:
            counts, encoder = _zeros(tokenizer), ArticleEncoder(tokenizer)
            with corpus.spooled(articles, building) as texts:
                chosen = [not out for out in corpus.held_out(texts.digests)]
                shown = track(texts.texts(chosen), "counting", sum(chosen), at_least=2000)
                for ids in encoded_articles(shown, encoder):
                    counts += np.bincount(ids, minlength=len(counts))
            np.save(building / "counts.npy", counts)
    found: Counts = np.load(directory / "counts.npy")
    return found


def count_conversations(
    pairs: list[Pair], data: DataSection, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Counts:
    """对话数据训练的一边每个 id 的次数，``[V]``；两个视角都算，模板写的也算。"""
    train, *_ = ChatDataset.build(pairs, data, tokenizer, max_seq_len=_NO_LIMIT, seed=seed)
    counts = _zeros(tokenizer)
    for i in range(len(train)):
        example = train[i]
        for view in example.views:
            counts += np.bincount(np.array(view.ids, np.int64), minlength=len(counts))
    return counts


def _zeros(tokenizer: PreTrainedTokenizerBase) -> NDArray[Any]:
    return np.zeros(vocab_limit(tokenizer), np.int64)
