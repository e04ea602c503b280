"""引擎与优化：Accelerate 的设置、AdamW 的参数分组、学习率日程。"""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import nn

from .config import Precision, TrainingConfig
from .errors import DistillabError
from .products import has_bfloat16_units

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: Precision) -> Literal["fp32", "bf16", "fp16"]:
    """``auto`` 换成这台机器上最快的：有 bf16 单元用 bf16，旧 GPU 用 fp16，其余 fp32。"""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    return "bf16" if has_bfloat16_units() else "fp32"


def make_accelerator(config: TrainingConfig, run_dir: Path) -> Accelerator:
    """按 ``config`` 造出引擎。

    Raises:
        DistillabError: 设备不支持 ``config.precision``；``report_to`` 的库没有安装；
            本进程已用过别的精度。
    """
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
    try:
        return Accelerator(
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
        )
    except ValueError as error:  # Accelerate 的状态每个进程只有一份
        raise DistillabError(
            f"train.precision={precision}: this process has already trained with another "
            f"precision; start a new one ({str(error).partition(',')[0]})"
        ) from None


def global_sum(accelerator: Accelerator, value: float) -> float:
    """各进程的 ``value`` 之和；只有一个进程时不必为此等 GPU。"""
    if accelerator.num_processes == 1:
        return value
    total = torch.tensor(float(value), dtype=torch.float64, device=accelerator.device)
    return float(accelerator.reduce(total, reduction="sum"))


def make_optimizer(module: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW；一维参数（RMSNorm 与 bias）不做 weight decay。"""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def warmup_steps(config: TrainingConfig, total_steps: int) -> int:
    """预热的步数；``warmup_ratio`` 优先，向上取整（与 transformers 相同）。"""
    if config.warmup_ratio is None:
        return config.warmup_steps
    return math.ceil(config.warmup_ratio * total_steps)


def learning_rate_factor(step: int, total_steps: int, config: TrainingConfig) -> float:
    """第 ``step`` 步（从 0 起）的学习率与峰值之比：线性预热，再退火到 ``min_learning_rate``。"""
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.scheduler == "constant":
        return 1.0
    floor = config.min_learning_rate / config.learning_rate
    done = (step - warmup) / max(1, total_steps - warmup)
    done = min(done, 1.0)
    shape = 0.5 * (1 + math.cos(math.pi * done)) if config.scheduler == "cosine" else 1 - done
    return floor + (1 - floor) * shape
