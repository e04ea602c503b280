"""一个检查点在磁盘上的样子：有哪些文件，缺了、坏了、是别的运行的，都看得出来。

``trainer_state.json`` 最后写，记着每个文件的大小与 sha256，也记着它自己的：读之前先对一遍。较早的
检查点没有摘要，只查 zip 自带的校验。
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import zipfile
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate.utils.constants import SCALER_NAME
from pydantic import TypeAdapter, ValidationError

from ..cache import file_sha256
from ..config.schema import TrainingConfig
from ..distributed.engine import Layout
from ..errors import DistillabError
from ..files import leftovers, remove, settle, sweep, sync
from .state import TrainerState

logger = logging.getLogger("distillab")

STATE_FILE = "trainer_state.json"
WEIGHTS_FILE = "model.safetensors"
BEST = "best"

_SEALED = {"state", "layout", "training_config", "files", "sha256"}
_UNSEALED = {"state", "layout", "training_config"}
_OURS = (".safetensors", ".bin", ".pkl", ".pt")
_LEFTOVER = re.compile(r"\.(step-\d{8}|best)\.(tmp|old)")


class DamagedCheckpoint(DistillabError):
    """检查点的文件缺失或损坏；更早的一个也许还好。"""


@dataclass(frozen=True)
class Digest:
    """一个文件写下时的大小与 sha256。"""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Saved:
    """``trainer_state.json`` 的内容；``files`` 是其余的文件，没有摘要的旧检查点是 ``None``。"""

    state: TrainerState
    layout: Layout
    files: dict[str, Digest] | None = None


_ADAPTER = TypeAdapter(Saved)


def seal(directory: Path, state: TrainerState, layout: Layout, config: TrainingConfig) -> None:
    """别的文件都写好之后，写下它们的摘要与训练进度，一起落盘；``config`` 只作记录。"""
    files = sorted(directory.iterdir())
    with ThreadPoolExecutor() as pool:  # 算摘要不占解释器
        digests = list(pool.map(file_sha256, files))
    values = {
        "state": asdict(state),
        "layout": asdict(layout),
        "training_config": config.model_dump(mode="json"),
        "files": {
            file.name: {"bytes": file.stat().st_size, "sha256": digest}
            for file, digest in zip(files, digests, strict=True)
        },
    }
    values = json.loads(json.dumps(values))
    text = json.dumps(values | {"sha256": _sha256(values)}, indent=1)
    (directory / STATE_FILE).write_text(text)
    settle(directory)


def read_saved(path: Path, run: str | None = None) -> Saved:
    """读 ``trainer_state.json``；损坏是 ``DamagedCheckpoint``，是别的运行的是 ``DistillabError``。

    ``run`` 是现在的运行的 id，``None`` 则不问是谁的。
    """
    damaged = DamagedCheckpoint(f"{path}: damaged checkpoint: {STATE_FILE} is not readable")
    try:
        values = json.loads((path / STATE_FILE).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedCheckpoint(f"{path}: not a checkpoint: {STATE_FILE} is missing") from None
    except (ValueError, RecursionError, IsADirectoryError):
        raise damaged from None
    if not isinstance(values, dict) or set(values) not in (_SEALED, _UNSEALED):
        raise damaged
    digest = values.pop("sha256", None)
    if digest is not None and digest != _sha256(values):
        raise DamagedCheckpoint(f"{path}: damaged checkpoint: {STATE_FILE} is not as it was saved")
    try:
        saved = _ADAPTER.validate_python(values)
    except (ValidationError, OverflowError):
        raise damaged from None
    if run is not None and saved.state.run not in (None, run):
        raise DistillabError(
            f"{path}: belongs to the run {saved.state.run}, this one is {run}: move it away, or, "
            f"if it belongs here, write its id into run_id"
        )
    return saved


def check_files(path: Path, saved: Saved, names: Collection[str]) -> None:
    """要读的文件 ``names`` 都在，也都是写下时的样子；否则是 ``DamagedCheckpoint``。"""
    for name in names:
        if not (path / name).is_file():
            raise DamagedCheckpoint(f"{path}: damaged checkpoint: {name} is missing")
    if saved.files is None:
        for name in names:
            if not name.endswith(".safetensors") and not _sound_zip(path / name):
                raise DamagedCheckpoint(f"{path}: damaged checkpoint: {name} is not readable")
        return
    for name in names:  # 先比大小：截断的不必读几 GB 才知道
        expected, found = saved.files.get(name), (path / name).stat().st_size
        if expected is None:
            raise DamagedCheckpoint(f"{path}: damaged checkpoint: {name} does not belong to it")
        if found != expected.bytes:
            raise DamagedCheckpoint(
                f"{path}: damaged checkpoint: {name} has {found:,} bytes, "
                f"expected {expected.bytes:,}"
            )
    with ThreadPoolExecutor() as pool:
        digests = dict(zip(names, pool.map(file_sha256, [path / n for n in names]), strict=True))
    for name, digest in digests.items():
        if digest != saved.files[name].sha256:
            raise DamagedCheckpoint(f"{path}: damaged checkpoint: {name} is not as it was saved")


def check_whole(path: Path, saved: Saved) -> None:
    """``check_files`` 一个完整的检查点的每个文件，不多也不少；别人放进来的说明之类不管。"""
    names = {WEIGHTS_FILE, "optimizer.bin", "scheduler.bin"}
    names |= {f"random_states_{rank}.pkl" for rank in range(saved.layout.processes)}
    if saved.files is None:
        names |= {SCALER_NAME} & {file.name for file in path.iterdir()}
    else:
        names |= saved.files.keys()
        names |= {file.name for file in path.iterdir() if file.suffix in _OURS}
    check_files(path, saved, sorted(names))


def checkpoints(directory: Path) -> list[Path]:
    """``directory`` 里完整的检查点，由旧到新；写到一半的不算。"""
    return sorted(directory.glob("step-" + "[0-9]" * 8))


def find_checkpoint(directory: Path, name: str) -> Path:
    """``best``、``last``、``directory`` 里的名字或一个路径所指的检查点。"""
    saved = checkpoints(directory)
    if name == BEST:
        path = directory / BEST
    elif name == "last":
        if not saved:
            raise DistillabError(f"{directory}: no checkpoint saved yet")
        path = saved[-1]
    else:
        path = next((p for p in (directory / name, Path(name)) if p.is_dir()), Path(name))
    if not path.is_dir():
        names = ", ".join(["last", *(p.name for p in saved)])
        raise DistillabError(f"{path}: no such checkpoint; choose from best, {names}")
    return path


# ---------------------------------------------------------------- 换与删


def publish(temporary: Path, target: Path) -> None:
    """写好的 ``temporary`` 改名为 ``target``；旧的先挪开：目录不能原子地替换。"""
    aside = target.with_name(f".{target.name}.old")
    if target.exists():
        remove(aside)
        target.rename(aside)
    temporary.rename(target)
    sync(target.parent)
    remove(aside)


def discard(path: Path) -> None:
    """删去一个检查点；先改名：删到一半被杀，剩下的不会被当作检查点。"""
    aside = path.with_name(f".{path.name}.old")
    remove(aside)
    path.rename(aside)
    remove(aside)


def set_aside(path: Path) -> Path:
    """损坏的检查点改名放到一边，返回新的路径。"""
    number, aside = 1, path.with_name(f"damaged-{path.name}")
    while aside.exists():
        number += 1
        aside = path.with_name(f"damaged-{path.name}-{number}")
    return path.rename(aside)


def tidy(directory: Path) -> None:
    """清掉被杀的训练写到一半的检查点；挪到一半的 ``best`` 放回去。只由主进程、训练之前调用。"""
    aside, best = directory / f".{BEST}.old", directory / BEST
    if aside.is_dir() and not best.exists():
        aside.rename(best)
    old = [path for path in directory.glob(".*") if _LEFTOVER.fullmatch(path.name)]
    sweep([*old, *leftovers(directory)])


def _sha256(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _sound_zip(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # 坏的 zip 有各种各样的错误
        return False
