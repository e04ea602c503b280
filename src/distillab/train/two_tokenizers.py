"""教师用自己的分词器时训练要知道的：它的词表、两边都有的 token，与两边每个 token 的字节数。"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch
from ..models.token_bytes import END
from ..vocabulary import SharedTokens, Vocabulary


@dataclass(frozen=True)
class Across:
    """缺省的是教师与学生用同一个词表，字节数也不知道。

    Attributes:
        student_bytes: ``[V_s]``，学生的每个 token 有几个字节，说完了的是 0；``None`` 为不知道。
        teacher_bytes: ``[V_t]``，同上，教师的；``None`` 为与学生的相同。
        teacher_vocabulary: 教师有概率的 token；``None`` 为与学生的相同。
        shared: 两边的 token 怎样相配，``projected_kl`` 与 ``gold`` 要它。
        audit: ``Audit.summary`` 的，给 ``summary.json``；``None`` 为用同一个分词器。
    """

    student_bytes: Tensor | None = None
    teacher_bytes: Tensor | None = None
    teacher_vocabulary: Vocabulary | None = None
    shared: SharedTokens | None = None
    audit: dict[str, Any] | None = None

    def to(self, device: torch.device) -> Across:
        """字节数的表搬到 ``device``：验证的每一批都查它。"""
        tables = (self.student_bytes, self.teacher_bytes)
        ours, theirs = (None if table is None else table.to(device) for table in tables)
        return replace(self, student_bytes=ours, teacher_bytes=theirs)

    def bytes_of(self, batch: Batch) -> Tensor:
        """一批的 response 的字节数 ``[2]``，学生的与教师的，float64；不知道的是 0。"""
        found = torch.zeros(2, dtype=torch.float64, device=batch.labels.device)
        theirs = batch.labels
        if batch.alignment is not None:
            theirs = batch.alignment.teacher_labels
        if self.student_bytes is not None:
            found[0] = self.student_bytes[batch.labels].sum()
            other = self.student_bytes if self.teacher_bytes is None else self.teacher_bytes
            found[1] = other[theirs].sum()
        return found


def byte_counts(table: Sequence[bytes]) -> Tensor:
    """``token_bytes`` 的各项有几个字节，``[V]``，int64；``END`` 不是文字。"""
    return torch.tensor([0 if text == END else len(text) for text in table])
