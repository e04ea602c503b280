"""``train.compile``：教师与学生的各层经 ``torch.compile``，GPU 上再录成 CUDA graph；只在训练步里。

逐层编译：各层的代码相同，编译一次就够，权重的名字也不变。验证、采样、考试照旧逐个算子执行：它们的
形状与训练的不同，每一种都要再编译一次，往往比省下的还久。

CUDA graph：一批接一批形状相同时，主体的几百个内核一次提交，不再等主机一个一个地发。录下来的是
``torch.cuda.make_graphed_callables`` 的前向与反向；权重在原处更新，录一次就够。用之前先与逐个算子
执行的结果比较：录不成、比不上就从此不用，在日志里说一次。
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..config.schema import TrainingConfig
from ..errors import typed_reason
from ..generate.cuda_graph import waiting_is_an_error
from ..loss.compiler import Compiler
from ..models.interface import LanguageModel

logger = logging.getLogger("distillab")

VARIANTS = 32
"""同一段代码至多编译这么多种：有无 mask、长度变不变、教师与学生、adapter 开关各算一种。"""

COMPILER = Compiler(
    "train.compile: torch.compile cannot be used here, the models run uncompiled: "
    "same numbers, slower (%s)"
)

WORTH_COMPILING = 500
"""``auto`` 在 GPU 上走这么多步才编译：编译要半分钟上下，一步至多省下几十毫秒。"""

TOLERANCE = 1e-2
"""录下的与逐个算子执行的相差（范数之比）不超过它；真录错了差的是整个数。"""

_in_step = False


def prepare_bodies(
    student: LanguageModel,
    teacher: LanguageModel | None,
    config: TrainingConfig,
    steps: int,
    cuda: bool = False,
    engine: str = "single",
) -> None:
    """按 ``config`` 设好模型的主体：重算激活、编译、CUDA graph。要在引擎包装之前。

    关掉 adapter 的学生就是教师时，``teacher`` 与 ``student`` 是同一个。``steps`` 是一共走几步；
    几个进程时梯度边算边归约，录成一段就没有边可言，所以 ``engine`` 是 single 才录。ZeRO-3 不编译：
    它的 hook 把一层切成许多段，每段又因模块的编号各编译一遍，直到上限。
    """
    if config.activation_checkpointing:
        student.enable_activation_checkpointing()
    models = [model for model in (student, teacher) if model is not None]
    if engine == "zero3":
        if config.compile is True:
            logger.warning(
                "train.compile: the hooks of ZeRO-3 cut every layer into pieces: "
                "the models run uncompiled"
            )
    elif config.compile is True or (config.compile == "auto" and cuda and steps >= WORTH_COMPILING):
        _compile_blocks(models)
    if config.compile and cuda and engine == "single":
        accumulates = config.gradient_accumulation_steps > 1
        for model in dict.fromkeys(models):
            if model.capturable:
                trains = model is student
                model._compiled_call_impl = GraphedBody(
                    model, trains=trains, accumulates=accumulates
                )


def _compile_blocks(models: list[LanguageModel]) -> None:
    from torch._dynamo import config as dynamo_config

    settings: Any = dynamo_config
    settings.recompile_limit = max(settings.recompile_limit, VARIANTS)
    settings.optimize_ddp = False  # 各层自有反向，DDP 的通信本来就与它们重叠，不必再切
    for model in models:
        for block in model.blocks:
            # 与 nn.Module.compile() 同一个位置：hook 照常触发，复制与存盘都不会带上它。
            compiled = torch.compile(block._call_impl)
            block._compiled_call_impl = functools.partial(_call, block._call_impl, compiled)
    logger.info("train.compile: the first steps compile and take longer")


@contextmanager
def training_step() -> Iterator[None]:
    """一个训练步：其间编译过的各层、录下的主体才用上。"""
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


def record_bodies(
    student: LanguageModel,
    teacher: LanguageModel | None,
    sample: Callable[[], Batch],
    compute: torch.dtype,
) -> None:
    """训练开始之前录下 ``GraphedBody``；``sample()`` 的形状不是每批都一样的（不是文本块），就不录。

    要在训练的 DataLoader 开始之前：录制时，别的线程（锁页的线程）不得碰 CUDA。没有要录的，不调用
    ``sample``。
    """
    models = [model for model in dict.fromkeys((teacher, student)) if model is not None]
    bodies = [
        body for model in models if isinstance(body := model._compiled_call_impl, GraphedBody)
    ]
    if not bodies:
        return
    batch = sample()
    view = batch.student
    if batch.examples is not None or view.position_ids is not None:
        return
    for body in bodies:
        body.record(view.input_ids, compute)


class GraphedBody:
    """训练步里形状不变的前向由 CUDA graph 执行，其余的照旧；放在模型的 ``_compiled_call_impl`` 上。

    ``trains`` 时录下有梯度的前向与反向，否则只录没有梯度的前向。``accumulates`` 时一步有几次反向：
    录下的梯度在固定的内存里，autograd 会把它直接当作 ``param.grad``，下一次重放便把它盖掉，所以先
    备好 ``param.grad``，让梯度加上去。
    """

    def __init__(self, model: LanguageModel, *, trains: bool, accumulates: bool = False) -> None:
        self.model, self.trains, self.accumulates = model, trains, accumulates
        self.eager: Callable[..., Tensor] = model._call_impl
        self.parameters = [each for each in model.parameters() if each.requires_grad]
        self._graph: nn.Module | None = None
        self._shape: torch.Size | None = None

    def __call__(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``LanguageModel.forward``。"""
        if self._graph is None or not self._recorded(input_ids, [*args, *kwargs.values()]):
            return self.eager(input_ids, *args, **kwargs)
        if self.accumulates:
            for each in self.parameters:
                if each.grad is None:
                    each.grad = torch.zeros_like(each)
        hidden: Tensor = self._graph(input_ids)
        return hidden

    def _recorded(self, input_ids: Tensor, rest: Sequence[Any]) -> bool:
        """录下的正是这样的前向。"""
        return (
            _in_step
            and input_ids.shape == self._shape
            and all(each is None for each in rest)
            and self.trains == (torch.is_grad_enabled() and self.model.training)
        )

    def record(self, input_ids: Tensor, compute: torch.dtype) -> None:
        """录下并核对形状为 ``input_ids [B, T]`` 的前向；不成就照旧执行。

        ``compute`` 是训练的前向的精度；没有梯度的（教师的）以自己的类型计算。
        """
        device = self.model.head.weight.device
        input_ids = input_ids.to(device)
        half = self.trains and compute != torch.float32
        self.model.train(self.trains)
        try:
            with (
                training_step(),
                torch.set_grad_enabled(self.trains),
                # 缓存的半精度权重会留在录下的内存里
                torch.autocast(device.type, compute, enabled=half, cache_enabled=False),
            ):
                expected = self._hidden_and_gradients(self.eager, input_ids)
                graph = recorded(_Body(self.model, self.eager, self.trains), input_ids)
                found = self._hidden_and_gradients(graph, input_ids)
            difference = max(
                float(torch.linalg.vector_norm(left - right) / torch.linalg.vector_norm(right))
                for left, right in zip(found, expected, strict=True)
            )
            if not difference <= TOLERANCE:  # NaN 也不行
                raise ValueError(f"its results differ by {difference:.1e}")
            self._graph, self._shape = graph, input_ids.shape
        except Exception as error:
            logger.warning(
                "train.compile: CUDA graphs cannot be used here, the models run without: "
                "same numbers, slower (%s)", typed_reason(error),
            )  # fmt: skip

    def _hidden_and_gradients(self, body: Any, input_ids: Tensor) -> list[Tensor]:
        """隐状态，要训练的还有全部梯度；不碰 ``param.grad``。"""
        hidden = body(input_ids)
        if not self.trains:
            return [hidden.float().clone()]
        upstream = torch.linspace(-1, 1, hidden.numel(), device=hidden.device).view_as(hidden)
        gradients = torch.autograd.grad(
            hidden, self.parameters, upstream.to(hidden.dtype), allow_unused=True
        )
        used = [each.flatten().float() for each in gradients if each is not None]
        return [hidden.detach().float().clone(), torch.cat(used)]


class _Body(nn.Module):
    """只有一个张量参数的模型；调用它不再经过 ``GraphedBody``。"""

    def __init__(self, model: LanguageModel, eager: Callable[..., Tensor], training: bool) -> None:
        super().__init__()
        self.model, self.eager = model, eager
        self.training = training  # make_graphed_callables 只在同样的状态下重放

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.eager(input_ids)


def recorded(body: nn.Module, input_ids: Tensor) -> nn.Module:
    """录下 ``body(input_ids)`` 的前向与（有要训练的参数时）反向；返回的接受同样形状的输入。"""
    body(input_ids)  # 编译过的各层先编译好
    with waiting_is_an_error():  # 录到一半才出错，分配器会一直以为还在录
        body(input_ids)
    graphed: nn.Module = torch.cuda.make_graphed_callables(  # type: ignore[assignment]
        body, (input_ids,), allow_unused_input=True
    )
    return graphed
