"""构建文档时做的事：数 docstring，生成页面与表格，把公式变成 MathML，查页面不取网络上的东西。

MkDocs 的 hook；构建与阅读都不碰网络。
"""

from __future__ import annotations

import html
import logging
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))  # MkDocs 按文件装载 hook，旁边的模块要自己找

import docstrings
import memory_tables
import recipe_reference

logger = logging.getLogger("mkdocs.hooks.distillab")

_MATH = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)
_VERBATIM = re.compile(r"(<pre.*?</pre>)", re.DOTALL)
_CHINESE_BREAK = re.compile(
    r"(?<=[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef])\n\s*(?=[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef])"
)
_FETCHED = re.compile(
    r'<(?:script|img|iframe|source|link)\b(?![^>]*rel="(?:canonical|next|prev)")'
    r'[^>]*\s(?:src|href)="(?P<url>(?:https?:)?//[^"]*)"'
)
_TABLE = re.compile(r"<!-- memory: (?P<name>[\w-]+) -->")


def on_pre_build(**_: Any) -> None:
    """缺中文 docstring 的公开对象各是一个警告；strict 下构建因而失败。"""
    for name in docstrings.missing():
        logger.warning("%s has no Chinese docstring", name)


def on_files(files: Files, *, config: Any, **_: Any) -> Files:
    """加上由配置模型生成的配方参考。"""
    files.append(File.generated(config, "recipe.md", content=recipe_reference.page()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """算出「显存与时间」的表。"""
    return _TABLE.sub(lambda match: memory_tables.TABLES[match["name"]](), markdown)


def on_page_content(html_text: str, **_: Any) -> str:
    """公式变成 MathML：浏览器自己会画，不要脚本也不要字体。

    docstring 里的 role 只留名字；源文件里的换行落在两个汉字之间时，页面上不该是一个空格。
    """
    parts = _VERBATIM.split(html_text.replace(":func:<code>", "<code>"))
    parts[::2] = [_CHINESE_BREAK.sub("", part) for part in parts[::2]]
    return _MATH.sub(_mathml, "".join(parts))


def on_post_build(config: Any, **_: Any) -> None:
    """页面自己会去取的东西都在 ``site/`` 里；网络上的各是一个警告。"""
    for page in sorted(Path(config.site_dir).rglob("*.html")):
        for match in _FETCHED.finditer(page.read_text(encoding="utf-8")):
            logger.warning("%s fetches %s", page.name, match["url"])


def _mathml(match: re.Match[str]) -> str:
    block = match["tag"] == "div"
    return convert(html.unescape(match["latex"]), display="block" if block else "inline")
