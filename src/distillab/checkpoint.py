"""一次训练能从什么地方接着来：完整的检查点、``best``、写到一半被杀也不留下坏文件。

``checkpoints/step-00000100/`` 是学生、optimizer、scheduler 与各进程的随机数，加上
``trainer_state.json``；``checkpoints/best/`` 只有学生的权重。冻结的参数（LoRA 的基座）不存：它们
从未变过，配方说了从哪里读。权重与 optimizer 总是完整的张量，与引擎和进程数无关：分片的收齐了再写，
换一个引擎、换几个进程也读得回来。
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.checkpointing import load_accelerator_state, save_accelerator_state
from accelerate.utils import gather_object, set_seed
from accelerate.utils.constants import SCALER_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .config import TrainingConfig
from .errors import DistillabError
from .layout import Layout
from .on_policy import RolloutGuard
from .optimizer_state import WholeOptimizer
from .sharding import place, reshard, shape, whole
from .trainer_state import TrainerState

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("distillab")

STATE_FILE = "trainer_state.json"
WEIGHTS_FILE = "model.safetensors"
BEST = "best"


class DamagedCheckpoint(DistillabError):
    """检查点的文件缺失或损坏；更早的一个也许还好。"""


def save_checkpoint(
    accelerator: Accelerator, directory: Path, state: TrainerState, config: TrainingConfig
) -> Path:
    """把完整状态写进 ``directory/step-N``，再删去多余的旧检查点。所有进程都要调用。

    Args:
        accelerator: 已 ``prepare`` 过学生、optimizer 与 scheduler。
        directory: 检查点目录。
        state: 训练进度。
        config: 训练超参数；``max_checkpoints`` 决定留几个。

    Returns:
        检查点的路径。
    """
    target = directory / f"step-{state.current_step:08d}"

    (module,), (optimizer,) = accelerator._models, accelerator._optimizers

    def write(temporary: Path) -> None:
        save_accelerator_state(
            str(temporary),
            [_weights(accelerator, module)],
            [WholeOptimizer(accelerator, optimizer, module)],
            accelerator._schedulers,
            dataloaders=[],
            process_index=accelerator.process_index,
            step=accelerator.step,
            scaler=accelerator.scaler,
        )
        _write_state(temporary, state, config, accelerator)

    _write_then_rename(accelerator, target, write)
    if accelerator.is_main_process:
        for old in checkpoints(directory)[: -config.max_checkpoints]:
            shutil.rmtree(old)
    return target


def save_best(
    accelerator: Accelerator,
    module: nn.Module,
    directory: Path,
    state: TrainerState,
    config: TrainingConfig,
) -> None:
    """把学生的权重写进 ``directory/best``，替换原来的。所有进程都要调用。"""

    def write(temporary: Path) -> None:
        weights = _weights(accelerator, module)
        accelerator.save(weights, temporary / WEIGHTS_FILE, safe_serialization=True)
        _write_state(temporary, state, config, accelerator)

    _write_then_rename(accelerator, directory / BEST, write)


def checkpoints(directory: Path) -> list[Path]:
    """``directory`` 里完整的检查点，由旧到新；写到一半的不算。"""
    return sorted(directory.glob("step-" + "[0-9]" * 8))


def resume_newest(
    accelerator: Accelerator, directory: Path, data: str | None, config: TrainingConfig
) -> tuple[TrainerState, Path] | None:
    """从最新的完整检查点恢复；它损坏了就改名放到一边，退到前一个。所有进程都要调用。

    Args:
        accelerator: 已 ``prepare`` 过学生、optimizer 与 scheduler。
        directory: 检查点目录。
        data: 见 ``load_checkpoint``。
        config: 见 ``load_checkpoint``。

    Returns:
        ``(训练进度, 检查点)``；一个检查点也没有是 ``None``。

    Raises:
        DistillabError: 没有一个读得出（说的是最新的那一个），或见 ``load_checkpoint``。
    """
    damaged: dict[Path, DamagedCheckpoint] = {}
    for path in reversed(checkpoints(directory)):
        error, state = None, None
        try:
            state = load_checkpoint(accelerator, path, data, config)
        except DamagedCheckpoint as found:
            error = found
        others = [text for text in gather_object([str(error or "")]) if text]  # 一起决定
        if state is not None and not others:
            if accelerator.is_main_process:
                for bad, reason in damaged.items():
                    aside = bad.rename(bad.with_name(f"damaged-{bad.name}"))
                    logger.warning("%s; moved to %s", reason, aside)
            accelerator.wait_for_everyone()
            return state, path
        damaged[path] = error or DamagedCheckpoint(others[0])
    for reason in damaged.values():
        raise reason
    return None


def load_checkpoint(
    accelerator: Accelerator,
    path: Path,
    data: str | None = None,
    config: TrainingConfig | None = None,
) -> TrainerState:
    """恢复 ``save_checkpoint`` 存下的一切，不论那时是哪个引擎、几个进程。所有进程都要调用。

    Args:
        accelerator: 已 ``prepare`` 过学生、optimizer 与 scheduler。
        path: 检查点的路径。
        data: 现在的训练数据的指纹；换了数据，记下的位置就没有意义。
        config: 现在的超参数，用来换算位置；缺省当作没有变。

    Raises:
        DistillabError: 文件缺失或损坏，形状与当前模型不符，训练数据不是原来的，或一步的序列数变了。
    """
    state = read_state(path)
    if state.data != data:
        raise DistillabError(
            f"{path}: the training data differs from what this run began with: restore "
            f"data.source, or name a new run with --set name=..."
        )
    layout = Layout.read(path / STATE_FILE)
    same = config is None or layout.processes == accelerator.num_processes
    names = [f"random_states_{accelerator.process_index if same else 0}.pkl", "scheduler.bin"]
    if not (path / WEIGHTS_FILE).is_file():
        raise DamagedCheckpoint(f"{path}: damaged checkpoint: {WEIGHTS_FILE} is missing")
    for name in names:
        if not (path / name).is_file():
            raise DamagedCheckpoint(f"{path}: damaged checkpoint: {name} is missing")
        if not zipfile.is_zipfile(path / name):  # 读不出随机状态时，Accelerate 会不声不响地继续
            raise DamagedCheckpoint(f"{path}: damaged checkpoint: {name} is not readable")
    (module,), (optimizer,) = accelerator._models, accelerator._optimizers
    scaler = accelerator.scaler if (path / SCALER_NAME).is_file() else None

    def load() -> None:
        _load_weights(accelerator.unwrap_model(module), path)
        load_accelerator_state(
            str(path),
            models=[],
            optimizers=[WholeOptimizer(accelerator, optimizer, module)],
            schedulers=accelerator._schedulers,
            dataloaders=[],
            process_index=accelerator.process_index,
            scaler=scaler,
        )

    _load(path, load)
    if config is None or layout == (now := Layout.of(accelerator, config)):
        return state
    if layout.processes != now.processes:
        set_seed(config.seed + state.current_step, device_specific=True)
    return replace(state, batches_in_epoch=layout.moved(state.batches_in_epoch, path, now))


def load_student(student: nn.Module, path: Path) -> TrainerState:
    """只把学生的权重从检查点（或 ``best``）读进 ``student``。

    Args:
        student: 结构与保存时相同的模型。
        path: 检查点目录。

    Returns:
        检查点的训练进度。

    Raises:
        DistillabError: 没有检查点、文件损坏，或形状与 ``student`` 不符。
    """
    state = read_state(path)
    if not (path / WEIGHTS_FILE).is_file():
        raise DamagedCheckpoint(f"{path}: damaged checkpoint: {WEIGHTS_FILE} is missing")
    holder = nn.Module()
    holder.student = student  # 检查点存的是 DistillationModule，权重名带 student. 前缀
    _load(path, lambda: _load_weights(holder, path))
    return state


def find_checkpoint(directory: Path, name: str) -> Path:
    """由名字找到一个检查点。

    Args:
        directory: 检查点目录。
        name: ``best``、``last``、``directory`` 里的名字，或检查点的路径。

    Raises:
        DistillabError: 没有这样的检查点。
    """
    if name == BEST:
        path = directory / BEST
    elif name == "last":
        saved = checkpoints(directory)
        if not saved:
            raise DistillabError(f"{directory}: no checkpoint saved yet")
        path = saved[-1]
    else:
        path = next((p for p in (directory / name, Path(name)) if p.is_dir()), Path(name))
    if not path.is_dir():
        names = ", ".join(["last", *(p.name for p in checkpoints(directory))])
        raise DistillabError(f"{path}: no such checkpoint; choose from best, {names}")
    return path


def _frozen(module: nn.Module) -> set[str]:
    """不训练的参数的名字，绑定的参数的每个名字都在内。"""
    named = module.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if not parameter.requires_grad}


def _weights(accelerator: Accelerator, module: nn.Module) -> dict[str, Tensor]:
    """除冻结的参数以外的一切，完整的，在 CPU 上，绑定的只有一份；不是主进程的只参加通信。"""
    module = accelerator.unwrap_model(module)
    reshard(module)
    frozen, kept, seen = _frozen(module), {}, set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name in frozen or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        value = whole(tensor)
        if accelerator.is_main_process:
            kept[name] = value.to("cpu").contiguous()
    return kept


def read_state(path: Path) -> TrainerState:
    """读 ``trainer_state.json``。

    Raises:
        DistillabError: 不是检查点，或文件损坏。
    """
    try:
        values = json.loads((path / STATE_FILE).read_text())["state"]
        values.setdefault("failed_rows", 0)  # 较早的检查点没有这两项
        values.setdefault("stream", None)
        values["guard"] = RolloutGuard(**values["guard"])
        return TrainerState(**{f.name: values[f.name] for f in fields(TrainerState)})
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path}: not a checkpoint: {STATE_FILE} is missing") from None
    except (ValueError, KeyError, TypeError):
        raise DamagedCheckpoint(
            f"{path}: damaged checkpoint: {STATE_FILE} is not readable"
        ) from None


def _load_weights(module: nn.Module, path: Path) -> None:
    """读入除冻结的参数以外的一切，不多也不少；分片的各取自己的一片。"""
    reshard(module)
    targets, frozen = module.state_dict(keep_vars=True), _frozen(module)
    with safe_open(path / WEIGHTS_FILE, "pt") as file:
        names = set(file.keys())
        given = {id(targets[name]) for name in names & targets.keys()}
        absent = {name for name, tensor in targets.items() if id(tensor) not in given} - frozen
        if absent:
            raise DistillabError(f"{path}: holds another model: {min(absent)} is missing")
        if unexpected := names - targets.keys():
            name = min(unexpected)
            raise DistillabError(f"{path}: holds another model: {name} has no place in it")
        for name in sorted(names):
            found, expected = file.get_slice(name).get_shape(), list(shape(targets[name]))
            if found != expected:
                raise DistillabError(
                    f"{path}: holds another model: size mismatch for {name}: found {found}, "
                    f"expected {expected}"
                )
            place(targets[name], file.get_tensor(name))


def _load(path: Path, load: Callable[[], Any]) -> None:
    try:
        load()
    except (SafetensorError, OSError, EOFError, KeyError, ValueError) as error:
        raise DamagedCheckpoint(f"{path}: damaged checkpoint: {_first_line(error)}") from None
    except RuntimeError as error:  # torch 对形状不符与损坏的 zip 都报 RuntimeError
        text = str(error)
        if "size mismatch" in text or "Missing key" in text or "Unexpected key" in text:
            detail = next((line.strip() for line in text.splitlines()[1:] if line.strip()), text)
            raise DistillabError(f"{path}: holds another model: {detail}") from None
        raise DamagedCheckpoint(f"{path}: damaged checkpoint: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), type(error).__name__)
    return first.partition(". ")[0]


def _write_state(
    directory: Path, state: TrainerState, config: TrainingConfig, accelerator: Accelerator
) -> None:
    if accelerator.is_main_process:
        values = {
            "state": asdict(state),
            "layout": asdict(Layout.of(accelerator, config)),
            "training_config": config.model_dump(mode="json"),
        }
        (directory / STATE_FILE).write_text(json.dumps(values, indent=1))


def _write_then_rename(
    accelerator: Accelerator, target: Path, write: Callable[[Path], None]
) -> None:
    """写进临时目录，落盘后再改名：任何时刻被杀，``target`` 要么是旧的，要么是完整的新的。"""
    temporary = target.with_name(f".{target.name}.tmp")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    write(temporary)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for file in temporary.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        if target.exists():  # 目录不能原子地替换，文件可以
            for file in sorted(temporary.iterdir()):
                file.replace(target / file.name)
            temporary.rmdir()
        else:
            temporary.rename(target)
    accelerator.wait_for_everyone()
