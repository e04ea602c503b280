"""进度条：各个命令共用的一种。"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from .console import make_console

Item = TypeVar("Item")

console = make_console(stderr=True)
"""进度条与日志共用的终端；stdout 留给结果。"""


def make_bar(enabled: bool = True) -> Progress:
    """进度条：做了几个、任务的 ``status`` 字段、剩余时间；输出被重定向时什么也不画。"""
    return Progress(
        SpinnerColumn(),
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[status]}", markup=False),
        TimeRemainingColumn(),
        console=console,
        disable=not (enabled and console.is_terminal),
        transient=True,
    )


def track(
    items: Iterable[Item], description: str, total: int, *, at_least: int = 0
) -> Iterator[Item]:
    """给一段较长的工作一条自己的进度条；不足 ``at_least`` 个就不画。"""
    with make_bar(total >= at_least) as bar:
        task = bar.add_task(description, total=total, status=description)
        for item in items:
            yield item
            bar.advance(task)
