"""测试共用：``distillab synthesize`` 留下的那些行。"""

from pathlib import Path
from typing import Any

from distillab.data.responses import read_rows


def kept_rows(path: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(path) if row["kept"] is True]
