"""使用者能自己改正的错误。命令行把它们印成一行、退出码 2，不带 traceback。"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


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


def reason(error: BaseException) -> str:
    """一个异常为什么发生，一行：它的第一行话；话里看不出所以然的，带上异常的名字。"""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    name = type(error).__name__
    if not said:
        return name
    return f"{name}: {said}" if isinstance(error, (LookupError, AttributeError)) else said


@contextmanager
def foreign(what: str) -> Iterator[None]:
    """读别人写的东西的边界：无论抛出什么，都变成 ``what: 原因`` 一行，原来的异常是 ``__cause__``。

    库对坏文件抛出的异常没有定数（``KeyError``、``RecursionError``、Rust 的 panic……），所以不列举。
    只包住对库的调用，不包自己的逻辑：自己的错要看得见 traceback。

    Args:
        what: 读不了的是什么，例如 ``cannot load model 'x'``。

    Raises:
        DistillabError: 其中抛出了异常；``DistillabError``、Ctrl-C 与退出原样通过。
    """
    try:
        yield
    except (DistillabError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # Rust 的 PanicException 不是 Exception
        raise DistillabError(f"{what}: {reason(error)}") from error


class Terminated(KeyboardInterrupt):
    """收到 SIGTERM（抢占式机器要收回、作业管理器要停）：与 Ctrl-C 同样收尾，退出码不同。"""


class HungUp(Terminated):
    """收到 SIGHUP：终端关了，或断线了。"""


def exit_code(stop: KeyboardInterrupt) -> int:
    """128 加信号的编号，与 shell 的习惯相同：SIGHUP 是 129，SIGTERM 是 143，Ctrl-C 是 130。"""
    if isinstance(stop, HungUp):
        return 129
    return 143 if isinstance(stop, Terminated) else 130
