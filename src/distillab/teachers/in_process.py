"""教师就是本机上的模型，分布每步现算：每个进程一份的，分到各进程的，或关掉 adapter 的学生。"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..batch import Batch, View
from ..distributed.sharding import WholeCopy, reshard
from ..models.interface import LanguageModel, evaluating
from ..models.lora import adapters_off
from ..targets import DenseTargets, HiddenTargets, Targets
from ..vocabulary import Vocabulary
from .outside import Outside


class LocalTeacher:
    """冻结的教师模型，只做前向，给出 response token 处的 hidden state。

    Args:
        model: 教师；会被设为 eval 并冻结全部参数。

    Attributes:
        outside: 裁剪词表时教师去掉的行；没有裁剪，或量完之后用不着了，是 ``None``。
    """

    outside: Outside | None = None
    inside = False
    """它的目标是不是在学生的 forward 里取。"""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model.eval().requires_grad_(False)

    def __enter__(self) -> LocalTeacher:
        return self

    def __exit__(self, *error: object) -> None:
        """训练完了；现算的没有什么要收拾。"""

    def place(self, device: torch.device) -> None:
        """放到设备上；训练循环在进程组建好之后调用一次。"""
        self.model.to(device)

    def release(self) -> None:
        """一步的目标都取完了：为这一步收齐的可以放掉。"""

    @contextmanager
    def whole(self, keep: bool = True) -> Iterator[LanguageModel]:
        """完整的教师，供它生成；所有进程都要调用，``keep`` 见 ``WholeCopy.filled``。"""
        yield self.model

    def of(self, batch: Batch, vocabulary: Vocabulary) -> Targets:
        """教师在一批上的目标；见 ``targets``。"""
        return self.targets(batch.teacher, vocabulary)

    @torch.no_grad()
    def targets(self, view: View, vocabulary: Vocabulary) -> HiddenTargets | DenseTargets:
        """教师在 ``view`` 上的目标。

        教师以自己的 dtype 计算，不受学生的 autocast 影响。

        Args:
            view: 教师的视角，``P`` 个 response token。
            vocabulary: 两个 tokenizer 定义相同的 token；其余的没有概率。

        Returns:
            ``HiddenTargets``，``hidden [P, H_t]``；裁剪掉的概率要并进来的是 ``DenseTargets``。
        """
        with torch.autocast(view.input_ids.device.type, enabled=False):
            hidden = self._hidden(view)
            head = self.model.head.cut(vocabulary)
            if self.outside is not None:
                return self.outside.targets(hidden, head)
        return HiddenTargets(hidden, head)

    def measured_outside(self) -> Tensor | None:
        """量到的 ``Outside.sums``，``[2]``；没有裁剪是 ``None``。不再量，用不着的就此放掉。"""
        if (outside := self.outside) is None:
            return None
        outside.measuring = False
        self.outside = outside if outside.needed else None
        return outside.sums

    def _hidden(self, view: View) -> Tensor:
        return self.model.read(view)


class ShardedTeacher(LocalTeacher):
    """权重分到各进程的教师：各层用到时收齐，head 与 embedding 每步收齐一次。

    用的是 torch 的 ``fully_shard``，与学生的引擎无关：学生在 DDP、FSDP2、ZeRO 上都可以。只有一个
    进程时没有可分的，与 ``LocalTeacher`` 相同。
    """

    _reader: _Reader | None = None

    def place(self, device: torch.device) -> None:
        """分片；每个进程只留自己的一份。"""
        if not torch.distributed.is_initialized():
            super().place(device)
            return
        from torch.distributed.fsdp import fully_shard

        self._copy = WholeCopy(self.model, device)
        reader = self._reader = _Reader(self.model)
        for block in self.model.blocks:
            fully_shard(block)
        fully_shard(reader)  # 其余的：embedding、最后的 norm 与 head

    def _hidden(self, view: View) -> Tensor:
        """所有进程都要调用；目标里的 head 到 ``release`` 为止有效。"""
        hidden: Tensor = super()._hidden(view) if self._reader is None else self._reader(view)
        return hidden

    def release(self) -> None:
        """放掉收齐的 head。"""
        if self._reader is not None:
            reshard(self._reader)

    @contextmanager
    def whole(self, keep: bool = True) -> Iterator[LanguageModel]:
        """完整的教师的拷贝，退出时放掉。"""
        if self._reader is None:
            yield self.model
            return
        with self._copy.filled(self.model, keep) as model:
            yield model


class _Reader(nn.Module):
    """分片的根：在它的 ``forward`` 之内与之后，embedding 与 head 是完整的。"""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, view: View) -> Tensor:
        return self.model.read(view)


class AdapterOffTeacher(LocalTeacher):
    """关掉 adapter 的学生：它就是自己的基座，不占第二份内存。

    只在取目标的那一刻切到 eval、关掉 adapter，之后（出错时也）还原；从不冻结任何参数。

    Args:
        model: 装了 LoRA 的学生，与训练的是同一个对象。
    """

    inside = True

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self._parts: list[nn.Module] = []

    def place(self, device: torch.device) -> None:
        """学生由引擎来放。"""

    def targets(self, view: View, vocabulary: Vocabulary) -> HiddenTargets | DenseTargets:
        """基座在 ``view`` 上的目标；见 ``LocalTeacher.targets``。"""
        if not self._parts:  # 到第一步，引擎该包装的都包装了
            self._parts = list(self.model.modules())
        with evaluating(self.model, self._parts), adapters_off(self.model):
            return super().targets(view, vocabulary)
