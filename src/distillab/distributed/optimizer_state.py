"""Optimizer 的状态，写成与引擎、进程数都无关的样子：与一个进程的 ``AdamW.state_dict()`` 相同。

参数按 ``parameter_groups`` 的次序编号，动量是完整的张量；哪个引擎都能由它还原自己的分片。
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .sharding import shape

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW 给每个参数存的张量；此外只有步数。"""


def parameter_groups(module: nn.Module) -> list[list[nn.Parameter]]:
    """训练的参数分成两组：矩阵，与不做 weight decay 的一维参数；空的一组不要。"""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if len(shape(parameter)) >= 2]
    vectors = [parameter for parameter in trained if len(shape(parameter)) < 2]
    return [group for group in (matrices, vectors) if group]  # DeepSpeed 不认空的一组


class WholeOptimizer:
    """一个 ``prepare`` 过的 optimizer，以完整的张量存取；存与取所有进程都要调用。

    Args:
        accelerator: 引擎。
        optimizer: 它 ``prepare`` 出来的。
        module: 它 ``prepare`` 出来的模型。
    """

    def __init__(self, accelerator: Accelerator, optimizer: Any, module: nn.Module) -> None:
        self.inner = optimizer.optimizer
        self.zero = hasattr(self.inner, "zero_grad") and not isinstance(
            self.inner, torch.optim.Optimizer
        )
        self.main = accelerator.is_main_process
        unwrapped = accelerator.unwrap_model(module)
        self.groups = parameter_groups(unwrapped)

    def state_dict(self) -> dict[str, Any]:
        """完整的状态，张量在 CPU 上；不是主进程的只参加通信，返回的没有张量。"""
        if not self.zero:
            values: dict[str, Any] = self.inner.state_dict()
            return values | {
                "state": {
                    index: {key: self._kept(value) for key, value in state.items()}
                    for index, state in values["state"].items()
                }
            }
        torch_optimizer = self.inner.optimizer
        return {
            "state": dict(self._zero_states(torch_optimizer)),
            "param_groups": list(self._zero_groups(torch_optimizer)),
        }

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """还原 ``state_dict`` 存下的，不论那时是哪个引擎、几个进程。

        Raises:
            ValueError: 参数的个数与存下的不同。
        """
        found = [len(group["params"]) for group in values["param_groups"]]
        expected = [len(group) for group in self.groups]
        if found != expected:
            raise ValueError(f"the optimizer state is of {found} parameters, expected {expected}")
        parameters = dict(enumerate(parameter for group in self.groups for parameter in group))
        if self.zero:
            self._load_zero(values, parameters)
            return
        self.inner.load_state_dict(
            values
            | {
                "state": {
                    index: {key: _shard(value, parameters[index]) for key, value in state.items()}
                    for index, state in values["state"].items()
                }
            }
        )

    def _kept(self, value: Any) -> Any:
        if hasattr(value, "full_tensor"):
            value = value.full_tensor()
        if not isinstance(value, Tensor):
            return value
        return value.to("cpu") if self.main else value.new_empty(0)

    def _zero_states(self, torch_optimizer: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        flat = next(iter(torch_optimizer.state.values()), None)
        if flat is None:  # 一步还没走
            return
        self._link()
        step = float(flat["step"])
        for index, parameter in enumerate(p for group in self.groups for p in group):
            state: dict[str, Any] = {"step": torch.tensor(step)}  # 各有一份：就地加一
            for key in MOMENTS:
                value = safe_get_full_optimizer_state(parameter, key)
                state[key] = self._kept(value.reshape(shape(parameter)))
            yield index, state

    def _zero_groups(self, torch_optimizer: Any) -> Iterator[dict[str, Any]]:
        start = 0
        for group, parameters in zip(torch_optimizer.param_groups, self.groups, strict=True):
            stop = start + len(parameters)
            settings = {key: value for key, value in group.items() if key in _SETTINGS}
            yield settings | {"params": list(range(start, stop))}
            start = stop

    def _link(self) -> None:
        """ZeRO-2 在第一组更新之后就把各组的参数与动量联系起来，那时后面的还没有动量：重来一次。"""
        if hasattr(self.inner, "_hp_optimizer_states_linked"):
            self.inner._hp_optimizer_states_linked = False
            self.inner._lazy_init_hp_params_optimizer_state()

    def _load_zero(self, values: dict[str, Any], parameters: dict[int, nn.Parameter]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        torch_optimizer = self.inner.optimizer
        for group, saved in zip(torch_optimizer.param_groups, values["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key in _SETTINGS})
        if not values["state"]:
            return
        step = float(next(iter(values["state"].values()))["step"])
        flats = getattr(self.inner, "fp32_partitioned_groups_flat", None)  # ZeRO-3
        for flat in self.inner.single_partition_of_fp32_groups if flats is None else flats:
            torch_optimizer.state[flat] = {
                "step": torch.tensor(step, device=flat.device),
                **{key: torch.zeros_like(flat) for key in MOMENTS},
            }
        self._link()
        for index, state in values["state"].items():
            for key in MOMENTS:
                parameter = parameters[index]
                value = state[key].to(parameter.device, torch.float32)
                safe_set_full_optimizer_state(parameter, value, key)


_SETTINGS = (
    "lr", "initial_lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "foreach",
    "capturable", "differentiable", "fused", "decoupled_weight_decay",
)  # fmt: skip
"""``AdamW`` 一组参数的设置。"""


def _shard(value: Any, parameter: nn.Parameter) -> Any:
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor) or value.ndim == 0:
        return value
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
