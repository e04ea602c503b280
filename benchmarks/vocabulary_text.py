"""中文文本：Debian 的几个帮助包里的网页与手册页，一页一篇，去掉标记。

python benchmarks/vocabulary_text.py text.jsonl  # 需要 apt-get 与 dpkg-deb，不安装任何东西
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

PACKAGES = ("libreoffice-help-zh-cn", "debian-reference-zh-cn", "manpages-zh")
_SHORTEST = 200
"""更短的页面多半只有标题。"""
_ROFF = re.compile(r"\\f[A-Z]|\\f\(..|\\[&|]|\\-|\\\(..|\\\*\(..|\\s[-+]?\d")
_CHINESE = re.compile(r"[\u4e00-\u9fff]")


class _Text(HTMLParser):
    """网页里的文字。"""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        """脚本与样式不算。"""
        self._hidden += tag in ("script", "style")
        if tag in ("p", "div", "li", "tr", "br", "h1", "h2", "h3", "pre", "dt", "dd"):
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        """见 ``handle_starttag``。"""
        self._hidden -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        """一段文字。"""
        if not self._hidden:
            self.parts.append(data)


def page(path: Path) -> str:
    """一个文件里的文字。"""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = content.decode("utf-8", "replace")
    if path.suffix == ".gz":
        lines = (line for line in text.splitlines() if not line.startswith((".", "'")))
        return _ROFF.sub("", "\n".join(lines))
    parser = _Text()
    parser.feed(text)
    lines = (" ".join(line.split()) for line in "".join(parser.parts).splitlines())
    return "\n".join(line for line in lines if line)


def pages(directory: Path) -> Iterator[str]:
    """解开的包里的中文页面；相同的只算一次。"""
    files = [*directory.rglob("*.html"), *directory.glob("usr/share/man/zh_CN/**/*.gz")]
    seen = set()
    for path in sorted(path for path in files if path.is_file() and not path.is_symlink()):
        text = page(path)
        chinese = len(_CHINESE.findall(text))
        if len(text) >= _SHORTEST and chinese >= len(text) / 10 and text not in seen:
            seen.add(text)
            yield text


def main(target: str) -> int:
    """下载、解开，写成 jsonl。"""
    articles = characters = 0
    with tempfile.TemporaryDirectory() as folder, Path(target).open("w", encoding="utf-8") as file:
        for package in PACKAGES:
            subprocess.run(["apt-get", "download", package], cwd=folder, check=True)
        for number, archive in enumerate(sorted(Path(folder).glob("*.deb"))):
            place = Path(folder) / f"unpacked-{number}"
            subprocess.run(["dpkg-deb", "-x", archive, place], check=True)
            for text in pages(place):
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                articles, characters = articles + 1, characters + len(text)
    print(f"{articles:,} pages, {characters:,} characters: {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
