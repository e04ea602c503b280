"""分片的权重：收成整份、写回分片，以及一份供生成与导出的完整拷贝。

FSDP2 的参数是 ``DTensor``；ZeRO-3 的参数平时是空的；ZeRO-2 的参数完整，但 float32 的那份在
optimizer 里，也分了片。这里把三者说成同两件事：``whole`` 与 ``place``。
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..models.interface import LanguageModel

Model = TypeVar("Model", bound=LanguageModel)


def whole(tensor: Tensor) -> Tensor:
    """一个参数或 buffer 的全部，不带计算图；训练的参数取 float32 的那份。所有进程都要调用。

    Args:
        tensor: ``module.state_dict(keep_vars=True)`` 的一项。

    Returns:
        完整的张量；没有分片时就是它自己的数据，不复制。
    """
    from torch.distributed.tensor import DTensor

    data = tensor.detach()
    if isinstance(data, DTensor):
        return data.full_tensor()
    if _in_zero(tensor) and tensor.requires_grad:
        from deepspeed.utils import safe_get_full_fp32_param

        full: Tensor = safe_get_full_fp32_param(tensor)
        return full.detach().reshape(shape(tensor))
    with gathered(tensor):
        return tensor.detach().clone() if hasattr(tensor, "ds_id") else data


def place(tensor: Tensor, value: Tensor) -> None:
    """把完整的 ``value`` 写进参数或 buffer，各进程留下自己的一片。所有进程都要调用。

    Args:
        tensor: 见 ``whole``。
        value: 同样的形状；各进程给的相同。
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    with torch.no_grad():
        if isinstance(tensor, DTensor):
            value = value.to(tensor.device, tensor.dtype)
            tensor.copy_(
                distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
            )
            return
        if _in_zero(tensor) and tensor.requires_grad:
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(tensor, value.to(tensor.device, torch.float32))
        with gathered(tensor, modified=True):
            tensor.copy_(value)


def shape(tensor: Tensor) -> torch.Size:
    """完整的形状；ZeRO-3 的参数自己的 ``shape`` 是空的。"""
    size: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return size


def gathered(tensor: Tensor, modified: bool = False) -> Any:
    """ZeRO-3 的参数在 with 之内是完整的；``modified`` 则以主进程写下的为准。别的参数不受影响。"""
    if not hasattr(tensor, "ds_id"):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([tensor], modifier_rank=0 if modified else None)


def reshard(module: nn.Module) -> None:
    """FSDP2 的根在前向之后还留着收齐的参数；读写权重之前放回去，否则改的是就要丢掉的那份。"""
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _in_zero(tensor: Tensor) -> bool:
    return hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping")


class WholeCopy(Generic[Model]):
    """一个要分片的模型的空壳，需要时装满权重：生成与导出用它，一步里便没有任何集合通信。

    逐层收齐再生成，每个 token 都要通信一遍，先说完的进程还会让别人等到天荒地老；所以一次收齐
    全部，生成完就放掉。

    Args:
        model: 还没有分片的模型；只看结构。
        device: 装满之后放在哪里。
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
        """装满权重的拷贝，退出时放掉。所有进程都要调用。

        Args:
            model: 分片了的同一个模型。
            keep: 这个进程要不要；不要的只参加通信，得到的是空壳。
            compute: 在 autocast 里用它时 autocast 的类型：层里线性层的参数直接装成它，结果逐位
                相同，内存少近一半。
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
