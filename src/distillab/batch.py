"""两个视角、一个 response：``View``、``Batch`` 与它们的不变量。"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""标签里「不训练」的位置，与 ``torch.nn.functional.cross_entropy`` 的约定相同。"""


@dataclass(frozen=True)
class View:
    """一个模型看到的序列，以及哪些位置的 hidden state 预测 response token。

    Attributes:
        input_ids: ``[B, T]``，int64。
        attention_mask: ``[B, T]``，int64，1 为真实 token；``None`` 表示没有 padding。
        index: ``[P]``，int64，``input_ids`` 展平后的位置；第 i 个位置预测 ``labels[i]``。
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    index: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> View:
        """对每个张量施加 ``function``（搬到别的设备、锁页），得到新的视角。"""
        mask = None if self.attention_mask is None else function(self.attention_mask)
        return View(function(self.input_ids), mask, function(self.index))

    def rows(self, hidden: Tensor) -> Tensor:
        """挑出预测 response token 的行：padding 与 prompt 从不进入 head。

        Args:
            hidden: ``[B, T, H]``。

        Returns:
            ``[P, H]``。
        """
        return hidden.flatten(0, 1).index_select(0, self.index)


@dataclass(frozen=True)
class Batch:
    """学生与教师的两个视角，和它们共有的标签。

    Attributes:
        student: 学生的视角。
        teacher: 教师的视角；prompt 与长度可以不同，``P`` 必须相同。
        labels: ``[P]``，int64，response token；不含 ``IGNORE_INDEX``。

    Raises:
        ValueError: 两个视角的 ``index`` 与 ``labels`` 长度不一。
    """

    student: View
    teacher: View
    labels: Tensor

    def __post_init__(self) -> None:
        sizes = (len(self.student.index), len(self.teacher.index), len(self.labels))
        if len(set(sizes)) != 1:
            raise ValueError(
                f"a batch has one row per response token in both views, found "
                f"{sizes[0]} student rows, {sizes[1]} teacher rows and {sizes[2]} labels"
            )

    def __len__(self) -> int:
        """Response token 的个数 ``P``。"""
        return len(self.labels)

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """对每个张量施加 ``function``；两个视角是同一个对象时只做一次。"""
        student = self.student.map(function)
        teacher = student if self.teacher is self.student else self.teacher.map(function)
        return Batch(student, teacher, function(self.labels))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """搬到 ``device``；Accelerate 的 DataLoader 会调用它。"""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """放进锁页内存，到 GPU 的传输才能异步；PyTorch 的 DataLoader 会调用它。"""
        return self.map(Tensor.pin_memory)


def collate_text(items: Sequence[Mapping[str, Tensor]], vocab_limit: int | None = None) -> Batch:
    """把等长的文本块拼成 ``Batch``，两个模型看同一个视角。

    Args:
        items: 每项有 ``input_ids [T]`` 与 ``labels [T]``，``labels[t]`` 是位置 t 的目标，
            ``IGNORE_INDEX`` 的位置不训练。
        vocab_limit: 两个 tokenizer 共有的 token 数；共有词表之外的目标不训练。

    Returns:
        没有 padding 的 ``Batch``。
    """
    labels = torch.stack([item["labels"] for item in items]).flatten()
    trained = labels != IGNORE_INDEX
    if vocab_limit is not None:
        trained &= labels < vocab_limit
    index = trained.nonzero().squeeze(1)
    view = View(torch.stack([item["input_ids"] for item in items]), None, index)
    return Batch(view, view, labels[index])
