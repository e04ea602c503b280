"""一次训练能从什么地方接着来：完整的检查点、``best``、写到一半被杀也不留下坏文件。

``step-00000100/`` 是学生、optimizer、scheduler、各进程的随机数与 ``trainer_state.json``；``best/``
只有学生。冻结的参数（LoRA 的基座）不存：它们从未变过，配方说了从哪里读。权重与 optimizer 总是完整的
张量，换一个引擎、换几个进程也读得回来。要不要信一个检查点由主进程来查，别的进程听它的。
"""

from __future__ import annotations

import logging
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate.checkpointing import load_accelerator_state, save_accelerator_state
from accelerate.utils import gather_object, load, set_seed
from accelerate.utils.constants import SCALER_NAME
from safetensors import safe_open
from torch import Tensor, nn

from ..config.run_dir import run_id
from ..config.schema import TrainingConfig
from ..distributed.engine import Layout
from ..distributed.sharding import WholeOptimizer, place, reshard, whole
from ..distributed.zero import shape
from ..errors import DistillabError, reason
from ..files import temporary_beside, writing
from .checkpoint_files import (
    BEST,
    WEIGHTS_FILE,
    DamagedCheckpoint,
    Saved,
    check_files,
    check_whole,
    checkpoints,
    discard,
    publish,
    read_saved,
    seal,
    set_aside,
    tidy,
)
from .state import TrainerState

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("distillab")

Found = TypeVar("Found")


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
    module, optimizer, schedulers = _prepared(accelerator)
    wanted = 3 * _bytes(accelerator, module)  # AdamW 的状态是权重的两倍
    with _replacing(accelerator, target, state, config, wanted) as temporary:
        save_accelerator_state(
            str(temporary),
            [_weights(accelerator, module)],
            [optimizer],
            schedulers,
            dataloaders=[],
            process_index=accelerator.process_index,
            step=accelerator.step,
            scaler=accelerator.scaler,
        )
    if accelerator.is_main_process:
        for old in checkpoints(directory)[: -config.max_checkpoints]:
            discard(old)
    return target


def save_best(
    accelerator: Accelerator,
    module: nn.Module,
    directory: Path,
    state: TrainerState,
    config: TrainingConfig,
) -> None:
    """把学生的权重写进 ``directory/best``，替换原来的。所有进程都要调用。"""
    target, wanted = directory / BEST, _bytes(accelerator, module)
    with _replacing(accelerator, target, state, config, wanted) as temporary:
        weights = _weights(accelerator, module)
        accelerator.save(weights, temporary / WEIGHTS_FILE, safe_serialization=True)


def begin(accelerator: Accelerator, run_dir: Path, directory: Path, fresh: bool) -> str:
    """训练之前：清掉上次被杀留下的，返回运行的 id。所有进程都要调用。

    ``fresh`` 是从头开始：``directory`` 里已有别的训练的检查点，是 ``DistillabError``。
    """

    def look() -> str:
        if fresh and (found := checkpoints(directory)):
            raise DistillabError(
                f"{found[-1]} is of an earlier training: continue it with resume=True, or name "
                f"another run_dir"
            )
        tidy(directory)
        return run_id(run_dir)

    return _agreed(accelerator, look)


def resume_newest(
    accelerator: Accelerator,
    directory: Path,
    data: str | None,
    config: TrainingConfig,
    run: str | None = None,
) -> tuple[TrainerState, Path] | None:
    """从最新的完整检查点恢复；它损坏了就改名放到一边，退到前一个。所有进程都要调用。

    Args:
        accelerator: 已 ``prepare`` 过学生、optimizer 与 scheduler。
        directory: 检查点目录。
        data: 见 ``load_checkpoint``。
        config: 见 ``load_checkpoint``。
        run: 见 ``load_checkpoint``。

    Returns:
        ``(训练进度, 检查点)``；一个检查点也没有是 ``None``。

    Raises:
        DistillabError: 没有一个读得出（说的是最新的那一个），或见 ``load_checkpoint``。
    """
    damaged: dict[Path, DamagedCheckpoint] = {}
    for path in reversed(_agreed(accelerator, lambda: checkpoints(directory))):
        error, state = None, None
        try:
            state = load_checkpoint(accelerator, path, data, config, run)
        except DamagedCheckpoint as found:
            error = found
        others = [text for text in gather_object([str(error or "")]) if text]  # 一起决定
        if state is not None and not others:
            if accelerator.is_main_process:
                for bad, damage in damaged.items():
                    logger.warning("%s; moved to %s", damage, set_aside(bad))
            accelerator.wait_for_everyone()
            return state, path
        damaged[path] = error or DamagedCheckpoint(others[0])
    for damage in damaged.values():
        raise damage
    return None


def load_checkpoint(
    accelerator: Accelerator,
    path: Path,
    data: str | None = None,
    config: TrainingConfig | None = None,
    run: str | None = None,
) -> TrainerState:
    """恢复 ``save_checkpoint`` 存下的一切，不论那时是哪个引擎、几个进程。所有进程都要调用。

    Args:
        accelerator: 已 ``prepare`` 过学生、optimizer 与 scheduler。
        path: 检查点的路径。
        data: 现在的训练数据的指纹；换了数据，记下的位置就没有意义。
        config: 现在的超参数，用来换算位置；缺省当作没有变。
        run: 现在的运行的 id；``None`` 则不问是谁的。

    Raises:
        DistillabError: 文件缺失或损坏，是别的运行的，形状与当前模型不符，训练数据不是原来的，或
            一步的序列数变了。
    """

    def checked() -> Saved:
        saved = read_saved(path, run)
        if saved.state.data != data:
            raise DistillabError(
                f"{path}: the training data differs from what this run began with: restore "
                f"data.source, or name a new run with --set name=..."
            )
        check_whole(path, saved)
        return saved

    saved = _agreed(accelerator, checked)
    state, layout = saved.state, saved.layout
    module, optimizer, schedulers = _prepared(accelerator)
    same = layout.processes == accelerator.num_processes
    with _reading(path, saved):
        _load_weights(accelerator.unwrap_model(module), path)
        load_accelerator_state(
            str(path),
            models=[],
            optimizers=[optimizer],
            schedulers=schedulers,
            dataloaders=[],
            process_index=accelerator.process_index,
            scaler=accelerator.scaler if (path / SCALER_NAME).is_file() else None,
        )
        if same:
            _check_random(path / f"random_states_{accelerator.process_index}.pkl")
    if config is None or layout == (now := Layout.of(accelerator, config)):
        return state
    if not same:
        set_seed(config.seed + state.current_step, device_specific=True)
    return replace(state, batches_in_epoch=layout.moved(state.batches_in_epoch, path, now))


def load_student(
    student: nn.Module,
    path: Path,
    run: str | None = None,
    accelerator: Accelerator | None = None,
) -> TrainerState:
    """只把学生的权重从检查点（或 ``best``）读进 ``student``。

    Args:
        student: 结构与保存时相同的模型。
        path: 检查点目录。
        run: 现在的运行的 id；``None`` 则不问是谁的。
        accelerator: 引擎；给了它，所有进程都要调用，只有主进程去查文件。

    Returns:
        检查点的训练进度。

    Raises:
        DistillabError: 没有检查点、文件损坏，是别的运行的，或形状与 ``student`` 不符。
    """

    def checked() -> Saved:
        saved = read_saved(path, run)
        check_files(path, saved, [WEIGHTS_FILE])
        return saved

    saved = checked() if accelerator is None else _agreed(accelerator, checked)
    holder = nn.Module()
    holder.student = student  # 检查点存的是 DistillationModule，权重名带 student. 前缀
    with _reading(path, saved):
        _load_weights(holder, path)
    return saved.state


def _agreed(accelerator: Accelerator, look: Callable[[], Found]) -> Found:
    """只由主进程去看磁盘，它看到的（或它的错误）就是大家的。"""
    found, error = None, None
    if accelerator.is_main_process:
        try:
            found = look()
        except (DistillabError, OSError) as wrong:
            error = wrong
    agreed: tuple[Found, Exception | None] = gather_object([(found, error)])[0]
    if agreed[1] is not None:
        raise agreed[1]
    return agreed[0]


def _prepared(accelerator: Accelerator) -> tuple[nn.Module, WholeOptimizer, list[Any]]:
    """交给引擎的模型、optimizer 与 scheduler；Accelerate 记着它们，却没有公开的名字。"""
    (module,), (optimizer,) = accelerator._models, accelerator._optimizers
    return module, WholeOptimizer(accelerator, optimizer, module), accelerator._schedulers


def _frozen(module: nn.Module) -> set[str]:
    """不训练的参数的名字，绑定的参数的每个名字都在内。"""
    named = module.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if not parameter.requires_grad}


def _bytes(accelerator: Accelerator, module: nn.Module) -> int:
    """要存的参数一共多少字节，完整的。"""
    parameters = accelerator.unwrap_model(module).parameters()
    return sum(
        shape(parameter).numel() * parameter.element_size()
        for parameter in parameters
        if parameter.requires_grad
    )


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


def _check_random(file: Path) -> None:
    """读不出随机状态时，Accelerate 会不声不响地继续：对一遍。"""
    states = load(file)
    if not torch.equal(states["torch_manual_seed"], torch.get_rng_state()) or (
        states["random_state"] != random.getstate()
    ):
        raise ValueError(f"{file.name} holds no random states")


@contextmanager
def _reading(path: Path, saved: Saved) -> Iterator[None]:
    """没有摘要的旧检查点，读不出就是坏了；对过摘要的不会坏，出的错是别的原因。"""
    try:
        yield
    except DistillabError:
        raise
    except pickle.UnpicklingError:  # torch 只肯读张量与数；别的对象一读就会运行代码
        raise DamagedCheckpoint(
            f"{path}: damaged checkpoint: it holds objects that could run code when read"
        ) from None
    except Exception as error:
        if saved.files is not None:
            raise
        first = reason(error).partition(". ")[0]
        raise DamagedCheckpoint(f"{path}: damaged checkpoint: {first}") from None


@contextmanager
def _replacing(
    accelerator: Accelerator, target: Path, state: TrainerState, config: TrainingConfig, wanted: int
) -> Iterator[Path]:
    """给出临时目录，写好、落盘后再改名：任何时刻被杀，``target`` 要么是旧的，要么是完整的新的。

    放不下时说需要 ``wanted`` 字节。所有进程都要调用。
    """
    main = accelerator.is_main_process
    temporary = gather_object([temporary_beside(target)])[0]  # 名字是随机的，各进程用主进程的
    with writing(target, temporary, wanted, discard=main):
        if main:
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        yield temporary
        accelerator.wait_for_everyone()
        if main:
            seal(temporary, state, Layout.of(accelerator, config), config)
            publish(temporary, target)
    accelerator.wait_for_everyone()
