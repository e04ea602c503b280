"""两个视角、一个 response：``View``、``Batch`` 与它们的不变量。"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import compress, pairwise

import torch
from torch import Tensor

from .targets import SparseTargets
from .vocabulary import Vocabulary

IGNORE_INDEX = -100
"""标签里「不训练」的位置，与 ``torch.nn.functional.cross_entropy`` 的约定相同。"""


@dataclass(frozen=True)
class View:
    """一个模型看到的序列，以及哪些位置的 hidden state 预测 response token。

    Attributes:
        input_ids: ``[B, T]``，int64。
        attention_mask: ``[B, T]``，int64，1 为真实 token；``None`` 表示没有 padding。
        index: ``[P]``，int64，``input_ids`` 展平后的位置；第 i 个位置预测 ``labels[i]``。
        position_ids: ``[B, T]``，int64，一行里放了几段文档时每段各从 0 数起，文档互相看不见；
            ``None`` 表示一行就是一段。
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    index: Tensor
    position_ids: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> View:
        """对每个张量施加 ``function``（搬到别的设备、锁页），得到新的视角。"""
        mask = None if self.attention_mask is None else function(self.attention_mask)
        positions = None if self.position_ids is None else function(self.position_ids)
        return View(function(self.input_ids), mask, function(self.index), positions)

    def rows(self, hidden: Tensor) -> Tensor:
        """挑出预测 response token 的行：padding 与 prompt 从不进入 head。

        Args:
            hidden: ``[B, T, H]``。

        Returns:
            ``[P, H]``。
        """
        return hidden.flatten(0, 1).index_select(0, self.index)


@dataclass(frozen=True)
class Tokens:
    """一个视角的一条序列：全部 token，与 response token 在其中的位置，递增，都大于 0。"""

    ids: list[int]
    response: list[int]

    def __post_init__(self) -> None:
        bounds = [0, *self.response, len(self.ids)]
        if any(left >= right for left, right in pairwise(bounds)):
            raise ValueError(
                f"response positions must increase within 1..{len(self.ids) - 1}, "
                f"found {self.response[:8]}"
            )

    @property
    def prompt(self) -> list[int]:
        """最后一段连续的 response 之前的 token：从学生采样时由此开始。"""
        start = len(self.response) - 1
        while start > 0 and self.response[start - 1] == self.response[start] - 1:
            start -= 1
        return self.ids[: self.response[start]] if self.response else self.ids

    @property
    def labels(self) -> list[int]:
        """Response token 本身。"""
        return [self.ids[position] for position in self.response]


Segment = tuple[range, range]
"""``(学生, 教师)`` 的位置：两边的这些 token 应当是同样的文字。"""


@dataclass(frozen=True)
class Example:
    """一条训练数据：学生与教师各自读到的序列，response 相同。

    Attributes:
        student: 学生的视角。
        teacher: 教师的视角；没有特权信息时就是 ``student``。
        segments: 分词器不同时，两个视角里同样的文字在哪里；``None`` 为 token 相同。
        source: 来自 ``data.mixture`` 的第几个来源；只有一个时是 0。

    Raises:
        ValueError: 两个视角的 response 不同。
    """

    student: Tokens
    teacher: Tokens
    segments: tuple[Segment, ...] | None = None
    source: int = 0

    @property
    def views(self) -> tuple[Tokens, ...]:
        """学生的视角；教师的不同时还有教师的。"""
        return (self.student,) if self.teacher is self.student else (self.student, self.teacher)

    def __post_init__(self) -> None:
        same = self.teacher is self.student or self.segments is not None
        if not same and self.student.labels != self.teacher.labels:
            raise ValueError(
                f"the two views of an example must share one response, found "
                f"{len(self.student.response)} and {len(self.teacher.response)} tokens"
            )


@dataclass(frozen=True)
class Alignment:
    """分词器不同时，教师的标签与两边的各段：一段是两种切法都在其两头断开的最短的文字。

    Attributes:
        teacher_labels: ``[P_t]``，int64，教师的 response token。
        student_chunk: ``[P]``，int64，学生的每个 response token 在第几段；没有对上的是 ``C``。
        teacher_chunk: ``[P_t]``，同上，教师的。
        student_first: ``[C]``，int64，各段的第一个 token 是学生的第几个 response token。
        teacher_first: ``[C]``，同上，教师的。
    """

    teacher_labels: Tensor
    student_chunk: Tensor
    teacher_chunk: Tensor
    student_first: Tensor
    teacher_first: Tensor

    def __len__(self) -> int:
        """段数 ``C``。"""
        return len(self.student_first)

    def map(self, function: Callable[[Tensor], Tensor]) -> Alignment:
        """对每个张量施加 ``function``。"""
        return Alignment(*(function(getattr(self, field.name)) for field in fields(self)))


@dataclass(frozen=True)
class FailedRow:
    """一条跳过的数据：它在数据集里的编号，与异常的类型和第一行。"""

    index: int
    reason: str


@dataclass(frozen=True)
class Batch:
    """学生与教师的两个视角，和它们共有的标签。

    Attributes:
        student: 学生的视角。
        teacher: 教师的视角；prompt 与长度可以不同，``P`` 必须相同。
        labels: ``[P]``，int64，response token；不含 ``IGNORE_INDEX``。
        alignment: 分词器不同时教师的标签，与两边怎样对上；那时教师的行数是它自己的 ``P_t``。
        keys: 教师读的各段文字的摘要，与每段有几个 response token；没有存教师的分布时是 ``None``。
        stored: 存下的教师的分布；``None`` 为还没有存，或有一段没有。
        examples: 这一批由哪些 ``Example`` 拼成，留在主机上；文本块没有。
        failed: 本该在这一批、读不出或拼不进去的。

    Raises:
        ValueError: 两个视角的 ``index`` 与 ``labels`` 长度不一。
    """

    student: View
    teacher: View
    labels: Tensor
    examples: tuple[Example, ...] | None = None
    failed: tuple[FailedRow, ...] = ()
    alignment: Alignment | None = None
    keys: tuple[tuple[bytes, int], ...] | None = None
    stored: SparseTargets | None = None

    def __post_init__(self) -> None:
        sizes = (len(self.student.index), len(self.teacher.index), len(self.labels))
        if len(set(sizes)) != 1 and self.alignment is None:
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
        aligned = None if self.alignment is None else self.alignment.map(function)
        return replace(
            self,
            student=student,
            teacher=teacher,
            labels=function(self.labels),
            alignment=aligned,
            stored=None if self.stored is None else self.stored.map(function),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """搬到 ``device``；Accelerate 的 DataLoader 会调用它。去 GPU 的先锁页，主机总是不等。"""
        if torch.device(device).type == "cuda" and not self.labels.is_cuda:
            return self.map(lambda tensor: tensor.pin_memory().to(device, non_blocking=True))
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """放进锁页内存，到 GPU 的传输才能异步；PyTorch 的 DataLoader 会调用它。"""
        return self.map(Tensor.pin_memory)


def collate_text(
    items: Sequence[Mapping[str, Tensor]],
    vocabulary: Vocabulary | None = None,
    separator: int | None = None,
) -> Batch:
    """把等长的文本块拼成 ``Batch``，两个模型看同一个视角。

    Args:
        items: 每项有 ``input_ids [T]`` 与 ``labels [T]``，``labels[t]`` 是位置 t 的目标，
            ``IGNORE_INDEX`` 的位置不训练。
        vocabulary: 两个 tokenizer 共有的 token；共有词表之外的目标不训练。
        separator: 文章之后的分隔 token；给出它，块里的文章便互相看不见，也不由分隔 token 去猜
            下一篇的开头。

    Returns:
        没有 padding 的 ``Batch``。
    """
    labels = torch.stack([item["labels"] for item in items]).flatten()
    trained = labels != IGNORE_INDEX
    if vocabulary is not None:
        trained &= vocabulary.mask(labels)
    ids = torch.stack([item["input_ids"] for item in items])
    positions = None
    if separator is not None:
        ends = ids == separator
        trained &= ~ends.flatten()
        steps = torch.arange(ids.shape[1]).expand_as(ids)
        starts = torch.zeros_like(ids)
        starts[:, 1:] = torch.where(ends[:, :-1], steps[:, 1:], 0)
        positions = steps - starts.cummax(dim=1).values
    index = trained.nonzero().squeeze(1)
    view = View(ids, None, index, positions)
    return Batch(view, view, labels[index])


def chunk_example(item: Mapping[str, Tensor]) -> Example:
    """文本块（见 ``collate_text`` 的 ``items``）作为一条 ``Example``，预测它的各个目标。"""
    learned = (item["labels"] != IGNORE_INDEX).nonzero()[:, 0] + 1
    view = Tokens(item["input_ids"].tolist(), learned.tolist())
    return Example(view, view)


def chunk_documents(item: Mapping[str, Tensor], separator: int) -> tuple[Example, ...]:
    """文本块里的文章（以 ``separator`` 结尾）各成一条，与 ``collate_text`` 给出它时训练的相同。"""
    whole = chunk_example(item).student
    ends = [at + 1 for at, token in enumerate(whole.ids) if token == separator]
    found = []
    for start, end in pairwise(sorted({0, *ends, len(whole.ids)})):
        places = [at - start for at in whole.response if start < at < end]
        view = Tokens(whole.ids[start:end], places)
        found.append(Example(view, view))
    return tuple(found)


def collate_examples(
    examples: Sequence[Example], pad_id: int, vocabulary: Vocabulary | None = None
) -> Batch:
    """把 ``Example`` 拼成 ``Batch``，两个视角各自在右边 padding；不训练 ``vocabulary`` 之外的。"""
    return _collated([[example] for example in examples], pad_id, vocabulary, packed=False)


def collate_packed(
    rows: Sequence[Sequence[Example]], pad_id: int, vocabulary: Vocabulary | None = None
) -> Batch:
    """每行首尾相接地放几条 ``Example``，两个视角以同样的次序；它们互相看不见。

    ``position_ids`` 逐条从 0 数起，没有 ``attention_mask``。行尾补到最长的一行；补的那一段自成一个
    文档，从不被训练，也不被看见。
    """
    return _collated(rows, pad_id, vocabulary, packed=True)


def _collated(
    rows: Sequence[Sequence[Example]], pad_id: int, vocabulary: Vocabulary | None, *, packed: bool
) -> Batch:
    examples = [example for row in rows for example in row]
    responses = [example.student.labels for example in examples]
    keep = [
        [True] * len(labels) if vocabulary is None else vocabulary.kept(labels)
        for labels in responses
    ]

    def view(side: Callable[[Example], Tokens]) -> View:
        return collate_view([[side(example) for example in row] for row in rows], keep, pad_id,
                            packed=packed)  # fmt: skip

    student = view(lambda example: example.student)
    same = all(example.teacher is example.student for example in examples)
    teacher = student if same else view(lambda example: example.teacher)
    labels = [
        token for part, kept in zip(responses, keep, strict=True) for token in compress(part, kept)
    ]
    return Batch(student, teacher, torch.tensor(labels, dtype=torch.long), tuple(examples))


def collate_view(
    rows: Sequence[Sequence[Tokens]],
    keep: Iterable[Sequence[bool]] | None,
    pad_id: int,
    *,
    packed: bool,
) -> View:
    """一个视角：每行首尾相接地放几条（不是 ``packed`` 时只有一条），右边 padding；``keep`` 是逐条
    的、哪几个 response token 要预测，``None`` 为全部。
    """
    length = max(sum(len(tokens.ids) for tokens in row) for row in rows)
    ids = torch.full((len(rows), length), pad_id, dtype=torch.long)
    mask, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    index: list[int] = []
    kept = None if keep is None else iter(keep)
    for number, row in enumerate(rows):
        start = 0
        for tokens in row:
            end = start + len(tokens.ids)
            ids[number, start:end] = torch.tensor(tokens.ids)
            mask[number, start:end] = 1
            positions[number, start:end] = torch.arange(end - start)
            # 位置 t 的 token 由 t - 1 处的 hidden state 预测
            before = number * length + start - 1
            places = tokens.response if kept is None else compress(tokens.response, next(kept))
            index += [before + place for place in places]
            start = end
        positions[number, start:] = torch.arange(length - start)
    predicting = torch.tensor(index, dtype=torch.long)
    if packed:
        return View(ids, None, predicting, positions)
    return View(ids, None if bool(mask.all()) else mask, predicting)
