"""引擎与优化：Accelerate 的设置、AdamW 的参数分组、学习率日程。"""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import nn

from .config import TrainingConfig
from .errors import DistillabError


def make_accelerator(config: TrainingConfig, run_dir: Path) -> Accelerator:
    """按 ``config`` 造出引擎。

    Raises:
        DistillabError: 设备不支持 ``config.precision``；``report_to`` 的库没有安装；
            本进程已用过别的精度。
    """
    cuda = torch.cuda.is_available()
    if config.precision == "fp16" and not cuda:
        raise DistillabError("train.precision=fp16 needs a GPU; on this machine use bf16 or fp32")
    if config.precision == "bf16" and cuda and torch.cuda.get_device_capability() < (8, 0):
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
            mixed_precision={"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[config.precision],
            step_scheduler_with_optimizer=False,
            log_with=list(config.report_to) or None,
            project_dir=str(run_dir),
            dataloader_config=DataLoaderConfiguration(
                use_seedable_sampler=True, data_seed=config.seed, even_batches=False
            ),
        )
    except ValueError as error:  # Accelerate 的状态每个进程只有一份
        raise DistillabError(
            f"train.precision={config.precision}: this process has already trained with another "
            f"precision; start a new one ({str(error).partition(',')[0]})"
        ) from None


def make_optimizer(module: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW；一维参数（RMSNorm 与 bias）不做 weight decay。"""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def learning_rate_factor(step: int, total_steps: int, config: TrainingConfig) -> float:
    """第 ``step`` 步（从 0 起）的学习率与峰值之比：线性预热，再退火到 ``min_learning_rate``。"""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.scheduler == "constant":
        return 1.0
    floor = config.min_learning_rate / config.learning_rate
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    done = min(done, 1.0)
    shape = 0.5 * (1 + math.cos(math.pi * done)) if config.scheduler == "cosine" else 1 - done
    return floor + (1 - floor) * shape
