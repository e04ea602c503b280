"""一份存着的配方要运行代码时，先问它是不是自己的。

命令行上给出的配方由使用者负责；运行目录却可以是别人的。训练开始时记下配方的摘要，记在家目录里：拷来
的目录带不来这条记录，改过的配方对不上它。
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from ..cache import expanded, file_sha256
from ..errors import DistillabError
from .schema import Recipe

logger = logging.getLogger("distillab")


def state_dir() -> Path:
    """只属于这个使用者的目录，不保证已存在；不是缓存，缓存可以几个人共用。"""
    return expanded(os.environ.get("XDG_STATE_HOME") or "~/.local/state") / "distillab"


def code_in(recipe: Recipe) -> Iterator[str]:
    """训练与评测这份配方时会运行的、配方自己指名的代码：``键=值``。"""
    for name, task in recipe.evaluate.tasks.items():
        if task.match is not None and task.match.function is not None:
            yield f"evaluate.tasks.{name}.match.function={task.match.function!r}"
    harness = recipe.evaluate.lm_eval
    if harness is not None and harness.include_path is not None:  # 任务的 YAML 里有 !function
        yield f"evaluate.lm_eval.include_path={harness.include_path!r}"
    if recipe.teacher is not None and recipe.teacher.trust_remote_code:
        yield f"teacher.trust_remote_code=true of {recipe.teacher.path!r}"
    if recipe.student.trust_remote_code:
        yield f"student.trust_remote_code=true of {recipe.student.path!r}"


def remember(file: Path, recipe: Recipe) -> None:
    """记下运行目录里刚写好的 ``file`` 是在这里、由这个使用者开始训练的；没有代码的不必记。"""
    if not any(code_in(recipe)):
        return
    try:
        record = _record(file)
        record.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        record.touch(mode=0o600)
    except (OSError, DistillabError) as error:
        logger.warning(
            f"cannot note that this run is yours ({error}): to evaluate or export it, give --trust"
        )


def check_trusted(file: Path, recipe: Recipe, trust: bool) -> None:
    """运行 ``file`` 这份配方指名的代码之前：没有代码、记得它，或使用者说了 ``--trust``。"""
    code = next(code_in(recipe), None)
    if code is None or trust:
        return
    try:
        known = _record(file).is_file()
    except DistillabError:  # 没有家目录，就什么也记不住
        known = False
    if not known:
        raise DistillabError(
            f"{file} was not written by a training started here, or has been changed, and names "
            f"code to run: {code}; read it, and give --trust where you trust it"
        )


def _record(file: Path) -> Path:
    return state_dir() / "recipes" / file_sha256(file)
