"""命令行的零件：退出码、``--resume auto``、印给人看的东西。重的导入都在函数里面。"""

from __future__ import annotations

import logging
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from .console import SafeFormatter, make_console, say
from .errors import DistillabError, HungUp, Terminated, exit_code


class Commands(TyperGroup):
    """Ctrl-C、SIGHUP 与 SIGTERM 各有退出码；typer 自己把它们都当作 130。"""

    def invoke(self, ctx: Any) -> Any:
        """执行命令。"""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            say(what(stop), error=True)
            raise typer.Exit(exit_code(stop)) from None


class ResumeAuto(TyperCommand):
    """``--resume`` 与 ``--resume auto`` 是一回事：后者的 ``auto`` 不能被当作配方。"""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """去掉紧跟着 ``--resume`` 的 ``auto``。"""
        args = ["--resume" if arg == "--resume=auto" else arg for arg in args]
        kept = [b for a, b in pairwise(["", *args]) if (a, b) != ("--resume", "auto")]
        return super().parse_args(ctx, kept)


def main_process() -> bool:
    """不是多进程，或者是其中管理运行目录、说话的那一个；不必等引擎起来。"""
    return os.environ.get("RANK", "0") == "0"


def what(stop: KeyboardInterrupt) -> str:
    """为什么停下，一个词。"""
    if isinstance(stop, HungUp):
        return "hung up"
    return "terminated" if isinstance(stop, Terminated) else "interrupted"


def print_written(path: Path) -> None:
    """写好的文件与它的大小。"""
    say(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


def print_tables(summary: dict[str, Any]) -> None:
    """一次训练结束时的表。"""
    from .report.terminal_tables import checks_table, closing_table

    terminal = make_console()
    for table in (closing_table(summary), checks_table(summary)):
        if table is not None:
            terminal.print(table)


def print_samples(path: Path) -> None:
    """``samples.jsonl`` 里的续写；没有就不印，读不懂的行说一声。"""
    from .parsing import parse_json

    content = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            row = parse_json(line, f"{path}:{number}")
            say(f"> {row['prompt']}{row['student']}\n")
        except (DistillabError, KeyError, TypeError):
            say(f"{path}:{number} is not a sample", error=True)


def quiet_libraries() -> None:
    """我们的日志走 stderr；别人的警告只留错误，输出被重定向时进度条也不要。"""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # 要在 tqdm 导入之前
    import transformers
    from rich.logging import RichHandler

    from .bars import console

    handler = RichHandler(console=console, show_path=False, show_level=False, markup=False,
                          highlighter=None, log_time_format="%H:%M:%S")  # fmt: skip
    handler.setFormatter(SafeFormatter())
    logger = logging.getLogger("distillab")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO if main_process() else logging.ERROR)  # 每句话只说一遍
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
