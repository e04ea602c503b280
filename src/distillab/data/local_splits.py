"""本地目录里哪些文件属于哪个 split：规则就是 ``datasets`` 的，由它来认。

``train.jsonl`` 与 ``test.jsonl``、``train/`` 与 ``dev/``、``data/train-00000-of-00002.parquet``，
``README.md`` 里的 ``configs``。读文件仍由自己来，所以这里只问它文件的归属。
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import DistillabError, foreign, nearest
from ..parsing import parse_yaml

CARD = "README.md"
_FRONT_MATTER = re.compile(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)


def split_files(path: Path, subset: str | None, suffixes: Sequence[str]) -> dict[str, list[Path]]:
    """目录里后缀在 ``suffixes`` 中的文件：split 到按路径排序的，至少一个；不分的全部是 ``train``。

    ``subset`` 是 ``README.md`` 里的一个 config，或一个子目录；缺省是缺省的 config，或目录自己。
    ``README.md`` 里的 ``configs`` 不得指向目录之外。
    """
    config = _config(path, subset)
    if config is not None:
        base = path / str(config.get("data_dir") or "")
    else:
        base = path / (subset or "")
        children = [child.name for child in path.iterdir() if child.is_dir()]
        if subset is not None and subset not in children:
            hint = nearest(subset, children) if children else "it has no directories"
            raise DistillabError(f"{str(path)!r} has no subset {subset!r}; {hint}")
    named = config.get("data_files") if config is not None else None
    splits = _patterns(base, named)
    found = {split: _resolved(base, one, suffixes) for split, one in splits.items()}
    found = {split: files for split, files in found.items() if files}
    if not found and named is None:
        # 照旧连隐藏的文件也读；数据集仓库自带的元数据也是 json，但不是文章。
        files = [file for file in base.rglob("*") if file.name != "dataset_infos.json"]
        found = {"train": sorted(file for file in files if file.suffix in suffixes)}
    if not any(found.values()):
        raise DistillabError(f"{str(base)!r} holds no {', '.join(suffixes)} file")
    return found


def _patterns(base: Path, named: Any) -> dict[str, list[str]]:
    """各个 split 的文件名的写法；没有写在 config 里，名字里也没有 split 的，一个也不给。"""
    from datasets import data_files

    with foreign(f"{str(base)!r}: cannot find its splits"):
        if named is not None:
            given = data_files.sanitize_patterns(named)
        else:
            given = {}
            with suppress(FileNotFoundError):  # 一个文件也没有
                given = data_files.get_data_patterns(glob.escape(str(base.resolve())))
            if given == data_files.DEFAULT_PATTERNS_ALL:
                given = {}
    return {str(split): list(patterns) for split, patterns in given.items()}


def _config(path: Path, subset: str | None) -> Mapping[str, Any] | None:
    """``README.md`` 里的 config；没有写 ``configs``，或 ``subset`` 是子目录时为 ``None``。"""
    card = path / CARD
    if not card.is_file():
        return None
    front = _FRONT_MATTER.match(card.read_text(encoding="utf-8-sig", errors="replace"))
    values = parse_yaml(front[1], str(card)) if front else None
    if not isinstance(values, dict) or not values.get("configs"):
        return None
    from datasets.utils.metadata import MetadataConfigs

    with foreign(f"{card}: configs"):
        configs = MetadataConfigs.from_dataset_card_data(values)
        default = configs.get_default_config_name()
    names = [str(name) for name in configs]
    name = default if subset is None else subset
    if name is None:
        hint = nearest("", names)
        raise DistillabError(f"{card} has several configs and no default: set subset; {hint}")
    if name not in configs:
        if (path / name).is_dir():
            return None
        raise DistillabError(f"{str(path)!r} has no subset {name!r}; {nearest(name, names)}")
    config: Mapping[str, Any] = configs[name]
    for place in _places(config):
        leaves = ".." in re.split(r"[/\\]", place) or Path(place).is_absolute()
        if leaves or "::" in place or "://" in place:
            raise DistillabError(
                f"{card}: config {name!r} names {place!r}, expected a path inside {str(path)!r}"
            )
    return config


def _places(config: Mapping[str, Any]) -> list[str]:
    """Config 写到的全部路径。"""
    places: list[Any] = [config.get("data_dir") or ""]
    given = config.get("data_files") or []
    for one in given if isinstance(given, list) else [given]:
        inner = one["path"] if isinstance(one, dict) else one
        places += inner if isinstance(inner, list) else [inner]
    return [str(place) for place in places]


def _resolved(base: Path, patterns: Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    """``patterns`` 指的文件里能读的，写成在 ``base`` 之下的样子。"""
    from datasets.data_files import resolve_pattern

    root = base.resolve()
    found: set[Path] = set()
    for pattern in patterns:
        with foreign(f"{str(base)!r}: cannot find its splits"), suppress(FileNotFoundError):
            found.update(map(Path, resolve_pattern(str(pattern), glob.escape(str(root)))))
    return sorted(base / file.relative_to(root) for file in found if file.suffix in suffixes)
