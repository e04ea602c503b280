"""分片的权重与 optimizer：收成整份、写回分片，以及一份供生成与导出的完整拷贝。

FSDP2 的参数是 ``DTensor``，ZeRO 的见 ``zero.py``；这里把它们与没有分片的说成同样的几件事。
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..models.interface import LanguageModel
from . import zero

if TYPE_CHECKING:
    from accelerate import Accelerator

Model = TypeVar("Model", bound=LanguageModel)


def whole(tensor: Tensor) -> Tensor:
    """``module.state_dict(keep_vars=True)`` 的一项的全部，不带计算图；所有进程都要调用。

    训练的参数取 float32 的那份；没有分片时就是它自己的数据，不复制。
    """
    from torch.distributed.tensor import DTensor

    if zero.owns(tensor):
        return zero.whole(tensor)
    data = tensor.detach()
    return data.full_tensor() if isinstance(data, DTensor) else data


@torch.no_grad()
def place(tensor: Tensor, value: Tensor) -> None:
    """把完整的 ``value`` 写进参数或 buffer，各进程留下自己的一片；各进程都要调用，给的相同。"""
    if zero.owns(tensor):
        zero.place(tensor, value)
    else:
        tensor.copy_(_sharded(value, tensor))


def _sharded(value: Tensor, like: Tensor) -> Tensor:
    """完整的 ``value`` 分得与 ``like`` 一样；没有分片的与标量（步数）原样返回。"""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or value.ndim == 0:
        return value
    value = value.to(like.device, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def reshard(module: nn.Module) -> None:
    """FSDP2 的根在前向之后还留着收齐的参数；读写权重之前放回去，否则改的是就要丢掉的那份。"""
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def parameter_groups(module: nn.Module) -> list[list[nn.Parameter]]:
    """训练的参数分成两组：矩阵，与不做 weight decay 的一维参数；空的一组不要。"""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if len(zero.shape(parameter)) >= 2]
    vectors = [parameter for parameter in trained if len(zero.shape(parameter)) < 2]
    return [group for group in (matrices, vectors) if group]  # DeepSpeed 不认空的一组


class WholeOptimizer:
    """一个 ``prepare`` 过的 optimizer，以完整的张量存取；存与取所有进程都要调用。

    与引擎、进程数都无关，就是一个进程的 ``AdamW.state_dict()``，参数按 ``parameter_groups`` 编号。
    不用 torch 的 ``get_optimizer_state_dict``：optimizer 一步还没走时它会先空走一步，步数就多了一。
    """

    def __init__(self, accelerator: Accelerator, optimizer: Any, module: nn.Module) -> None:
        self._inner = optimizer.optimizer
        self._zero = not isinstance(self._inner, torch.optim.Optimizer)
        self._main = accelerator.is_main_process
        module = accelerator.unwrap_model(module)
        reshard(module)
        groups = parameter_groups(module)
        self._sizes = [len(group) for group in groups]
        self._parameters = [parameter for group in groups for parameter in group]

    def state_dict(self) -> dict[str, Any]:
        """完整的状态，张量在 CPU 上；不是主进程的只参加通信，返回的没有张量。"""
        if self._zero:
            groups = zero.optimizer_groups(self._inner, self._sizes)
            states = zero.optimizer_states(self._inner, self._parameters)
        else:
            values = self._inner.state_dict()
            groups, states = values["param_groups"], values["state"].items()
        return {
            "state": {
                index: {key: self._kept(value) for key, value in state.items()}
                for index, state in states
            },
            "param_groups": groups,
        }

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """还原 ``state_dict`` 存下的，不论是哪个引擎、几个进程；参数个数不同是 ``ValueError``。"""
        found = [len(group["params"]) for group in values["param_groups"]]
        if found != self._sizes:
            raise ValueError(
                f"the optimizer state is of {found} parameters, expected {self._sizes}"
            )
        if self._zero:
            zero.load_optimizer(self._inner, values, self._parameters)
            return
        states = {
            index: {key: _sharded(value, self._parameters[index]) for key, value in state.items()}
            for index, state in values["state"].items()
        }
        self._inner.load_state_dict(values | {"state": states})

    def _kept(self, value: Tensor) -> Tensor:
        value = whole(value)
        return value.to("cpu") if self._main else value.new_empty(0)


class WholeCopy(Generic[Model]):
    """一个要分片的模型的空壳，需要时装满权重：生成与导出用它，一步里便没有任何集合通信。

    逐层收齐再生成，每个 token 都要通信一遍，先说完的进程还会让别人等到天荒地老；所以一次收齐
    全部，生成完就放掉。``model`` 还没有分片，只看它的结构。
    """

    def __init__(self, model: Model, device: torch.device) -> None:
        memo: dict[int, Any] = {
            id(parameter): nn.Parameter(
                torch.empty(0, dtype=parameter.dtype, device=device), requires_grad=False
            )
            for parameter in model.parameters()
        }
        self._shell: Model = copy.deepcopy(model, memo).to(device)  # 参数不复制，buffer 复制
        self._dtypes = [parameter.dtype for parameter in self._shell.parameters()]

    @contextmanager
    def filled(
        self, model: nn.Module, keep: bool = True, compute: torch.dtype = torch.float32
    ) -> Iterator[Model]:
        """装满 ``model``（分片了的同一个）的权重的拷贝，退出时放掉。所有进程都要调用。

        不 ``keep`` 的进程只参加通信，得到空壳。``compute`` 是用它时 autocast 的类型：线性层的参数
        就装成它，结果逐位相同，内存少近一半。
        """
        reshard(model)
        parameters = list(self._shell.parameters())
        cast = {id(part) for part in _block_linears(self._shell)} if compute.itemsize < 4 else set()
        try:
            for target, source, dtype in zip(
                parameters, model.parameters(), self._dtypes, strict=True
            ):
                value = whole(source)
                if keep:
                    value = value.to(compute if id(target) in cast else dtype)
                    target.data = value.clone() if value.data_ptr() == source.data_ptr() else value
            yield self._shell
        finally:
            for target, dtype in zip(parameters, self._dtypes, strict=True):
                target.data = target.data.new_empty(0, dtype=dtype)


def _block_linears(model: LanguageModel) -> Iterator[nn.Parameter]:
    """各层里线性层的参数；输出层不在内，logits 总是 float32 的。"""
    for block in model.blocks:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                yield from module.parameters(recurse=False)
