"""DeepSpeed ZeRO：它的设置，它分了片的参数与 optimizer；它私有的名字只有这里知道。

ZeRO-3 的参数平时是空的；ZeRO-2 的参数完整，但 float32 的那份与动量在 optimizer 里，分了片。
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config.schema import TrainingConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

_MOMENTS = ("exp_avg", "exp_avg_sq")
_SETTINGS = (
    "lr", "initial_lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "foreach",
    "capturable", "differentiable", "fused", "decoupled_weight_decay",
)  # fmt: skip
"""``AdamW`` 一组参数的设置；DeepSpeed 还往里放别的。"""


def configure(accelerator: Accelerator, config: TrainingConfig) -> None:
    """累积由我们的循环来做，损失已按全局 token 数归一：DeepSpeed 不该再除一次。"""
    settings = accelerator.deepspeed_plugin.deepspeed_config
    settings |= {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "train_batch_size": config.batch_size * accelerator.num_processes,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.gradient_clip,
    }
    if accelerator.device.type == "cpu":  # 它的 CPU Adam 要现编译，而 torch 的本来就在 CPU 上
        settings["zero_force_ds_cpu_optimizer"] = False


def owns(tensor: Tensor) -> bool:
    """这个参数是不是由 ZeRO 管着。"""
    return hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping")


def shape(tensor: Tensor) -> torch.Size:
    """完整的形状；ZeRO-3 的参数自己的 ``shape`` 是空的。"""
    size: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return size


def whole(tensor: Tensor) -> Tensor:
    """一个参数的全部；训练的取 float32 的那份。所有进程都要调用。"""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    if tensor.requires_grad:
        full: Tensor = safe_get_full_fp32_param(tensor)
        return full.detach().reshape(shape(tensor))
    with GatheredParameters([tensor]):
        return tensor.detach().clone()


def place(tensor: Tensor, value: Tensor) -> None:
    """把完整的 ``value`` 写进参数，各进程给的相同。所有进程都要调用。"""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_full_fp32_param

    if tensor.requires_grad:
        safe_set_full_fp32_param(tensor, value.to(tensor.device, torch.float32))
    with GatheredParameters([tensor], modifier_rank=0):
        tensor.copy_(value)


def optimizer_states(
    optimizer: Any, parameters: Sequence[nn.Parameter]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """逐个参数的编号与完整的状态，与 ``AdamW.state_dict()["state"]`` 相同。所有进程都要调用。"""
    from deepspeed.utils import safe_get_full_optimizer_state

    flat = next(iter(optimizer.optimizer.state.values()), None)
    if flat is None:  # 一步还没走
        return
    _link(optimizer)
    step = float(flat["step"])
    for index, parameter in enumerate(parameters):
        state = {"step": torch.tensor(step)}  # 各有一份：就地加一
        for key in _MOMENTS:
            value = safe_get_full_optimizer_state(parameter, key)
            state[key] = value.reshape(shape(parameter))
        yield index, state


def optimizer_groups(optimizer: Any, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """与 ``AdamW.state_dict()["param_groups"]`` 相同；``sizes`` 是每组几个参数。"""
    groups, start = [], 0
    for group, size in zip(optimizer.optimizer.param_groups, sizes, strict=True):
        settings = {key: value for key, value in group.items() if key in _SETTINGS}
        groups.append(settings | {"params": list(range(start, start + size))})
        start += size
    return groups


def load_optimizer(
    optimizer: Any, values: dict[str, Any], parameters: Sequence[nn.Parameter]
) -> None:
    """还原一个 ``AdamW.state_dict()``，各进程留下自己的一片。所有进程都要调用。"""
    from deepspeed.utils import safe_set_full_optimizer_state

    inner = optimizer.optimizer
    for group, saved in zip(inner.param_groups, values["param_groups"], strict=True):
        group.update({key: value for key, value in saved.items() if key in _SETTINGS})
    if not values["state"]:
        return
    step = float(next(iter(values["state"].values()))["step"])
    flats = getattr(optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3
    for flat in optimizer.single_partition_of_fp32_groups if flats is None else flats:
        inner.state[flat] = {
            "step": torch.tensor(step, device=flat.device),
            **{key: torch.zeros_like(flat) for key in _MOMENTS},
        }
    _link(optimizer)
    for index, state in values["state"].items():
        for key in _MOMENTS:
            value = state[key].to(parameters[index].device, torch.float32)
            safe_set_full_optimizer_state(parameters[index], value, key)


def _link(optimizer: Any) -> None:
    """ZeRO-2 在第一组更新之后就把各组的参数与动量联系起来，那时后面的还没有动量：重来一次。"""
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
