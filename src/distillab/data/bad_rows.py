"""读不出的行：跳过、说出来、数着；读不出的占了一半，就不是个别的坏行了。"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

from ..errors import DistillabError

logger = logging.getLogger("distillab")

NAMED = 20
"""日志里至多说出这么多行。"""

AT_ONCE = 10
"""开头读不出的有这么多，不必等读完。"""


class BadRows:
    """数着来源 ``source`` 里读得出与读不出的行，接着以前的数。"""

    def __init__(self, source: str, good: int = 0, bad: int = 0) -> None:
        self.source, self.good, self.bad = source, good, bad
        self._first: DistillabError | None = None
        self._named = 0

    def readable(self, rows: Iterable[str | DistillabError]) -> Iterator[str]:
        """读得出的各行；一半以上读不出是错误，信息是第一行的。"""
        for row in rows:
            if isinstance(row, DistillabError):
                self._skip(row)
            else:
                self.good += 1
                yield row
        self._check()
        if self.bad:
            logger.warning("%s: %d of %d rows skipped", self.source, self.bad, self.bad + self.good)

    def _skip(self, error: DistillabError) -> None:
        self.bad += 1
        self._first = self._first or error
        if self.bad >= AT_ONCE:
            self._check()
        if self._named < NAMED:
            self._named += 1
            logger.error("row skipped: %s", error)

    def _check(self) -> None:
        if self._first is None or self.bad < self.good:
            return
        if self.bad == 1:
            raise self._first
        raise DistillabError(
            f"{self._first}; {self.bad} of {self.bad + self.good} rows cannot be read"
        )
