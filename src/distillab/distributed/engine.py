"""引擎与优化：Accelerate 的设置、AdamW 的参数分组、学习率日程。

DDP、FSDP2、ZeRO-2、ZeRO-3 由 Accelerate 驱动，启动时的环境决定用哪一个；批大小、累积、裁剪与精度
则由配方说了算，这里写进引擎自己的配置。
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn

from ..config.schema import Precision, TrainingConfig
from ..errors import DistillabError
from ..loss.products import has_bfloat16_units
from . import zero
from .sharding import parameter_groups

logger = logging.getLogger("distillab")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: Precision) -> Literal["fp32", "bf16", "fp16"]:
    """``auto`` 换成这台机器上最快的：有 bf16 单元用 bf16，旧 GPU 用 fp16，其余 fp32。"""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    return "bf16" if has_bfloat16_units() else "fp32"


def make_accelerator(config: TrainingConfig, run_dir: Path) -> Accelerator:
    """按 ``config`` 造出引擎；这台机器、这个进程或装着的库做不到的，是 ``DistillabError``。"""
    cuda = torch.cuda.is_available()
    precision = resolve_precision(config.precision)
    if precision == "fp16" and not cuda:
        raise DistillabError("train.precision=fp16 needs a GPU; on this machine use bf16 or fp32")
    if precision == "bf16" and cuda and torch.cuda.get_device_capability() < (8, 0):
        raise DistillabError(
            f"train.precision=bf16 is not supported by {torch.cuda.get_device_name()}; use fp16"
        )
    for tracker in config.report_to:
        if find_spec(tracker) is None:
            raise DistillabError(
                f"train.report_to: {tracker} is not installed; "
                f"pip install 'distillab[train-logging]'"
            )
    if _asked_for("DEEPSPEED") and find_spec("deepspeed") is None:
        raise DistillabError("DeepSpeed is not installed; pip install 'distillab[deepspeed]'")
    # 没有 GPU 时 Accelerate 不替 DeepSpeed 选通信后端，每个进程都以为只有自己。
    gloo = _asked_for("DEEPSPEED") and not cuda and "LOCAL_RANK" in os.environ
    group = InitProcessGroupKwargs(timeout=timedelta(minutes=config.timeout_minutes))
    if gloo:
        group.backend = "gloo"
    try:
        accelerator = Accelerator(
            mixed_precision="no" if precision == "fp32" else precision,
            step_scheduler_with_optimizer=False,
            log_with=list(config.report_to) or None,
            project_dir=str(run_dir),
            dataloader_config=DataLoaderConfiguration(
                use_seedable_sampler=True,
                data_seed=config.seed,
                even_batches=False,
                non_blocking=cuda,  # 训练的 DataLoader 锁了页，传输与计算重叠
            ),
            kwargs_handlers=[group],
        )
    except ValueError as error:  # Accelerate 的状态每个进程只有一份
        raise DistillabError(
            f"train.precision={precision}: this process has already trained with another "
            f"precision; start a new one ({str(error).partition(',')[0]})"
        ) from None
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        zero.configure(accelerator, config)
    elif _asked_for("FSDP"):
        _configure_fsdp(accelerator, DTYPES[precision])
    return accelerator


def engine_name(accelerator: Accelerator) -> str:
    """``single``、``ddp``、``fsdp2``、``zero2``、``zero3``：写进日志与检查点的名字。"""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"zero{accelerator.deepspeed_plugin.zero_stage}"
    if accelerator.distributed_type == DistributedType.FSDP:
        return "fsdp2"
    return "ddp" if accelerator.num_processes > 1 else "single"


@dataclass(frozen=True)
class Layout:
    """一步怎样分给各进程：几个进程，每批几条，每步几批；存进检查点，换了就要换算位置。"""

    engine: str
    processes: int
    batch_size: int
    accumulation: int

    @classmethod
    def of(cls, accelerator: Accelerator, config: TrainingConfig) -> Layout:
        """现在的。"""
        return cls(
            engine_name(accelerator),
            accelerator.num_processes,
            config.batch_size,
            config.gradient_accumulation_steps,
        )

    def moved(self, batches: int, path: Path, now: Layout) -> int:
        """本轮里每个进程用掉的 micro-batch 数，换算成 ``now`` 的，并在日志里说变了什么。

        一步的序列数变了，学习率的日程与数据的位置都对不上，是 ``DistillabError``。
        """
        before, after = (
            each.processes * each.batch_size * each.accumulation for each in (self, now)
        )
        if before != after:
            raise DistillabError(
                f"{path}: an optimizer step had {before} sequences and now has {after} "
                f"({now.processes} process(es) x train.batch_size={now.batch_size} x "
                f"train.gradient_accumulation_steps={now.accumulation}): change the last two to "
                f"make {before}"
            )
        used = batches * self.processes * self.batch_size
        logger.info(
            f"the checkpoint was written by {self.engine} with {self.processes} process(es), "
            f"this is {now.engine} with {now.processes}: weights and optimizer moments are split "
            f"anew, the data continues after sequence {used} of the epoch"
        )
        if self.processes != now.processes:
            logger.info("random states (dropout) are seeded anew: they belonged to each process")
        return used // (now.processes * now.batch_size)


def _asked_for(engine: Literal["FSDP", "DEEPSPEED"]) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"


def _configure_fsdp(accelerator: Accelerator, compute: torch.dtype) -> None:
    """梯度在 float32 里归约；损失的总和与 RoPE 的表不被降到计算精度。"""
    if accelerator.distributed_type != DistributedType.FSDP:
        raise DistillabError(
            f"FSDP was asked for, but Accelerate has it only for two or more processes on GPUs, "
            f"found {accelerator.num_processes} on {accelerator.device.type}: use ddp or zero3"
        )
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise DistillabError(
            f"fsdp_version={plugin.fsdp_version} is not supported: set fsdp_version: 2 in the "
            f"accelerate config"
        )
    if plugin.activation_checkpointing:
        raise DistillabError(
            "fsdp_activation_checkpointing is the recipe's to choose: set it to false in the "
            "accelerate config, and train.activation_checkpointing to true"
        )
    if compute != torch.float32:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


def on_device(values: Sequence[float], device: torch.device) -> Tensor:
    """主机上的几个数，搬到 ``device``，float64；去 GPU 的经锁页内存，主机不等。"""
    pinned = torch.tensor(values, dtype=torch.float64, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


def loss_scale(accelerator: Accelerator, tokens: int) -> float | Tensor:
    """损失的总和乘上它再反向：进程数 / 全局 token 数，因为引擎对各进程的梯度取平均。

    ``tokens`` 是本进程的。几个进程的和在设备上求，是设备上的 float32 标量，主机不等。
    """
    if accelerator.num_processes == 1:
        return 1 / max(tokens, 1)
    own = on_device([tokens], accelerator.device)
    total: Tensor = accelerator.reduce(own, reduction="sum")
    scale: Tensor = accelerator.num_processes / total.clamp(min=1)
    return scale.float().squeeze()


def update(accelerator: Accelerator, optimizer: Any, found_inf: Tensor) -> None:
    """更新参数；``found_inf``（float32 标量）为 1 时内核自己跳过：参数、动量、步数都不变。

    不经 ``GradScaler.step``：它换上自己的 ``found_inf``，不看损失；梯度在裁剪时已除去 loss scale。
    """
    inner = optimizer.optimizer
    if not isinstance(inner, torch.optim.Optimizer):
        return  # DeepSpeed 在反向里已经更新过了
    inner.found_inf = found_inf  # type: ignore[attr-defined]
    inner.step()
    if accelerator.scaler is not None:
        accelerator.scaler.update()


def make_optimizer(module: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW；一维参数（RMSNorm 与 bias）不做 weight decay。"""
    groups = [
        {"params": group, "weight_decay": config.weight_decay * (group[0].ndim >= 2)}
        for group in parameter_groups(module)
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def prepare(
    accelerator: Accelerator, module: nn.Module, config: TrainingConfig, total_steps: int
) -> tuple[Any, Any, Any]:
    """交给引擎：``(包装好的 module, optimizer, scheduler)``；日程长 ``total_steps``。"""
    if (warmup := _warmup_steps(config, total_steps)) >= total_steps:
        logger.warning(
            f"train.warmup_steps={warmup} is not below the {total_steps} steps of this run: "
            f"the learning rate never reaches its peak"
        )
    optimizer = make_optimizer(module, config)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, total_steps, config)
    )
    prepared: tuple[Any, Any, Any] = accelerator.prepare(module, optimizer, scheduler)
    return prepared


def _warmup_steps(config: TrainingConfig, total_steps: int) -> int:
    """预热的步数；``warmup_ratio`` 优先，向上取整（与 transformers 相同）。"""
    if config.warmup_ratio is None:
        return config.warmup_steps
    return math.ceil(config.warmup_ratio * total_steps)


def learning_rate_factor(step: int, total_steps: int, config: TrainingConfig) -> float:
    """第 ``step`` 步（从 0 起）的学习率与峰值之比：线性预热，再退火到 ``min_learning_rate``。"""
    warmup = _warmup_steps(config, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.scheduler == "constant":
        return 1.0
    floor = config.min_learning_rate / config.learning_rate
    done = min((step - warmup) / max(1, total_steps - warmup), 1.0)
    shape = 0.5 * (1 + math.cos(math.pi * done)) if config.scheduler == "cosine" else 1 - done
    return floor + (1 - floor) * shape
