"""LoRA：给预训练的学生就地装上低秩的 adapter（经 peft），关掉它们，或把它们并进权重。

基座冻结、adapter 是 float32；关掉 adapter 的学生就是原来的基座，所以教师与学生是同一个模型时
不需要第二份权重。输出层从不加 adapter：损失直接读 ``head.weight``，不经过那一层的 ``forward``。
"""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..config.model_sections import LoraConfig
from ..errors import DistillabError, nearest, reason, some
from .interface import PROBE_TOKENS, PretrainedLM, evaluating

logger = logging.getLogger("distillab")

_KEY = "student.lora.target_modules"
_FOUND: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()
"""模型 → 装了 adapter 的层；``add_lora`` 之后不再增减。"""


def add_lora(model: PretrainedLM, config: LoraConfig) -> PretrainedLM:
    """就地装上 adapter：基座冻结，adapter 是 float32，B 为 0，输出因而不变；返回的处于 eval。

    不用 transformers 的 ``add_adapter``：它对 peft 的版本另有要求，之后的 ``save_pretrained`` 也只
    写 adapter。没有 peft，目标不是线性层、是输出层，或 adapter 在那里不起作用，是
    ``DistillabError``。
    """
    try:
        import peft
    except ImportError as error:
        raise DistillabError(
            f"student.lora needs peft ({reason(error)}): pip install 'distillab[peft]'"
        ) from None
    linear = _linear_layers(model)
    beyond = _beyond_adapters(model, linear)
    _check_targets(model, config, linear, beyond)
    every = config.target_modules == "all-linear"
    targets = sorted(linear.keys() - beyond) if every else config.target_modules
    if every and not targets:
        raise DistillabError(f"{_KEY}: the model has no linear layer that can be adapted")
    options = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        exclude_modules=sorted(beyond) or None,
    )
    # 交给 peft 的是没有 config 的外壳：看得见 model_type，它会把专家的名字换成融合的三维参数，
    # 共享专家的线性层反而没有了 adapter；那样的 adapter 复制时无穷递归，也不能有 dropout。
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Conv1D 的权重是转置的，peft 自己会改，只是说一声
        peft.inject_adapter_in_model(options, model)
    del model.peft_config
    _FOUND.pop(model, None)
    fused = _fused_parameters(model)
    if every and fused:
        logger.info(
            "student.lora: no adapters on %s: not linear layers, they stay as they are",
            some(sorted(fused)),
        )
    for parameter in adapter_parameters(model):
        parameter.data = parameter.data.float()  # peft 跟随基座的类型，半精度的更新会被舍掉
    model.eval()  # peft 新建的模块处于 train，其余的在 eval
    return model


def has_lora(model: nn.Module) -> bool:
    """``model`` 里有没有 adapter。"""
    return bool(_lora_layers(model))


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """全部 adapter 的参数。"""
    return [
        parameter
        for layer in _lora_layers(model).values()
        for name in layer.adapter_layer_names
        for parameter in getattr(layer, name).parameters()
    ]


def base_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Adapter 之外的参数，绑定的只列一次；没有 adapter 时就是全部。"""
    adapters = set(map(id, adapter_parameters(model)))
    return [parameter for parameter in model.parameters() if id(parameter) not in adapters]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """暂时关掉 adapter：``model`` 就是它的基座；退出时还原，``requires_grad`` 从不改动。

    peft 的 ``enable_adapters(False)`` 会顺手冻结 adapter，而 DDP 与 FSDP2 在第一次前向时就记下
    哪些参数要梯度；所以只拨动它的开关。
    """
    found = _FOUND.get(model)
    if found is None:  # 每步都要用，而找遍一个模型要几毫秒
        found = _FOUND[model] = list(_lora_layers(model).values())
    layers = [layer for layer in found if not layer.disable_adapters]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def mergeable_layers(model: nn.Module) -> dict[Tensor, Any]:
    """基座的权重 → 装着 adapter 的层；有一层不能在 float32 里合并，或已经关掉，就为空。"""
    layers = _lora_layers(model).values()
    found = {}
    for layer in layers:
        base = layer.get_base_layer()
        if type(base) is not nn.Linear or not is_plain_float32(base.weight):
            return {}
        if layer.disable_adapters or layer.merged:
            return {}
        found[base.weight] = layer
    return found


def merged_weight(layer: Any) -> Tensor:
    """``W + scaling * B @ A``，新的张量；与 ``merged_copy`` 的相同。"""
    weight: Tensor = layer.get_base_layer().weight.data
    for name in layer.active_adapters:
        if name in layer.lora_A:
            weight = weight + layer.get_delta_weight(name)
    return weight


def is_plain_float32(weight: Tensor) -> bool:
    """是不是普通的 float32 矩阵：分片的（DTensor、ZeRO-3）与量化的都不是。"""
    return type(weight.data) is Tensor and weight.dtype == torch.float32 and weight.ndim == 2


def merged_copy(model: PretrainedLM) -> Any:
    """把 adapter 并进权重的一份拷贝，CPU 上的 ``PreTrainedModel``，不再含 peft 的任何东西。

    拷贝总是 float32：半精度的基座恰好落在半精度的格点上，小于半格的更新加上去会被整个舍掉。
    """
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(
            parameter.detach().to("cpu", torch.float32, copy=True), requires_grad=False
        )
        for parameter in model.parameters()
    }
    for part in model.modules():  # 有的模型把上一次前向的状态留在自己身上，带着计算图，不能复制
        for value in vars(part).values():
            if isinstance(value, Tensor):
                memo[id(value)] = value.detach().to("cpu", copy=True)
    plain = copy.deepcopy(model.model, memo)  # 经 memo，参数不在 GPU 上复制第二份
    for name, layer in _lora_layers(plain).items():
        layer.merge()
        plain.set_submodule(name, layer.get_base_layer())
    return plain.to("cpu", torch.float32).eval()


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    """名字 → 装了 adapter 的层。"""
    if sys.modules.get("peft") is None:  # 没有导入过 peft，就不会有 adapter
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: part for name, part in model.named_modules() if isinstance(part, LoraLayer)}


def _linear_layers(model: PretrainedLM) -> dict[str, nn.Module]:
    """名字 → 线性层，输出层不在内；名字从 ``model`` 算起。"""
    head = model.model.get_output_embeddings()
    return {
        name: part
        for name, part in model.named_modules()
        # 后者是 GPT-2 的
        if (isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D") and part is not head
    }


@torch.no_grad()
def _beyond_adapters(model: PretrainedLM, linear: dict[str, nn.Module]) -> set[str]:
    """装了 adapter 也不起作用的层：它们的权重被直接读走，不经过那一层的 ``forward``。

    Mamba 的 ``dt_proj`` 总是如此，``out_proj`` 在融合的 CUDA 内核里如此；返回的不是张量的（路由）
    不是普通的线性层。
    """
    called: set[str] = set()
    odd: set[str] = set()

    def note(name: str, output: object) -> None:
        called.add(name.rpartition(".")[2])
        if not isinstance(output, Tensor):
            odd.add(name)

    hooks = [
        part.register_forward_hook(lambda _, __, output, name=name: note(name, output))
        for name, part in linear.items()
    ]
    device = model.head.weight.device
    length = min(PROBE_TOKENS, model.max_seq_len)
    try:
        with evaluating(model), torch.autocast(device.type, enabled=False):
            model(torch.arange(1, length + 1, device=device)[None] % model.vocab_size)
    finally:
        for hook in hooks:
            hook.remove()
    mixers = {
        f"{name}.out_proj"
        for name, part in model.named_modules()
        if hasattr(part, "A_log") and hasattr(part, "D")
    }
    # 没有轮到的专家也没有算过，但同名的层里总有算过的。
    unread = {name for name in linear if name.rpartition(".")[2] not in called}
    return odd | unread | (mixers & linear.keys())


def _fused_parameters(model: PretrainedLM) -> set[str]:
    """融合成一个张量的专家的名字，如 ``experts.gate_up_proj``。"""
    return {
        ".".join(name.split(".")[-2:])
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and "experts" in name
    }


def _check_targets(
    model: PretrainedLM, config: LoraConfig, linear: dict[str, nn.Module], beyond: set[str]
) -> None:
    """逐个核对写下的名字：peft 只要有一个对得上就不作声。"""
    if isinstance(config.target_modules, str):
        return
    head = model.model.get_output_embeddings()
    heads = [name for name, part in model.named_modules() if part is head]
    for target in config.target_modules:
        if any(name.endswith(f".{target}") for name in heads):
            raise DistillabError(
                f"{_KEY}: '{target}' is the output layer, which cannot be adapted: "
                f"the loss reads its weight directly"
            )
        matches = {name for name in linear if name.endswith(f".{target}")}
        if not matches:
            names = {name.rpartition(".")[2] for name in linear}
            raise DistillabError(
                f"{_KEY}: no linear layer is named '{target}', {nearest(target, names)}"
            )
        if matches <= beyond:
            names = {name.rpartition(".")[2] for name in linear.keys() - beyond}
            raise DistillabError(
                f"{_KEY}: an adapter on '{target}' has no effect, its weight is read directly: "
                f"choose from {', '.join(sorted(names))}"
            )
