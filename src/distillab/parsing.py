"""别人写的 JSON 与 YAML：读不懂就是一行，再大再深的也不会把时间、内存或栈用完。"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import yaml

from .errors import DistillabError, foreign

MAX_DEPTH = 100
"""最多套这么多层；我们自己的文件只有几层。"""
MAX_YAML_LENGTH = 2**20
"""一份 YAML 最多多少个字符：PyYAML 每兆要几秒。"""
MAX_YAML_VALUES = 100_000
"""别名展开之后最多有多少个值：``*a`` 套 ``*a`` 会成倍地增长。"""


def parse_json(text: str | bytes, where: str) -> Any:
    """读一段 JSON，文字或 UTF-8 的字节；``where`` 是出处，错在后面的行时会加上行号。"""
    with foreign(f"{where}: not valid JSON"):
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            at = where if error.lineno == 1 else f"{where}:{error.lineno}"
            raise DistillabError(
                f"{at}: not valid JSON: {error.msg} (column {error.colno})"
            ) from error
    # 括号少的不可能深；数一遍比走一遍快得多。
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_size(value, where, None)
    return value


def parse_yaml(text: str, where: str) -> Any:
    """读一段 YAML，``3e-4`` 是数，重复的键是错误；``*别名`` 展开成各自的值，改一处不会处处都变。"""
    if len(text) > MAX_YAML_LENGTH:
        raise DistillabError(
            f"{where}: holds {len(text):,} characters, expected at most {MAX_YAML_LENGTH:,}"
        )
    with foreign(f"{where}: not valid YAML"):
        try:
            value = yaml.load(text, Loader=_Loader)  # noqa: S506
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            at = f"{where}:{mark.line + 1}" if mark and "\n" in text else where
            problem = getattr(error, "problem", None) or "cannot be parsed"
            raise DistillabError(f"{at}: not valid YAML: {problem}") from error
    _check_size(value, where, MAX_YAML_VALUES)
    return _unshared(value)


class _Loader(yaml.SafeLoader):
    """SafeLoader，外加两条：``3e-4`` 是数，重复的键是错误。"""


_Loader.yaml_implicit_resolvers = {  # 复制一份，不改动 SafeLoader 自己的表
    key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(  # YAML 1.1 要求尾数带小数点，3e-4 因而成了字符串
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for position, key in enumerate(keys):
        if key in keys[:position]:
            raise yaml.constructor.ConstructorError(
                None, None, f"key '{key}' is given twice", node.value[position][0].start_mark
            )
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


def _check_size(value: Any, where: str, most: int | None) -> None:
    """一层一层地数，不用栈；共享的部分每次都算，所以展开之前就知道有多大。"""
    level: list[Any] = [value]
    count = 0
    for _ in range(MAX_DEPTH):
        count += sum(len(_inside(outer)) for outer in level)
        if most is not None and count > most:
            raise DistillabError(f"{where}: holds more than {most:,} values")
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
    raise DistillabError(f"{where}: nested more than {MAX_DEPTH} levels deep")


def _inside(value: Any) -> Collection[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def leaves(value: Any, prefix: str = "", *, empty: bool = False) -> Iterator[tuple[str, Any]]:
    """逐级的字典摊平：``("train.max_steps", 360)``；里面什么也没有的，``empty`` 时自己就是值。"""
    if isinstance(value, Mapping) and (value or not empty):
        for key, inner in value.items():
            yield from leaves(inner, f"{prefix}.{key}" if prefix else str(key), empty=empty)
    else:
        yield prefix, value


def differing(values: Sequence[Any], *, empty: bool = False) -> list[tuple[str, list[Any]]]:
    """几份逐级的字典里取值不同的键，各给出每一份的值（没有的为 ``None``）；``empty`` 见
    ``leaves``。
    """
    flat = [dict(leaves(value, empty=empty)) for value in values]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [(key, [one.get(key) for one in flat]) for key in keys]
    return [(key, row) for key, row in rows if any(value != row[0] for value in row)]


def _unshared(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value
