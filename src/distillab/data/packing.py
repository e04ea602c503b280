"""Sequence packing：几条长短不一的对话放进一行，互相看不见，padding 便几乎没有。

一行里的每条在两个视角都放得下，次序也相同，所以第 i 行的 hidden state 仍预测同一个 token。哪几条
放在一起只由长度与种子决定，各轮相同；训练时再打乱各行的先后。
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from ..batch import Batch, Example, collate_examples, collate_packed
from ..models.interface import LanguageModel, evaluating
from ..vocabulary import Vocabulary
from .chat_dataset import ChatDataset

SORTED_TOGETHER = 2000
"""一次由长到短排列这么多条；全体一起排，同一行里就总是长短同样的搭配。"""


def best_fit(
    sizes: Sequence[tuple[int, int]], capacity: int, seed: int = 0, together: int = SORTED_TOGETHER
) -> list[list[int]]:
    """把每条放进还放得下它的、剩得最少的一行（best-fit decreasing）；给出每行由哪几条组成。
    ``sizes`` 是每条 ``(学生, 教师)`` 的 token 数；先由 ``seed`` 随机排列，再每 ``together`` 条由长
    到短。
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(sizes), generator=generator).tolist()
    shortest = min((max(size) for size in sizes), default=0)
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []
    # 还放得下的行，按较紧的那个视角剩下的多少排列，二分就能找到第一个候选。
    open_rows: list[tuple[int, int]] = []
    for start in range(0, len(order), together):
        part = sorted(order[start : start + together], key=lambda i: max(sizes[i]), reverse=True)
        for i in part:
            student, teacher = sizes[i]
            at = bisect.bisect_left(open_rows, (min(student, teacher), -1))
            while at < len(open_rows):
                left = room[open_rows[at][1]]
                if student <= left[0] and teacher <= left[1]:
                    break
                at += 1
            if at < len(open_rows):
                row = open_rows.pop(at)[1]
            else:
                row = len(rows)
                rows.append([])
                room.append((capacity, capacity))
            rows[row].append(i)
            room[row] = (room[row][0] - student, room[row][1] - teacher)
            if min(room[row]) >= shortest:
                bisect.insort(open_rows, (min(room[row]), row))
    return rows


class PackedDataset(Dataset[tuple[Example, ...]]):
    """每项是一行：放在一起的几条 ``Example``，一共至多 ``max_seq_len``（缺省为 ``data`` 的）。
    ``rows`` 是每行有 ``data`` 的哪几条；``filled`` 是 ``(学生, 教师)`` 两个视角里，不是 padding 的
    token 占的份额。
    """

    def __init__(self, data: ChatDataset, max_seq_len: int | None = None, seed: int = 0) -> None:
        self.data = data
        self.max_seq_len = max_seq_len or data.max_seq_len
        sizes = data.view_lengths
        self.rows = best_fit(sizes, self.max_seq_len, seed)
        slots = max(len(self.rows) * self.max_seq_len, 1)
        student, teacher = (sum(size[side] for size in sizes) / slots for side in (0, 1))
        self.filled = (student, teacher)
        self.fingerprint = f"{data.fingerprint}-packed-{self.max_seq_len}-{seed}"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Example, ...]:
        return tuple(self.data[i] for i in self.rows[index])


def collate_rows(
    items: Sequence[Example] | Sequence[tuple[Example, ...]],
    pad_id: int,
    vocabulary: Vocabulary | None = None,
) -> Batch:
    """``PackedDataset`` 的各行，或（验证时）没有装在一起的各条，拼成 ``Batch``。"""
    if isinstance(items[0], tuple):
        return collate_packed(items, pad_id, vocabulary)  # type: ignore[arg-type]
    return collate_examples(items, pad_id, vocabulary)  # type: ignore[arg-type]


@torch.no_grad()
def keeps_documents_apart(model: LanguageModel) -> bool:
    """``model`` 能否让一行里的几段互不相见：改掉第一段，看第二段的 hidden state 变不变。

    按名字列出支持的注意力实现迟早会错；十几个 token 的两次前向总是对的。
    """
    device = model.head.weight.device
    ids = torch.arange(1, 13, device=device)[None] % model.vocab_size
    changed = ids.clone()
    changed[:, :6] = (ids[:, :6] + 17) % model.vocab_size
    positions = torch.arange(12, device=device)[None] % 6
    try:
        with evaluating(model):
            first, second = (model(row, position_ids=positions)[:, 6:] for row in (ids, changed))
    except ValueError:  # 不看 position_ids
        return False
    # 同样的形状与次序，算出的应当一样；只有专家的分组可能让末位不同。
    tolerance = 4 * torch.finfo(first.dtype).eps * float(first.abs().max())
    return bool((first - second).abs().max() <= tolerance)
