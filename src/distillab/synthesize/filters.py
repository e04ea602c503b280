"""留下哪些教师回答：``exact``、``regex`` 与使用者自己的函数。"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..config.sections import FilterConfig
from ..errors import DistillabError, foreign, nearest

Filter = Callable[[Mapping[str, Any], "str | None", str], bool]
"""``(record, answer, response)`` → 留不留。"""

_FINAL_PUNCTUATION = ".,;:!?…。，；：！？、"  # 不含 % 与括号：它们是答案的一部分


def make_filter(config: FilterConfig | None, where: str = "synthesize.filter") -> Filter:
    """由配置得到过滤函数，``None`` 是全部留下；写错的正则与找不到的函数在提第一个问题之前就拒绝，以
    配方里的键 ``where`` 开头。使用者的函数抛出的异常原样传出。
    """
    if config is None:
        return lambda record, answer, response: True
    if config.regex is not None:
        return _regex_filter(config.regex, where)
    if config.function is not None:
        return _function_filter(config.function, where)
    return lambda record, answer, response: normalise(response) == normalise(answer or "")


def needs_answer(config: FilterConfig | None) -> bool:
    """过滤时要不要记录里的 ``answer``；函数自己读 ``record``，不算。"""
    return config is not None and (config.exact or "{answer}" in (config.regex or ""))


def normalise(text: str) -> str:
    """``exact`` 比较之前的形式：不分大小写，空白合成一个空格，去掉末尾的标点。"""
    return " ".join(text.casefold().split()).rstrip(_FINAL_PUNCTUATION + " ")


def _regex_filter(template: str, where: str) -> Filter:
    # 只替换 {answer}，不用 str.format：正则里的 {2,3} 不是占位符。
    def pattern(answer: str) -> re.Pattern[str]:
        return re.compile(template.replace("{answer}", re.escape(answer)))

    with foreign(f"{where}.regex {template!r} is not a regular expression"):
        pattern("answer")
    return lambda record, answer, response: pattern(answer or "").search(response) is not None


def _function_filter(name: str, where: str) -> Filter:
    module_name, _, function_name = name.partition(":")
    where = f"{where}.function {name!r}"
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # 使用者的模块在导入时可能抛出任何异常
        raise DistillabError(
            f"{where}: cannot import {module_name} from {here} or the installed modules: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        # 留在末尾：函数里晚些时候的 import 还找得到旁边的模块，又挡不住别人的同名模块。
        sys.path.remove(here)
        if here not in sys.path:
            sys.path.append(here)
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        hint = f"; {nearest(function_name, names)}" if names else ""
        raise DistillabError(f"{where}: {module_name} has no function {function_name}{hint}")

    def judge(record: Mapping[str, Any], answer: str | None, response: str) -> bool:
        verdict = function(record, response)
        if type(verdict).__name__ not in ("bool", "bool_"):  # bool_ 是 numpy 的
            raise TypeError(f"it returned {verdict!r}, expected True or False")
        return bool(verdict)

    return judge
