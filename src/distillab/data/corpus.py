"""一份语料：从哪里取、取多少、哪些文章进验证集；读出的文章放在磁盘上。"""

from __future__ import annotations

import hashlib
import json
import os
import random
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

from transformers import PreTrainedTokenizerBase

from ..config.sections import Records
from ..errors import DistillabError
from ..models.tokenizer import leading_ids, tokenizer_fingerprint

# 改了切块的规则就加一，旧缓存随之失效。
_FORMAT = 1


@dataclass(frozen=True)
class Corpus:
    """从来源里取哪些文章、切成多长的块；各项见 ``WikiDataset.build``，数目越界是错误。"""

    source: str
    max_seq_len: int = 512
    size_mb: float | None = None
    validation_fraction: float = 0.1
    text_field: str = "text"
    subset: str | None = None
    split: str = "train"
    seed: int = 0
    sha256: str | None = None

    def __post_init__(self) -> None:
        if self.max_seq_len < 2:
            raise DistillabError(
                f"max_seq_len is {self.max_seq_len}; expected at least 2: a token and its target"
            )
        if self.size_mb is not None and not self.size_mb > 0:
            raise DistillabError(f"size_mb is {self.size_mb}; expected a positive number or null")
        if not 0 < self.validation_fraction < 1:
            raise DistillabError(
                f"validation_fraction is {self.validation_fraction}; expected between 0 and 1"
            )

    @classmethod
    def of(cls, section: Records, **others: Any) -> Corpus:
        """配方的一节里写了的各项；``others`` 另给，或换掉。"""
        names = {field.name for field in fields(cls)} & type(section).model_fields.keys()
        return cls(**{name: getattr(section, name) for name in names} | others)

    def chunk_rules(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """除了读到的文章，块还取决于什么，写进缓存的键。"""
        leading = leading_ids(tokenizer)
        return {
            "format": _FORMAT,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "max_seq_len": self.max_seq_len,
            "validation_fraction": self.validation_fraction,
            "text_field": self.text_field,
            "seed": self.seed,
        } | ({"leading": leading} if leading else {})  # 没有 BOS 的仍是原来的键

    @contextmanager
    def spooled(self, articles: Iterator[str], directory: Path) -> Iterator[SpooledTexts]:
        """最前面的 ``size_mb``，放进 ``directory`` 里的临时文件；一篇也没有是错误。"""
        with tempfile.TemporaryFile(dir=directory) as file:
            texts = SpooledTexts(file)
            for text in first_megabytes(articles, self.size_mb):
                texts.add(text)
            if not texts.sizes:
                raise DistillabError(
                    f"{self.source!r} gave no text within size_mb={self.size_mb}: it is blank, or "
                    f"its first article is larger"
                )
            yield texts

    def held_out(self, digests: Sequence[int]) -> list[bool]:
        """以文章为单位拆分：各篇（以摘要表示）是否在验证集里；相同的文章总在同一边，否则重复的词条
        会让验证集泄漏。``validation_fraction`` 是占不重复的文章的比例，两边都至少一篇，不足两篇是错
        误。
        """
        unique = array("Q", dict.fromkeys(digests))
        if len(unique) < 2:
            raise DistillabError(
                f"found {len(unique)} article; expected at least 2, one for each split"
            )
        random.Random(self.seed).shuffle(unique)
        count = min(max(1, round(len(unique) * self.validation_fraction)), len(unique) - 1)
        validation = set(unique[:count])
        return [digest in validation for digest in digests]


def cache_key(content: Any) -> str:
    """能写成 JSON 的内容的摘要，16 位十六进制。"""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def text_digest(text: str) -> int:
    """一篇文章的摘要，64 位。"""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def first_megabytes(articles: Iterator[str], size_mb: float | None) -> Iterator[str]:
    """最前面的若干篇，直到再加一篇就超过 ``size_mb``，10^6 字节 UTF-8；``None`` 不限。"""
    total = 0
    for text in articles:
        total += len(text.encode())
        if size_mb is not None and total > size_mb * 1e6:
            return
        yield text


class SpooledTexts:
    """读出的文章放在一个没有名字的文件里，进程结束就没有了：来源只读一遍。

    内存里只留每篇的摘要 ``digests`` 与 UTF-8 字节数 ``sizes``。
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.digests, self.sizes = file, array("Q"), array("Q")

    def add(self, text: str) -> None:
        """放进一篇。"""
        content = text.encode()
        self._file.write(content)
        self.digests.append(text_digest(text))
        self.sizes.append(len(content))

    def texts(self, chosen: Sequence[bool]) -> Iterator[str]:
        """依次给出选中的各篇。"""
        self._file.seek(0)
        for size, wanted in zip(self.sizes, chosen, strict=True):
            if wanted:
                yield self._file.read(size).decode()
            else:
                self._file.seek(size, os.SEEK_CUR)
