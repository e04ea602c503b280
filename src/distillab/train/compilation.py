"""``train.compile``：教师与学生的 Transformer 各层经 ``torch.compile``，只在训练步里。

逐层编译：各层的代码相同，编译一次就够，权重的名字也不变。验证、采样、考试照旧逐个算子执行：它们的
形状与训练的不同，每一种都要再编译一次，往往比省下的还久。
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..config.schema import TrainingConfig
from ..loss.fused import Compiler
from ..models.interface import LanguageModel

logger = logging.getLogger("distillab")

VARIANTS = 32
"""同一段代码至多编译这么多种：有无 mask、长度变不变、教师与学生、adapter 开关各算一种。"""

COMPILER = Compiler(
    "train.compile: torch.compile cannot be used here, the models run uncompiled: "
    "same numbers, slower (%s)"
)

_in_step = False


def prepare_bodies(
    student: LanguageModel, teacher: LanguageModel | None, config: TrainingConfig
) -> None:
    """按 ``config`` 设好模型的主体：重算激活、编译。要在引擎包装之前。

    关掉 adapter 的学生就是教师时，``teacher`` 与 ``student`` 是同一个。
    """
    if config.activation_checkpointing:
        student.enable_activation_checkpointing()
    if not config.compile:
        return
    from torch._dynamo import config as dynamo_config

    settings: Any = dynamo_config
    settings.recompile_limit = max(settings.recompile_limit, VARIANTS)
    settings.optimize_ddp = False  # 各层自有反向，DDP 的通信本来就与它们重叠，不必再切
    for model in (student, teacher):
        for block in [] if model is None else model.blocks:
            # 与 nn.Module.compile() 同一个位置：hook 照常触发，复制与存盘都不会带上它。
            compiled = torch.compile(block._call_impl)
            block._compiled_call_impl = functools.partial(_call, block._call_impl, compiled)
    logger.info("train.compile: the first steps compile and take longer")


@contextmanager
def training_step() -> Iterator[None]:
    """一个训练步：其间编译过的各层才用编译好的代码。"""
    global _in_step
    _in_step = True
    try:
        yield
    finally:
        _in_step = False


def _call(
    eager: Callable[..., Any], compiled: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    return COMPILER.call(compiled, eager, *args, **kwargs) if _in_step else eager(*args, **kwargs)
