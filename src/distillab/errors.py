"""使用者能自己改正的错误。命令行把它们印成一行、退出码 2，不带 traceback。"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class DistillabError(Exception):
    """输入有误：信息要说清是哪个键或文件、找到了什么、期望什么、最接近的合法选择。"""


def nearest(found: str, choices: Iterable[str], otherwise: str | None = None) -> str:
    """最接近 ``found`` 的合法选择，放在错误信息的结尾；没有相近的，是 ``otherwise`` 或列出全部。"""
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
    if isinstance(error, (LookupError, AttributeError)) and _first_line(error):
        return typed_reason(error)
    return _first_line(error) or type(error).__name__


def typed_reason(error: BaseException) -> str:
    """异常的名字与第一行话：别人的程序抛出的，名字总要说。"""
    return f"{type(error).__name__}: {_first_line(error) or 'no detail'}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


@contextmanager
def foreign(what: str) -> Iterator[None]:
    """读别人写的东西的边界：无论抛出什么，都变成 ``what: 原因`` 一行，原来的异常是 ``__cause__``。

    库对坏文件抛出的异常没有定数（``KeyError``、``RecursionError``、Rust 的 panic……），所以不列举。
    只包住对库的调用，不包自己的逻辑：自己的错要看得见 traceback。``DistillabError``、Ctrl-C 与退出
    原样通过。
    """
    try:
        yield
    except (DistillabError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # Rust 的 PanicException 不是 Exception
        raise DistillabError(f"{what}: {reason(error)}") from error


@contextmanager
def located(where: str) -> Iterator[None]:
    """其间的 ``DistillabError`` 以 ``where`` 开头。"""
    try:
        yield
    except DistillabError as error:
        raise DistillabError(f"{where}: {error}") from error


class Terminated(KeyboardInterrupt):
    """收到 SIGTERM（抢占式机器要收回、作业管理器要停）：与 Ctrl-C 同样收尾，退出码不同。"""


class HungUp(Terminated):
    """收到 SIGHUP：终端关了，或断线了。"""


def exit_code(stop: KeyboardInterrupt) -> int:
    """128 加信号的编号，与 shell 的习惯相同：SIGHUP 是 129，SIGTERM 是 143，Ctrl-C 是 130。"""
    if isinstance(stop, HungUp):
        return 129
    return 143 if isinstance(stop, Terminated) else 130
