"""快的写法用不了时，退到慢的：编译器与 kernel 共用。"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import _StopRecomputationError

from ..errors import typed_reason

logger = logging.getLogger("distillab")


class Compiler:
    """没有编译器、或编译不成的机器上，从此逐个算子执行：数相同，只是慢，在日志里说一次。

    编译器自己的错误什么类型都有（dynamo 抛过光秃秃的 ``AssertionError``），所以都算；逐个算子也不成
    的，是使用者的错误，原样抛出。
    """

    def __init__(self, warning: str) -> None:
        self.warning, self.failed = warning, False

    def call(
        self, compiled: Callable[..., Any], eager: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """``compiled`` 的结果；不成则是 ``eager`` 的。"""
        if self.failed:
            return eager(*args, **kwargs)
        try:
            return compiled(*args, **kwargs)
        except (torch.OutOfMemoryError, _StopRecomputationError):
            raise  # 后者是重算激活提前收工的信号
        except Exception as error:
            result = eager(*args, **kwargs)
            self.failed = True
            logger.warning(self.warning, typed_reason(error))
            return result
