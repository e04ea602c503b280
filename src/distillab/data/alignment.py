"""同样的文字，两个分词器的切法：按 UTF-8 字节对齐成段，并数出对得有多齐。

一段（chunk）是两种切法都在其两头断开的最短的一截：``[" hel", "lo"]`` 与
``[" ", "hello"]`` 是一段，拼成一个字的几个字节 token 也在一段里。文字不同的一截（某个分词器
做了 NFC）对不上：两头相同的照旧对齐，中间的不要。
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..batch import Alignment, Example, Tokens
from .sides import Sides

Ints = NDArray[np.int64]

KINDS = ("one to one", "one to several", "several to several", "left out")
CLASSES = {"all": bytes(range(255)), "digits": b"0123456789", "white space": b" \t\n\r"}
"""各类字节；``END`` 不是文字，不在其中。"""


def align(ours: Sequence[bytes], theirs: Sequence[bytes]) -> tuple[Ints, Ints]:
    """两串 token 的字节 → 各 token 在第几段，从 0 数起；没有对上的是 -1。"""
    a, b = b"".join(ours), b"".join(theirs)
    left, right = (np.cumsum([len(part) for part in side], dtype=np.int64)
                   for side in (ours, theirs))  # fmt: skip
    if b == b" " + a:  # 分词器在开头加的空格不是文字
        right, b = np.maximum(right - 1, 0), a
    elif a == b" " + b:
        left, a = np.maximum(left - 1, 0), b
    if a == b:
        common = np.intersect1d(left, right)
        return _chunks(left, common), _chunks(right, common)
    # 前 same 个、后 rest 个字节相同；left 换算成 b 里的位置，不同的那一截里面没有位置。
    same = _same(a, b)
    most = min(len(a), len(b)) - same
    rest = _same(a[::-1][:most], b[::-1][:most])
    known = [(e <= same) | (e >= len(t) - rest) for e, t in ((left, a), (right, b))]
    moved = left + len(b) - len(a)
    known[0] &= (left <= same) | (moved > same)  # 对方没有那一截，它的结尾就与开头重合
    left = np.where(left <= same, left, moved)
    common = np.intersect1d(left[known[0]], right[known[1]])
    hole = int(np.searchsorted(common[common > 0], same, "right"))
    found = []
    for ends, sure in zip((left, right), known, strict=True):
        chunk = _chunks(ends, common)
        chunk[~sure | (chunk == hole)] = -1
        found.append(chunk)
    return found[0], found[1]


def _same(a: bytes, b: bytes) -> int:
    """开头有几个字节相同。"""
    size = min(len(a), len(b))
    differ = np.frombuffer(a[:size], np.uint8) != np.frombuffer(b[:size], np.uint8)
    return int(differ.argmax()) if differ.any() else size


def _chunks(ends: Ints, common: Ints) -> Ints:
    common = common[common > 0]  # 开头没有字节的 token 属于第一段
    chunk = np.searchsorted(common, ends)
    chunk[chunk == len(common)] = -1
    return chunk


class Aligner:
    """把一条数据的两个视角对齐；``sides`` 是两个分词器。"""

    def __init__(self, sides: Sides) -> None:
        self.sides = sides

    def chunks(self, example: Example) -> tuple[Ints, Ints]:
        """``(学生, 教师)`` 的每个 response token 在第几段；有一个 token 不训练的段不要，是 -1。"""
        views = (example.student, example.teacher)
        whole = [np.full(len(view.ids), -1) for view in views]
        learned = [_learned(view) for view in views]
        count = 0
        for segment in example.segments or ():
            texts = [
                [side.bytes[index] for index in view.ids[part.start : part.stop]]
                for side, view, part in zip(self.sides, views, segment, strict=True)
            ]
            for into, part, found in zip(whole, segment, align(*texts), strict=True):
                into[part.start : part.stop] = np.where(found < 0, -1, found + count)
            count = 1 + max((int(into.max(initial=-1)) for into in whole), default=-1)
        for into, kept in zip(whole, learned, strict=True):
            broken = np.unique(into[~kept])
            for other in whole:
                other[np.isin(other, broken)] = -1
        both = np.intersect1d(whole[0], whole[1])
        both = both[both >= 0]
        numbered = [
            np.where(np.isin(into, both), np.searchsorted(both, into), -1) for into in whole
        ]
        of_student, of_teacher = (
            into[view.response] for into, view in zip(numbered, views, strict=True)
        )
        return of_student, of_teacher

    def alignment(self, examples: Sequence[Example]) -> Alignment:
        """一批的各段，编号首尾相接。"""
        parts: list[tuple[Ints, Ints]] = []
        count = 0
        for found in map(self.chunks, examples):
            parts.append(tuple(np.where(part < 0, -1, part + count) for part in found))  # type: ignore[arg-type]
            count += 1 + int(found[0].max(initial=-1))
        ours, theirs = (_tensors([part[side] for part in parts], count) for side in (0, 1))
        labels = [token for example in examples for token in example.teacher.labels]
        return Alignment(
            torch.tensor(labels, dtype=torch.long), ours[0], theirs[0], ours[1], theirs[1]
        )


def _learned(view: Tokens) -> NDArray[np.bool_]:
    learned = np.zeros(len(view.ids), bool)
    learned[view.response] = True
    return learned


def _tensors(chunks: list[Ints], count: int) -> tuple[Tensor, Tensor]:
    """``(每行的段号，没有的是 count；每段的第一行)``。"""
    rows = np.concatenate([*chunks, np.empty(0, np.int64)]).astype(np.int64)
    numbers, first = np.unique(rows, return_index=True)
    first = first[numbers >= 0]
    return torch.from_numpy(np.where(rows < 0, count, rows)), torch.from_numpy(first)


# ---------------------------------------------------------------------- 对得有多齐


@dataclass
class Audit:
    """Response 的文字对得有多齐，以字节计；由 ``add`` 一条条累加。

    Attributes:
        counts: ``KINDS`` × ``CLASSES`` 的字节数。
        shared: ``CLASSES`` 的、学生的 token 教师也有的字节数：``gold`` 按词比较的就是它们。
        tokens: 学生的 response token 数，与其中没有对上的。
    """

    aligner: Aligner
    counts: Ints = field(default_factory=lambda: np.zeros((len(KINDS), len(CLASSES)), np.int64))
    shared: Ints = field(default_factory=lambda: np.zeros(len(CLASSES), np.int64))
    tokens: list[int] = field(default_factory=lambda: [0, 0])

    def add(self, examples: Iterable[Example]) -> Audit:
        """再数几条；返回自己。"""
        sides = self.aligner.sides
        common = set(sides.shared.student)
        for example in examples:
            ours, theirs = self.aligner.chunks(example)
            labels = example.student.labels
            self.tokens[0] += len(labels)
            self.tokens[1] += int((ours < 0).sum())
            sizes = [
                np.bincount(part[part >= 0], minlength=int(ours.max(initial=-1)) + 1)
                for part in (ours, theirs)
            ]
            kind = np.where(
                (sizes[0] == 1) & (sizes[1] == 1), 0,
                np.where((sizes[0] == 1) | (sizes[1] == 1), 1, 2),
            )  # fmt: skip
            kind = np.append(kind, 3)  # 段号 -1 正好取到最后一个
            texts = [sides.student.bytes[index] for index in labels]
            lengths = [len(text) for text in texts]
            data = np.frombuffer(b"".join(texts), np.uint8)
            of_byte = np.repeat(kind[ours], lengths)
            known = np.repeat([index in common for index in labels], lengths)
            for column, inside in enumerate(CLASSES.values()):
                chosen = np.isin(data, np.frombuffer(inside, np.uint8))
                self.counts[:, column] += np.bincount(of_byte[chosen], minlength=len(KINDS))
                self.shared[column] += int(known[chosen].sum())
        return self

    def shares(self) -> dict[str, dict[str, float]]:
        """各类字节 → 各种对法的份额，与 ``in both vocabularies`` 的；没有的类不出现。"""
        found = {}
        for column, name in enumerate(CLASSES):
            total = int(self.counts[:, column].sum())
            if total:
                own = dict(zip(KINDS, (self.counts[:, column] / total).tolist(), strict=True))
                both = float(self.shared[column]) / total
                found[name] = {"bytes": total, **own, "in both vocabularies": both}
        return found

    def lines(self) -> list[str]:
        """给日志的几行英文。"""
        lines = []
        for name, row in self.shares().items():
            what = "response text" if name == "all" else name
            kinds = ", ".join(f"{row[kind]:.1%} {kind}" for kind in KINDS)
            lines.append(
                f"{what} between the two tokenizers: {kinds}; {row['in both vocabularies']:.1%} "
                f"in tokens that both have"
            )
        count, left = self.tokens
        if left:
            lines.append(
                f"{left:,} of {count:,} response tokens have no counterpart: cross-entropy alone"
            )
        return lines

    def summary(self) -> dict[str, Any]:
        """给 ``summary.json`` 的。"""
        return {"text": self.shares(), "tokens": self.tokens[0], "tokens_left_out": self.tokens[1]}
