"""印到终端上的一切都经过这里：数据、样例、服务的话与文件名里的控制字符只显示，不起作用。

模型与数据写得出任何字符；终端却会把其中一些当作命令：改写屏幕、改标题、往剪贴板里放东西，或者让文字
倒着显示。rich 的标记（``[bold]``）同样只是文字：表里的名字由使用者取。
"""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_GONE = {errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ECONNRESET}

# C0（换行与制表除外）、DEL、C1、双向文字的嵌入与隔离；落单的 surrogate 根本印不出。
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def safe(text: str) -> str:
    r"""控制字符换成看得见的写法，如 ``\x1b``、``\u202e``；别的字符与换行、制表原样。"""
    return _CONTROLS.sub(lambda match: ascii(match.group())[1:-1], text)


def say(text: object, *, error: bool = False, end: str = "\n") -> None:
    """印一段文字，或有 ``str`` 的东西，立即可见。"""
    print(safe(str(text)), end=end, file=sys.stderr if error else sys.stdout, flush=True)


class _Outlives(io.FileIO):
    """stdout 或 stderr 的文件描述符；那头没有人了，以后的话就丢掉，不再是错误。"""

    def write(self, data: Any) -> int:
        """同 ``FileIO.write``。"""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno in _GONE:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.fileno())  # C 的库与子进程也写向这里
                os.close(nowhere)
            elif self.fileno() != 2:  # 结果写不进满了的磁盘是错误，日志不是
                raise
            return memoryview(data).nbytes


def outlive_terminal() -> None:
    """从此终端关了、管道那头没了、日志所在的磁盘满了，都不会让印东西的人失败。"""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):  # 测试与 notebook 换过的
            continue
        if stream is None:  # 启动时就关着
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
            continue
        outliving = io.TextIOWrapper(
            io.BufferedWriter(_Outlives(stream.fileno(), "wb", closefd=False)),
            stream.encoding,
            stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, outliving)


def make_console(**options: Any) -> Console:
    """Rich 的终端，文字里的控制字符与标记都只是文字；选项同 ``rich.console.Console``。"""
    kind: type[Console] = _console_class()
    return kind(**{"markup": False, "emoji": False, **options})


@lru_cache(maxsize=1)
def _console_class() -> type[Console]:
    from rich.console import Console

    class SafeConsole(Console):
        """表格的每一格、标题与说明都由 ``render_str`` 变成文字。"""

        def render_str(self, text: str, **options: Any) -> Any:
            return super().render_str(safe(text), **options)

    return SafeConsole


class SafeFormatter(logging.Formatter):
    """日志的文字，控制字符只显示。"""

    def format(self, record: logging.LogRecord) -> str:
        """同 ``logging.Formatter``。"""
        return safe(super().format(record))
