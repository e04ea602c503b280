"""transformers 建 mask 时不问设备：一行只有一段文档时，要不要隔开几段早就知道。

它的 ``find_packed_sequence_indices`` 从位置里认出一行有几段，每次前向都要等设备一次；没有另给
``position_ids`` 的一行只有一段，答案总是「没有」。
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

_single = ContextVar("single", default=False)


@contextmanager
def single_documents() -> Iterator[None]:
    """其间的前向，一行只有一段文档。"""
    _installed()
    token = _single.set(True)
    try:
        yield
    finally:
        _single.reset(token)


@cache
def _installed() -> None:
    """换上会先看 ``_single`` 的一个；没有这个函数的版本不动。"""
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    original: Any = getattr(masking_utils, name, None)
    if original is None:
        return

    def find(*args: Any, **kwargs: Any) -> Any:
        return None if _single.get() else original(*args, **kwargs)

    setattr(masking_utils, name, find)
