"""磁盘缓存：放在哪里，以及怎样让「写到一半被杀」与「两个进程同时写」都不留下坏东西。

每个建好的目录带着一份 ``.contents.json``：每个文件的大小与 sha256，每次用之前对一遍，坏了就重建。
大小总是对，一共不到 256 MB 的摘要也对；更大的，对过之后又被写过（mtime 或 ctime 变了）才再读。
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import DistillabError, foreign
from .files import rename_directory, replace_file, sweep, temporary_beside, writing

logger = logging.getLogger("distillab")

_CONTENTS, _CHECKED = ".contents.json", ".checked.json"
_ALWAYS_READ = 256 << 20
_LEFTOVER = re.compile(r"\.(?P<target>.{,200})\.[0-9a-f]{12}(\.tmp)?")
"""建到一半的目录的名字，从前没有 ``.tmp``；截短过的长名字对不上锁，不算。"""


def cache_dir() -> Path:
    """缓存根目录：``DISTILLAB_CACHE`` 所指，没有设置则是 ``~/.cache/distillab``；不保证已存在。"""
    return expanded(os.environ.get("DISTILLAB_CACHE") or "~/.cache/distillab")


def expanded(path: str) -> Path:
    """开头的 ``~`` 换成家目录；不知道它在哪里的（没有 ``HOME`` 的容器）是错误。"""
    with foreign(f"{path}: where is '~'? Set HOME, or give a path without it"):
        return Path(path).expanduser()


def file_sha256(path: Path) -> str:
    """文件内容的 sha256，64 位小写十六进制。"""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sound(directory: Path) -> bool:
    """缓存里的 ``directory`` 在，而且与建好时相同。"""
    return directory.is_dir() and _damage(directory) is None


@contextmanager
def build_dir(target: Path) -> Iterator[Path]:
    """在 ``target`` 旁边的临时目录里构建，成功后一次改名到位：``target`` 要么不存在，要么完整。

    别的进程抢先建好了，就用它的，丢掉自己这份。缓存目录不可写是 ``DistillabError``。
    """
    temporary = temporary_beside(target)
    with writing(target, temporary):
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            raise _not_writable(target, error) from error
        yield temporary
        _record(temporary)
        if not rename_directory(temporary, target):
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def build_once(target: Path) -> Iterator[Path | None]:
    """同 ``build_dir``，但只有一个进程在建；``target`` 已经在了（也许刚刚等来）则给出 ``None``。

    锁由系统持有：建的进程被杀，锁随它而去，等着的进程接手重建，并清掉它留下的临时目录。``target``
    坏了时，日志里说一行，重建。
    """
    if sound(target):
        yield None
        return
    lock = _lock(target)
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            logger.info("waiting for another process to build %s", target)
            lock.acquire()
    except OSError as error:
        raise _not_writable(target, error) from error
    try:
        if sound(target):
            yield None
            return
        if target.is_dir():
            logger.warning("%s: damaged cache, building it again: %s", target, _damage(target))
            shutil.rmtree(target)
        _sweep(target)
        with build_dir(target) as temporary:
            yield temporary
    finally:
        lock.release()


def _lock(target: Path) -> FileLock:
    return FileLock(cache_dir() / "locks" / f"{target.parent.name}-{target.name}.lock")


def _sweep(target: Path) -> None:
    """清掉建到一半被杀的：``target`` 的锁在我们手里；别的，拿得到锁就没有人在建。"""
    for left in target.parent.glob(".*"):
        name = _LEFTOVER.fullmatch(left.name)
        if name is None or not left.is_dir():
            continue
        if name["target"] == target.name:
            sweep([left])
            continue
        with suppress(Timeout, OSError), _lock(target.with_name(name["target"])).acquire(0):
            sweep([left])


def _record(directory: Path) -> None:
    own = (_CONTENTS, _CHECKED)  # 从别的缓存目录整个拷来的也不算
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name not in own)
    contents = {
        path.relative_to(directory).as_posix(): [path.stat().st_size, file_sha256(path)]
        for path in files
    }
    (directory / _CONTENTS).write_text(json.dumps(contents))


def _damage(directory: Path) -> str | None:
    """与建好时不同在哪里，一句英文；相同则为 ``None``。"""
    try:
        with foreign(_CONTENTS):
            contents = json.loads((directory / _CONTENTS).read_bytes())
            expected = {
                str(name): (int(size), str(sha256)) for name, (size, sha256) in contents.items()
            }
    except DistillabError as error:
        missing = isinstance(error.__cause__, FileNotFoundError)
        return f"{_CONTENTS} is {'missing' if missing else 'not readable'}"
    stamps = {}
    for name, (size, _) in expected.items():
        try:
            found = (directory / name).lstat()
        except OSError:
            return f"{name} is missing"
        if found.st_size != size:
            return f"{name} has {found.st_size:,} bytes, expected {size:,}"
        stamps[name] = [found.st_mtime_ns, found.st_ctime_ns]
    large = sum(size for size, _ in expected.values()) > _ALWAYS_READ
    if large and _stamps(directory) == stamps:
        return None
    for name, (_, sha256) in expected.items():
        try:
            if file_sha256(directory / name) != sha256:
                return f"{name} is not as it was written"
        except OSError as error:  # 磁盘读不出这一块
            return f"{name}: {error.strerror}"
    if large:
        with suppress(OSError):  # 只读的缓存：下次再读一遍
            replace_file(directory / _CHECKED, json.dumps(stamps))
    return None


def _stamps(directory: Path) -> Any:
    """上次对摘要时各文件的 mtime 与 ctime，纳秒。"""
    with suppress(OSError, ValueError, RecursionError):
        return json.loads((directory / _CHECKED).read_bytes())


def _not_writable(target: Path, error: OSError) -> DistillabError:
    return DistillabError(
        f"cannot write to the cache at {target.parent}: {error.strerror}; "
        f"set DISTILLAB_CACHE to a writable directory"
    )
