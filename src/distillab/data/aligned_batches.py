"""分词器不同时的批：两个视角各自的 token 与 padding，两边的标签，与它们怎样对上。"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..batch import Batch, Example, collate_view
from .alignment import Aligner
from .sides import Sides, text_example


class AlignedCollate:
    """把文本块、``Example`` 或放在一行里的几条 ``Example`` 拼成有 ``alignment`` 的 ``Batch``。

    ``pad_ids`` 是 ``(学生, 教师)`` 的；文本块的教师读 ``limit`` 个 token 为止。
    """

    def __init__(self, sides: Sides, pad_ids: tuple[int, int], limit: int) -> None:
        self.aligner, self.pad_ids, self.limit = Aligner(sides), pad_ids, limit

    def example(self, item: Any) -> Example:
        """数据集的一项；文本块在这里译成教师的 token。"""
        if isinstance(item, Example):
            return item
        return text_example(item, self.aligner.sides, self.limit)

    def __call__(self, items: Sequence[Any]) -> Batch:
        """几项 → 一批。"""
        packed = isinstance(items[0], tuple)
        rows = [list(item) if packed else [self.example(item)] for item in items]
        examples = [example for row in rows for example in row]
        student, teacher = (
            collate_view([[getattr(one, side) for one in row] for row in rows], None, pad_id,
                         packed=packed)
            for side, pad_id in zip(("student", "teacher"), self.pad_ids, strict=True)
        )  # fmt: skip
        labels = [token for example in examples for token in example.student.labels]
        return Batch(
            student,
            teacher,
            torch.tensor(labels, dtype=torch.long),
            tuple(examples) if isinstance(items[0], Example) else None,
            alignment=self.aligner.alignment(examples),
        )
