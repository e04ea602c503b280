"""读不出的行：跳过、说出来、数着；读不出的占了一半，就不是个别的坏行了。"""

from __future__ import annotations

import logging

from ..errors import DistillabError

logger = logging.getLogger("distillab")

NAMED = 20
"""日志里至多说出这么多行。"""

AT_ONCE = 10
"""开头读不出的有这么多，不必等读完。"""


class BadRows:
    """数着读得出与读不出的行。

    Args:
        source: 来源，写进日志。
        good: 以前读得出的行。
        bad: 以前读不出的行。
    """

    def __init__(self, source: str, good: int = 0, bad: int = 0) -> None:
        self.source, self.good, self.bad = source, good, bad
        self._first: DistillabError | None = None
        self._named = 0

    def skip(self, error: DistillabError) -> None:
        """跳过一行。

        Raises:
            DistillabError: 已有不少行，一半以上读不出；信息是第一行的。
        """
        self.bad += 1
        self._first = self._first or error
        if self.bad >= AT_ONCE:
            self._check()
        if self._named < NAMED:
            self._named += 1
            logger.error("row skipped: %s", error)

    def finish(self) -> None:
        """读完了。

        Raises:
            DistillabError: 一半以上读不出；信息是第一行的。
        """
        self._check()
        if self.bad:
            logger.warning("%s: %d of %d rows skipped", self.source, self.bad, self.bad + self.good)

    def _check(self) -> None:
        if self._first is None or self.bad < self.good:
            return
        if self.bad == 1:
            raise self._first
        raise DistillabError(
            f"{self._first}; {self.bad} of {self.bad + self.good} rows cannot be read"
        )
