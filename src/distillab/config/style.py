"""怎样渲染对话，除了模板自己的选项。"""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator


class Style(NamedTuple):
    """内容里的控制 token 当作普通文字、控制 token 还是不许有；模板写哪一天，缺省为渲染的那天。"""

    control_tokens: Literal["split", "keep", "refuse"] = "split"
    today: date | None = None


USUAL = Style()


def _iso_day(value: Any) -> Any:
    """YAML 里带引号的 ``2026-11-28`` 是文字，不带的是日期。"""
    if not isinstance(value, str):
        return value
    try:
        return date.fromisoformat(value)
    except ValueError:
        raise ValueError(f"found {value!r}, expected a date such as 2026-11-28") from None


Day = Annotated[date, BeforeValidator(_iso_day)]
"""配方里的日期。"""
