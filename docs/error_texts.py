"""源码里使用者会遇到的报错，与「故障排除」页引用的是否一致。

一条报错是 ``raise`` 的那段文字，其中算出来的部分写成 ``…``。页面的每一条以反引号引着它，
两边对不上就是页面过时了。

python docs/error_texts.py
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "distillab"
PAGE = ROOT / "docs" / "troubleshooting.md"

USER_ERRORS = {"DistillabError", "DamagedCheckpoint", "_HopelessError"}
RECIPE_MODULES = {
    "schema",
    "sections",
    "model_sections",
    "layouts",
    "width_sections",
    "conversations",
    "forms",
    "style",
}
"""这些模块里的 ``ValueError`` 会被接住，变成使用者看到的一行。"""

_ENTRY = re.compile(r"^`(?P<text>[^`]+)`(\{[^}]*\})?$", re.MULTILINE)
_FORMATS = re.compile(r"%[sdg]|\{\}")
"""日志与 ``str.format`` 的占位符。"""
_PLACEHOLDERS = re.compile("[…\\s]*…[…\\s]*")


def raised(package: Path = PACKAGE) -> dict[str, str]:
    """源码抛给使用者的全部报错。

    Args:
        package: 源码目录。

    Returns:
        报错的文字 -> 出处 ``模块:行号``；整段都是算出来的不算。
    """
    found: dict[str, str] = {}
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for text, line in _foreign(tree):
            found.setdefault(text, f"{path.stem}:{line}")
        kinds = USER_ERRORS | ({"ValueError"} if path.stem in RECIPE_MODULES else set())
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                called = ast.unparse(node.exc.func)
                if called in kinds and node.exc.args:
                    text = _text(node.exc.args[0])
                    if re.search(r"\w\w", text):
                        found.setdefault(text, f"{path.stem}:{node.lineno}")
    return found


def strings(package: Path = PACKAGE) -> list[str]:
    """源码里的全部字符串：引用的可以是一条报错的一部分，也可以是一条日志。"""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(package.rglob("*.py"))]
    found = [
        _text(node)
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, (ast.JoinedStr, ast.BinOp))
        or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    ]
    found += [text for tree in trees for text, _ in _foreign(tree)]
    return found + [_FORMATS.sub("…", text) for text in found]


def quoted(page: Path = PAGE) -> list[str]:
    """页面引用的报错。"""
    return [match["text"] for match in _ENTRY.finditer(page.read_text(encoding="utf-8"))]


def stale(page: Path = PAGE, package: Path = PACKAGE) -> list[str]:
    """页面引用了、源码里却没有的。"""
    known = [_key(text) for text in strings(package)]
    return [text for text in quoted(page) if not any(_key(text) in other for other in known)]


def unexplained(page: Path = PAGE, package: Path = PACKAGE) -> list[str]:
    """源码会抛出、页面却没有讲的。"""
    explained = [_key(text) for text in quoted(page)]
    return [
        f"{where}: {text}"
        for text, where in raised(package).items()
        if not any(part in _key(text) for part in explained)
    ]


def _foreign(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """``errors.foreign`` 的边界：它的话，后面跟着原因。"""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "foreign":
            text = _text(node.args[0])
            if re.search(r"\w\w", text):
                yield f"{text}: …", node.lineno


def _key(text: str) -> str:
    """几个相连的占位符是一个；首尾的与空白的多少不计。"""
    return _PLACEHOLDERS.sub("…", " ".join(text.split())).strip("… ")


def _text(node: ast.AST) -> str:
    return "".join(_parts(node))


def _parts(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        for value in node.values:
            yield from _parts(value)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield from _parts(node.left)
        yield from _parts(node.right)
    else:
        yield "…"


if __name__ == "__main__":
    problems = [f"no longer in the source: {text}" for text in stale()]
    problems += [f"not explained: {text}" for text in unexplained()]
    print(*problems, sep="\n")
    sys.exit(bool(problems))
