"""使用者能自己改正的错误。命令行把它们印成一行、退出码 2，不带 traceback。"""

import difflib
from collections.abc import Iterable


class DistillabError(Exception):
    """输入有误：信息要说清是哪个键或文件、找到了什么、期望什么、最接近的合法选择。"""


def nearest(found: str, choices: Iterable[str], otherwise: str | None = None) -> str:
    """给出最接近 ``found`` 的合法选择，供错误信息结尾使用。

    Args:
        found: 使用者写下的名字。
        choices: 合法的名字。
        otherwise: 没有相近的时说什么；名字多得列不下才需要。

    Returns:
        ``"did you mean 'x'?"``；没有相近的就列出全部：``"choose from a, b"``。
    """
    names = sorted(choices)
    close = difflib.get_close_matches(found, names, n=1)
    if close:
        return f"did you mean '{close[0]}'?"
    return otherwise or f"choose from {', '.join(names)}"


def shown(text: str) -> str:
    """一段文字写进错误信息的样子：加引号，太长则截短。"""
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


def some(names: Iterable[str]) -> str:
    """最多列出三个名字；一个也没有是 ``none``。"""
    listed = [shown(name) for name in names]
    return ", ".join(listed[:3]) + ", ..." * (len(listed) > 3) or "none"


class Terminated(KeyboardInterrupt):
    """收到 SIGTERM（抢占式机器要收回、作业管理器要停）：与 Ctrl-C 同样收尾，退出码不同。"""


def exit_code(stop: KeyboardInterrupt) -> int:
    """128 加信号的编号，与 shell 的习惯相同：SIGTERM 是 143，Ctrl-C 是 130。"""
    return 143 if isinstance(stop, Terminated) else 130
