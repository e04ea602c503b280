"""写文件只有这一处：整个换掉，一次改名到位；不跟随别人摆好的符号链接，磁盘满了说得清。

写到一半的东西叫 ``.NAME.<12 个十六进制>.tmp``，与目标在同一个目录里：名字猜不到，``O_EXCL`` 又保证
它是新建的，符号链接骗不了我们去改别的文件。出错就删掉；被杀留下的由名字认得出来。
"""

from __future__ import annotations

import errno
import logging
import os
import re
import resource
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .errors import DistillabError

logger = logging.getLogger("distillab")

TEMPORARY = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{12}\.tmp", re.DOTALL)
"""写到一半的文件与目录的名字；``target`` 是目标的名字，太长的截短过。"""

IDLE_MINUTES = 10

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NoRoom(OSError):
    """磁盘满了、超出配额，或文件超出上限；信息里有大小与剩下的空间，``filename`` 是要写的文件。"""


def temporary_beside(target: Path) -> Path:
    """``target`` 旁边一个还没有的、猜不到的名字；不建任何东西。"""
    name = os.fsdecode(os.fsencode(target.name)[:230])  # 文件名最多 255 字节
    return target.with_name(f".{name}.{secrets.token_hex(6)}.tmp")


def leftovers(directory: Path, target: str | None = None) -> list[Path]:
    """``directory`` 里写到一半的（``target`` 的，缺省为全部）；正在写的也在内，所以要先拿到锁。"""
    found = ((path, TEMPORARY.fullmatch(path.name)) for path in directory.glob(".*.tmp"))
    return sorted(path for path, match in found if match and target in (None, match["target"]))


def sweep(paths: Iterable[Path]) -> None:
    """删掉被杀的进程留下的文件与目录，并在日志里说。"""
    if not (left := sorted(paths)):
        return
    size = sum(_written(path) for path in left if not path.is_symlink())
    for path in left:
        remove(path)
    names = ", ".join(map(str, left))
    logger.info("removed what interrupted processes left: %s (%s)", names, _size(size))


def remove(path: Path) -> None:
    """删掉一个文件或目录；符号链接只删链接，没有也行。"""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def idle(path: Path) -> bool:
    """这个文件或目录有 ``IDLE_MINUTES`` 没有人写了：没有锁可看时，据此认定写它的进程不在了。"""
    inside = [path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]
    return time.time() - max(one.lstat().st_mtime for one in inside) > 60 * IDLE_MINUTES


def replace_file(path: Path, content: str | bytes) -> None:
    """整个换掉一个文件：任何时候被杀，留下的不是旧的就是新的；已经落盘才返回，出错时旧的还在。

    ``path`` 是符号链接时，换掉的是链接本身。文字写成 UTF-8，落单的 surrogate 写成 ``?``。
    """
    data = content.encode("utf-8", "replace") if isinstance(content, str) else content
    temporary = temporary_beside(path)
    with writing(path, temporary, len(data)):
        with open(temporary, "xb", opener=_not_following) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)


def open_to_append(path: Path) -> IO[bytes]:
    """打开一个文件，用 ``append`` 往后写；没有就新建，是符号链接就拒绝。"""
    refuse_link(path)
    return open(path, "ab", opener=_not_following)


def append(file: IO[bytes], data: bytes, sync: bool = True) -> None:
    """写到 ``open_to_append`` 打开的文件的末尾，``sync`` 时落盘才返回；写不完的一部分会截去。"""
    path, before = Path(file.name), os.fstat(file.fileno()).st_size
    with writing(path, path, len(data), discard=False):
        try:
            # 不经缓冲：写不下的一半留在缓冲里，关文件时会再写一次。
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(file.fileno(), rest) :]
            if sync:
                os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                os.ftruncate(file.fileno(), before)
            raise


def refuse_link(path: Path) -> None:
    """要在原地改动的文件或目录不能是符号链接：写下去的会是别处的。"""
    if path.is_symlink():
        raise DistillabError(
            f"{path} is a symbolic link to {path.readlink()}, expected a file or directory of its "
            f"own: name another place, or remove the link"
        )


@contextmanager
def replacing_directory(target: Path, wanted: int | None = None) -> Iterator[Path]:
    """在旁边的临时目录里写好，落盘，一次改名到位；出错时 ``target`` 没有动过。

    ``target`` 已经有了东西时，逐个换掉同名的文件，别的不动；是符号链接就拒绝。``wanted`` 是大约一共
    要写多少字节。
    """
    refuse_link(target)
    temporary = temporary_beside(target)
    with writing(target, temporary, wanted):
        temporary.mkdir(parents=True)
        yield temporary
        if not rename_directory(temporary, target):
            for file in sorted(temporary.iterdir()):
                file.replace(target / file.name)
            temporary.rmdir()
            sync(target)


def rename_directory(temporary: Path, target: Path) -> bool:
    """落盘，改名；那里已经有了不空的目录就什么也不动，返回 ``False``。"""
    settle(temporary)
    try:
        temporary.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        return False
    sync(target.parent)
    return True


@contextmanager
def writing(
    target: Path, temporary: Path, wanted: int | None = None, *, discard: bool = True
) -> Iterator[None]:
    """其间出错就删掉 ``temporary``（除非不 ``discard``）；错误说的是 ``target``。

    空间不够的换成 ``NoRoom``，说出一共要写 ``wanted`` 字节，没有它就说已经写了多少。
    """
    try:
        yield
    except BaseException as error:
        number, size = _no_room(error, temporary), _written(temporary)
        if discard:
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink(missing_ok=True)
        if number is not None:
            what = f"{_size(size)} written" if wanted is None else f"{_size(wanted)} to write"
            raise NoRoom(
                number, f"{os.strerror(number)}: {what}, {_free(target.parent)} free", str(target)
            ) from error
        if isinstance(error, OSError) and str(error.filename).startswith(str(temporary)):
            name = str(error.filename).replace(str(temporary), str(target), 1)
            raise OSError(error.errno, error.strerror, name) from error
        raise


def settle(directory: Path) -> None:
    """让一个目录里的一切落盘；文件的权限补到 umask 允许的样子（safetensors 建的只有属主可读）。"""
    allowed = directory.stat().st_mode & 0o666
    for parent, _, names in os.walk(directory):
        for path in (Path(parent, name) for name in names):
            if path.is_symlink():
                continue
            if (mode := path.stat().st_mode) | allowed != mode:
                path.chmod(mode | allowed)
            sync(path)
        sync(Path(parent))


def _not_following(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def sync(path: Path) -> None:
    """让一个文件的内容，或一个目录里的名字，落盘。"""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _no_room(error: BaseException, temporary: Path) -> int | None:
    """空间不够的话是哪一种；写文件的库各有自己的异常，Rust 的只在文字里有编号。"""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, NoRoom):
            return None  # 已经说清楚了
        if isinstance(link, OSError) and link.errno in _NO_ROOM:
            return link.errno
        text = str(link)
        if found := next((code for code in _NO_ROOM if os.strerror(code) in text), None):
            return found
        if isinstance(link, RuntimeError) and "inline_container" in text:
            return _probe(temporary)
        link = link.__cause__ or link.__context__
    return None


def _probe(directory: Path) -> int | None:
    """Torch 写不下时不说为什么：再写一点试试。"""
    try:
        with open(directory / secrets.token_hex(6), "xb", opener=_not_following) as file:
            file.write(bytes(1 << 20))
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno if error.errno in _NO_ROOM else None
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return None if limit == resource.RLIM_INFINITY else errno.EFBIG


def _written(temporary: Path) -> int:
    """写下了多少字节。"""
    found = (path.lstat() for path in (temporary, *temporary.rglob("*")) if path.is_file())
    return sum(status.st_size for status in found)


def _free(directory: Path) -> str:
    try:
        return _size(shutil.disk_usage(directory).free)
    except OSError:
        return "unknown"


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count:,} bytes"
