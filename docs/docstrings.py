"""数一数公开的对象里有几个带中文 docstring：要求是全部。

公开的是模块，以及模块与公开的类里不以下划线开头的类、函数、方法、property。命令行的命令除外：
它们的 docstring 是英文的帮助。

python docs/docstrings.py
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "distillab"
_CHINESE = re.compile(r"[\u4e00-\u9fff]")
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def public_objects(package: Path = PACKAGE) -> Iterator[tuple[str, bool]]:
    """逐个给出公开的对象。

    Args:
        package: 源码目录。

    Yields:
        ``(带点的名字, 有没有中文 docstring)``。
    """
    for path in sorted(package.rglob("*.py")):
        if path.stem != "__main__":
            module = path.stem.replace("__init__", package.name)
            yield from _documented(module, ast.parse(path.read_text(encoding="utf-8")))


def missing(package: Path = PACKAGE) -> list[str]:
    """缺中文 docstring 的公开对象。"""
    return [name for name, has in public_objects(package) if not has]


def _documented(name: str, node: _Documented) -> Iterator[tuple[str, bool]]:
    yield name, bool(_CHINESE.search(ast.get_docstring(node) or ""))
    if isinstance(node, (ast.Module, ast.ClassDef)):
        for child in _statements(node.body):
            if isinstance(child, _Documented) and not _is_private_or_command(child):
                yield from _documented(f"{name}.{child.name}", child)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """``if TYPE_CHECKING`` 之类的里面也算。"""
    for statement in body:
        yield statement
        if isinstance(statement, (ast.If, ast.Try)):
            yield from _statements([*statement.body, *statement.orelse])


def _is_private_or_command(node: _Documented) -> bool:
    return node.name.startswith("_") or any(
        isinstance(call, ast.Call) and ast.unparse(call.func) == "app.command"
        for call in node.decorator_list
    )


if __name__ == "__main__":
    found = dict(public_objects())
    lacking = [name for name, has in found.items() if not has]
    print(*lacking, sep="\n")
    print(f"{len(found) - len(lacking)} of {len(found)} public objects have a Chinese docstring")
    sys.exit(bool(lacking))
