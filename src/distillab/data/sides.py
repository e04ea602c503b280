"""两个分词器：学生的与教师的，各自的字节表，以及把一边的 token 译成另一边的。

译文是同样的文字，由对方的分词器重新切；说完了、文章完了的 token 换成对方的。
"""

from __future__ import annotations

import codecs
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..batch import IGNORE_INDEX, Example, Segment, Tokens
from ..models.token_bytes import END, token_bytes
from ..models.tokenizer import document_separator
from ..vocabulary import SharedTokens
from .encoding import ArticleEncoder
from .turn_end import turn_end


class Side:
    """一个分词器；``bytes`` 见 ``token_bytes``，``end`` 是结束一轮的 token，``what`` 是谁的。"""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, what: str) -> None:
        self.tokenizer = tokenizer
        self.encoder = ArticleEncoder(tokenizer)
        self.separator = document_separator(tokenizer)
        turn = turn_end(tokenizer)
        self.end = int(tokenizer.eos_token_id if turn is None else turn.token)
        ends = {self.end, self.separator, int(tokenizer.eos_token_id)}
        self.bytes = token_bytes(tokenizer, ends, what)
        # SentencePiece 一类在开头加一个空格；文章里没有它。
        self.adds_space = self.bytes[self.encoder.plain(["a"])[0][0]].startswith(b" ")

    @functools.cached_property
    def by_bytes(self) -> dict[bytes, int]:
        """字节 → token；结束的与空的不在其中。"""
        return {text: index for index, text in enumerate(self.bytes) if text and text != END}

    def text(self, ids: Sequence[int]) -> str:
        """``ids`` 的文字，到第一个结束的 token 为止；结尾不全的字不要。"""
        kept = (self.bytes[index] for index in ids)
        raw = b"".join(kept).partition(END)[0]
        return codecs.getincrementaldecoder("utf-8")("replace").decode(raw)


@dataclass(frozen=True)
class Sides:
    """``(学生的, 教师的)``。"""

    student: Side
    teacher: Side

    def __iter__(self) -> Iterator[Side]:
        yield self.student
        yield self.teacher

    @functools.cached_property
    def shared(self) -> SharedTokens:
        """同样字节的 token；结束的 token 两两相配。"""
        ours, theirs = (side.by_bytes for side in self)
        pairs = {(ours[text], theirs[text]) for text in ours.keys() & theirs.keys()}
        pairs |= {
            (self.student.separator, self.teacher.separator),
            (self.student.end, self.teacher.end),
        }
        one_to_one = dict(sorted(pairs))  # 结束的两种在一边是同一个 token 时，只留一对
        chosen = {theirs: ours for ours, theirs in one_to_one.items()}
        defined = sum(map(bool, self.teacher.bytes))
        return SharedTokens(tuple(chosen.values()), tuple(chosen), len(chosen) / defined)

    @functools.cached_property
    def projected(self) -> SharedTokens:
        """``shared``，还有教师的每个 token 的文字由学生来切时的第一个 token。"""
        ours, theirs = self
        ends = dict(zip(self.shared.teacher, self.shared.student, strict=True))
        first = [-1] * len(theirs.bytes)
        whole: dict[int, str] = {}
        for index, text in enumerate(theirs.bytes):
            if text == END:
                first[index] = ends.get(index, ours.separator)
            elif text:
                try:
                    whole[index] = text.decode()
                except UnicodeDecodeError:  # 半个字
                    first[index] = _longest(text, ours)
        for index, ids in zip(whole, ours.encoder.plain(list(whole.values())), strict=True):
            first[index] = ids[0] if ids else -1
        return replace(self.shared, first=tuple(first))


def _longest(text: bytes, side: Side) -> int:
    """``text`` 开头最长的那个 token；没有就是 -1。"""
    table = side.by_bytes
    return next(
        (table[text[:size]] for size in range(len(text), 0, -1) if text[:size] in table), -1
    )


def translated(ids: Sequence[int], side: Side, other: Side) -> list[int]:
    """一段 response 在对方的 token 里；它说完了，译文也说完。"""
    found: list[int] = other.encoder.plain([side.text(ids)])[0]
    ended = any(side.bytes[index] == END for index in ids)
    return [*found, other.end] if ended else found


def text_example(item: dict[str, Tensor], sides: Sides, limit: int) -> Example:
    """一个文本块：教师读同样的文字，至多 ``limit`` 个 token。

    块的两头可能在一个字的中间，那几个 token 教师没有；各篇文章各成一段。
    """
    ours, theirs = sides
    ids: list[int] = item["input_ids"].tolist()
    learned = ((item["labels"] != IGNORE_INDEX).nonzero()[:, 0] + 1).tolist()
    whole = list(theirs.encoder.leading)
    segments: list[Segment] = []
    start = 0
    for is_end, part in groupby(ids, lambda index: index == ours.separator):
        stop = start + len(list(part))
        for at in range(start, stop) if is_end else ():
            segments.append((range(at, at + 1), range(len(whole), len(whole) + 1)))
            whole += theirs.encoder.between
        if not is_end:
            own = _whole_characters([ours.bytes[index] for index in ids[start:stop]])
            kept = range(start + own.start, start + own.stop)
            text = ours.text(ids[kept.start : kept.stop])
            if start and ours.adds_space:
                text = text.removeprefix(" ")
            found = theirs.encoder.plain([text])[0]
            segments.append((kept, range(len(whole), len(whole) + len(found))))
            whole += found
        start = stop
    whole = whole[:limit] or [theirs.separator]
    clipped = [(own, range(other.start, min(other.stop, limit))) for own, other in segments]
    unlearned = {*theirs.encoder.unlearned}
    view = Tokens(whole, [i for i in range(1, len(whole)) if whole[i] not in unlearned])
    kept_segments = tuple(segment for segment in clipped if segment[1])
    return Example(Tokens(ids, learned), view, kept_segments)


def _whole_characters(parts: Sequence[bytes]) -> range:
    """哪些 token 从字的开头开始、到字的结尾为止。"""
    raw = b"".join(parts)
    first = 0
    while first < len(parts) and (not parts[first] or 0x80 <= parts[first][0] < 0xC0):
        first += 1
    stop = len(parts)
    while stop > first and not _complete(raw[-4:]):
        raw = raw[: len(raw) - len(parts[stop - 1])]
        stop -= 1
    return range(first, stop)


def _complete(tail: bytes) -> bool:
    """``tail`` 是否停在一个字的结尾。"""
    lead = next((i for i in range(1, len(tail) + 1) if not 0x80 <= tail[-i] < 0xC0), None)
    if lead is None:
        return not tail
    byte = tail[-lead]
    size = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
    return lead >= size


def response_segments(student: Tokens, teacher: Tokens) -> tuple[Segment, ...]:
    """两个视角里 response 的各段连续的 token，由后往前两两相配：截断去掉的总是前面的。"""
    pairs = list(zip(reversed(_runs(student)), reversed(_runs(teacher)), strict=False))
    return tuple(reversed(pairs))


def _runs(tokens: Tokens) -> list[range]:
    runs: list[range] = []
    for position in tokens.response:
        if runs and runs[-1].stop == position:
            runs[-1] = range(runs[-1].start, position + 1)
        else:
            runs.append(range(position, position + 1))
    return runs


def translated_example(
    student: Tokens, teacher_prompt: list[int], sides: Sides, limit: int
) -> Example:
    """学生的一条（只有最后一段 response），教师读自己的 prompt 与译过去的 response。"""
    response = translated(student.labels, *sides)[: limit - len(teacher_prompt)]
    start = len(teacher_prompt)
    teacher = Tokens(teacher_prompt + response, list(range(start, start + len(response))))
    return Example(student, teacher, response_segments(student, teacher))
