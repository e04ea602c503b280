"""怎样渲染对话。"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator


class Style(NamedTuple):
    """内容里的控制 token 当作什么；模板写哪一天，缺省为渲染的那天；模板自己的选项。"""

    control_tokens: Literal["split", "keep", "refuse"] = "split"
    today: date | None = None
    options: Mapping[str, Any] = MappingProxyType({})

    def with_tools(self, tools: list[dict[str, Any]] | None) -> Style:
        """一段对话自己的。"""
        return self if tools is None else self._replace(options={**self.options, "tools": tools})


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
