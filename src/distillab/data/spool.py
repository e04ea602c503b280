"""读出的文章放在磁盘上，一篇篇地取：内存里只留每篇的摘要与长度。"""

from __future__ import annotations

import hashlib
import os
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path


def first_megabytes(articles: Iterator[str], size_mb: float | None) -> Iterator[str]:
    """最前面的若干篇，直到再加一篇就超过上限。

    Args:
        articles: 按来源顺序的正文。
        size_mb: 上限，10^6 字节 UTF-8；``None`` 不限。

    Yields:
        取到的文章。
    """
    limit = None if size_mb is None else size_mb * 1e6
    total = 0
    for text in articles:
        total += len(text.encode())
        if limit is not None and total > limit:
            return
        yield text


def text_digest(text: str) -> int:
    """一篇文章的摘要，64 位。"""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


class SpooledTexts:
    """读出的文章放在一个没有名字的文件里：来源只读一遍，内存里只留每篇的摘要与长度。

    Args:
        directory: 放在哪里；进程结束，文件就没有了。

    Attributes:
        digests: 每篇的摘要。
        sizes: 每篇的 UTF-8 字节数。
    """

    def __init__(self, directory: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115  # 与它一起关掉
        self.digests, self.sizes = array("Q"), array("Q")

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

    def __enter__(self) -> SpooledTexts:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
