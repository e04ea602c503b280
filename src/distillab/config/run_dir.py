"""运行目录 ``runs/NAME/``：一次训练留下的全部文件，名字在这里定。"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import logging
import os
import platform
import re
import subprocess
import time
import uuid
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import ValidationError

from .. import __version__
from ..errors import DistillabError, shown
from ..files import idle, leftovers, replace_file, sweep
from ..parsing import differing, parse_json
from ..run_file_shapes import FINISHED, check
from .mixture import dated
from .model_sections import InitialLayers
from .recipes import dump_recipe, load_recipe
from .schema import Recipe
from .trust import check_trusted, remember

logger = logging.getLogger("distillab")

ID_FILE, INITIAL = "run_id", "initial.json"
_OLD_LEFTOVER = re.compile(
    r"\.(recipe\.yaml|(environment|summary|evaluation)\.json|report\.html)\.tmp|metrics\.tmp|"
    r"\.export\.\d+\.partial"
)
"""从前写到一半的文件与目录的名字。"""
_WAIT_SECONDS = 60.0
"""别的进程等主进程写下配方，至多这么久：各台机器也许没有共享的目录。"""

RUNS = Path("runs")
"""所有运行目录的上级，相对于当前目录。"""

CHANGEABLE = ("description", "evaluate.", "train.log_interval", "train.save_interval",
              "train.max_checkpoints", "train.report_to", "train.timeout_minutes",
              "train.batch_size", "train.gradient_accumulation_steps",
              "train.compile", "teacher.shard")  # fmt: skip
"""恢复时可以改的键：它们不影响参数的更新。批大小与累积可以换着来，一步的序列数不能变，读检查点时
查。
"""

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers",
            "safetensors", "pydantic", "numpy")  # fmt: skip


class RunDirectory:
    """一个运行目录；打开期间加锁，两次训练不会写进同一个目录。"""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_file = path / "recipe.yaml"
        self.environment_file = path / "environment.json"
        self.initial_file = path / INITIAL
        self.metrics_file = path / "metrics.jsonl"
        self.summary_file = path / "summary.json"
        self.evaluation_file = path / "evaluation.json"
        self.samples_file = path / "samples.jsonl"
        self.export = path / "export"
        self.plots = path / "plots"
        self.report = path / "report.html"
        self.checks = path / "checks"
        self.tokenizer = path / "tokenizer"
        self._lock = FileLock(path / ".lock")

    @classmethod
    def find(cls, name: str) -> RunDirectory:
        """按路径或名字找到已有的运行目录。"""
        for path in (Path(name), RUNS / name):
            if (path / "recipe.yaml").is_file():
                return cls(path)
        existing = sorted(entry.parent.name for entry in RUNS.glob("*/recipe.yaml"))
        hint = f"; runs here: {', '.join(existing)}" if existing else ""
        raise DistillabError(f"{name}: not a run directory (no recipe.yaml){hint}")

    @property
    def recipe(self) -> Recipe:
        """保存下来的、解析后的配方；它指名的代码不能就此运行，见 ``trusted_recipe``。"""
        return load_recipe(str(self.recipe_file))

    def trusted_recipe(self, trust: bool) -> Recipe:
        """要装配、要评测的配方：它指名的代码会被运行，见 ``check_trusted``。"""
        recipe = self.recipe
        check_trusted(self.recipe_file, recipe, trust)
        return recipe

    def checkpoint_dir(self, recipe: Recipe) -> Path:
        """检查点目录；见 ``checkpoint_dir``。"""
        return checkpoint_dir(self.path, recipe.train.checkpoint_dir)

    def dated(self, recipe: Recipe) -> Recipe:
        """模板写的日期定下来的配方：运行开始的那一天，恢复时是上次的，几个进程都听主进程的。不然模
        板明天渲染出的就是另一份数据，检查点接不上。
        """
        sources = recipe.data.sources
        if all(source.format != "chat" or source.today is not None for source in sources):
            return recipe
        day = self._saved_day()
        if os.environ.get("RANK", "0") != "0":
            deadline = time.monotonic() + _WAIT_SECONDS
            while day is None and time.monotonic() < deadline:
                time.sleep(0.1)
                day = self._saved_day()
        day = day or date.today()
        return recipe.model_copy(update={"data": dated(recipe.data, day)})

    def keeping_choice(self, recipe: Recipe) -> Recipe:
        """没有写怎样挑层的配方，恢复时照上次的：缺省会变，运行开始时的不变。"""
        init, saved = recipe.student.init, None
        with suppress(DistillabError):
            saved = self.recipe.student.init if self.recipe_file.exists() else None
        if init is None or saved is None or "choose" in init.model_fields_set:
            return recipe
        init = init.model_copy(update={"choose": saved.choose})
        student = recipe.student.model_copy(update={"init": init})
        return recipe.model_copy(update={"student": student})

    def _saved_day(self) -> date | None:
        with suppress(DistillabError):
            chat = self.recipe.data.chat if self.recipe_file.exists() else None
            return None if chat is None else chat.today
        return None

    def open(self, recipe: Recipe, resume: bool) -> None:
        """为训练打开目录：新建，或在 ``resume`` 时接着用同一份配方；加锁，直到退出 with。"""
        begun = self._begun()
        if begun and not self.recipe_file.exists():
            raise DistillabError(f"{self.path} exists but is not a run: it has no recipe.yaml")
        if begun and not resume:
            raise DistillabError(
                f"{self.path} exists; continue it with --resume, or name a new run with "
                f"--set name={_free_name(self.path)}"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock()
        if begun:
            self._check_same(recipe)
        else:
            self.initial_file.unlink(missing_ok=True)
        self.checkpoint_dir(recipe)
        run_id(self.path)
        if self.summary_file.exists() and self.summary is None:
            aside = self.summary_file.replace(self.path / "damaged-summary.json")
            logger.warning(f"{self.summary_file} is not a summary: moved to {aside}, written anew")
        replace_file(self.recipe_file, dump_recipe(recipe))
        remember(self.recipe_file, recipe)
        replace_file(self.environment_file, json.dumps(environment(), indent=1))

    def lock(self) -> None:
        """加锁，直到退出 with；清掉上次被杀留下的。"""
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise DistillabError(f"{self.path} is in use by another process") from None
        unlocked = (self.report, self.evaluation_file)  # 写它们的命令不拿锁
        shared = {left for file in unlocked for left in leftovers(self.path, file.name)}
        own = {left for place in (self.path, self.checks, self.plots) for left in leftovers(place)}
        old = {path for path in self.path.glob("*") if _OLD_LEFTOVER.fullmatch(path.name)}
        sweep((own - shared) | old | set(filter(idle, shared)))

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @property
    def summary(self) -> dict[str, Any] | None:
        """``summary.json``；训练还没有走完，或文件损坏时为 ``None``。"""
        with suppress(DistillabError, FileNotFoundError):
            name = str(self.summary_file)
            summary: dict[str, Any] = parse_json(self.summary_file.read_bytes(), name)
            check(summary, FINISHED, name)
            return summary
        return None

    @property
    def initial(self) -> InitialLayers | None:
        """``initial.json``；学生不是裁剪来的没有，从前的运行也没有。"""
        if not self.initial_file.exists():
            return None
        try:
            return InitialLayers.model_validate_json(self.initial_file.read_bytes())
        except ValidationError as error:
            raise DistillabError(
                f"{self.initial_file}: not the layers that the student began with "
                f"({error.errors()[0]['msg']}); delete it, and they are chosen again"
            ) from None

    def write_initial(self, initial: InitialLayers) -> None:
        """写 ``initial.json``；恢复时照它重建学生。"""
        replace_file(self.initial_file, initial.model_dump_json(indent=1, exclude_none=True))

    def write_summary(self, summary: dict[str, Any]) -> None:
        """写 ``summary.json``；它的存在表示这次运行已经走完。"""
        replace_file(self.summary_file, json.dumps(summary, indent=1))

    def _begun(self) -> bool:
        """除了配方与环境，是否还有别的文件：装配时就失败的运行可以直接重来。"""
        own = {self.recipe_file.name, self.environment_file.name, ID_FILE, INITIAL}
        return self.path.exists() and any(
            entry.name not in own and not entry.name.startswith(".")
            for entry in self.path.iterdir()
        )

    def _check_same(self, recipe: Recipe) -> None:
        both = [one.model_dump(mode="json") for one in (self.recipe, recipe)]
        for key, (before, now) in sorted(differing(both)):
            undated = key == "data.today" and before is None  # 从前的运行没有记下日期
            if not key.startswith(CHANGEABLE) and not undated:
                raise DistillabError(
                    f"{self.recipe_file}: {key} was {before!r} and is now {now!r}; a resumed run "
                    f"keeps its recipe: drop the change, or name a new run with --set name=..."
                )


def checkpoint_dir(run: Path, name: str) -> Path:
    """运行目录里的检查点目录，还不一定存在；经符号链接到了外面的不行：别的运行也许在用。"""
    path = run / name
    if not path.resolve().is_relative_to(run.resolve()):
        raise DistillabError(
            f"train.checkpoint_dir={name}: {path} leads out of the run, to {path.resolve()}: "
            f"link the whole run directory instead"
        )
    return path


def run_id(run: Path) -> str:
    """这次运行的 id，每个检查点都带着它；第一次问时随机定下，写进 ``run_id``。只由主进程调用。"""
    file = run / ID_FILE
    if not file.exists():
        run.mkdir(parents=True, exist_ok=True)
        replace_file(file, f"{uuid.uuid4().hex}\n")
    found = file.read_text(errors="replace").strip()
    if not re.fullmatch("[0-9a-f]{32}", found):
        raise DistillabError(
            f"{file}: expected the 32 hexadecimal digits of the run's id, found {shown(found)}: "
            f"copy them from state.run in a checkpoint's trainer_state.json"
        )
    return found


def exported_model(name: str) -> str:
    """一个模型的来源：运行目录的是它的 ``export/``，其余的原样返回。"""
    try:
        run = RunDirectory.find(name)
    except DistillabError:
        return name
    if not run.export.exists():
        raise DistillabError(f"{run.path}: nothing exported yet; run: distillab export {name}")
    return str(run.export)


def environment() -> dict[str, Any]:
    """版本、设备与 git 提交，写进 ``environment.json``。"""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "distillab": __version__,
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "devices": torch.cuda.device_count() if cuda else 0,
        "cpu_threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "git": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _free_name(path: Path) -> str:
    names = (f"{path.name}-{number}" for number in itertools.count(2))
    return next(name for name in names if not path.with_name(name).exists())
