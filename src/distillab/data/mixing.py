"""几个来源混成一个流：每个 optimizer 步都按权重从各个来源取序列，取到哪里能存成 JSON。

每条来自哪个来源，由权重依次定下：每次取离应得的份额最远的那一个，所以任何一段里各来源的条数与权重
相差不到几条；次序与进程数、micro-batch 的大小无关。一个来源读完一遍，就换一种次序再读。
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from ..batch import Example
from .corpus import cache_key
from .streams import StreamState, TextStream

Row = Example | tuple[Example, ...]
"""一条，或放在一行里的几条。"""


@dataclass(frozen=True)
class Ingredient:
    """一个来源：名字，权重，它的训练集（或流）与验证集，怎样把它们的一项变成 ``Row``。"""

    name: str
    weight: float
    train: Any
    validation: Dataset[Any]
    row: Callable[[Any], Row]


@dataclass(frozen=True)
class MixtureState:
    """混合的流读到了哪里；能存成 JSON，与进程数无关。"""

    epoch: int = 0  # 第一个来源的第几遍
    drawn: list[int] = field(default_factory=list)  # 各来源给出了几行
    tokens: list[int] = field(default_factory=list)  # 其中的 response token
    streams: list[dict[str, Any] | None] = field(default_factory=list)  # 流的 StreamState


def shares(weights: Sequence[float]) -> list[float]:
    """权重变成份额，和为 1。"""
    total = sum(weights)
    return [weight / total for weight in weights]


def next_source(wanted: Sequence[float], drawn: Sequence[int]) -> int:
    """下一条取自哪个来源：离份额 ``wanted`` 最远的，相同的取靠前的。"""
    count = sum(drawn) + 1
    return max(range(len(wanted)), key=lambda k: (wanted[k] * count - drawn[k], -k))


class MixtureStream(IterableDataset[Row]):
    """没有尽头的混合；每 ``window`` 行（一个 optimizer 步的）由短到长，padding 才少。

    ``fingerprint`` 是各来源与权重的：检查点记着它，换了便不能接着训练。
    """

    def __init__(self, parts: Sequence[Ingredient], window: int, seed: int = 0) -> None:
        self.parts, self.window, self.seed = tuple(parts), window, seed
        self.shares = shares([part.weight for part in parts])
        own = [getattr(part.train, "fingerprint", None) for part in parts]
        self.fingerprint = f"{cache_key([own, self.shares, seed])}-mixture"

    def begin(self, saved: dict[str, Any] | None) -> MixtureState:
        """``saved`` 是 ``MixtureState`` 的各项；``None`` 为开头。"""
        count = len(self.parts)
        return MixtureState(**saved) if saved else MixtureState(0, [0] * count, [0] * count)

    def rows_in(self, epochs: int) -> int | None:
        """第一个来源读 ``epochs`` 遍时一共多少行；它是流就没有尽头。"""
        first = self.parts[0].train
        if isinstance(first, TextStream):
            return None
        return round(epochs * len(first) / self.shares[0])

    def figures(self, state: MixtureState) -> dict[str, dict[str, float]]:
        """各来源的份额，到 ``state`` 为止给出了多少条、多少 response token、读了几遍。"""
        found: dict[str, dict[str, float]] = {}
        for k, part in enumerate(self.parts):
            row = {"share": self.shares[k], "sequences": state.drawn[k], "tokens": state.tokens[k]}
            if not isinstance(part.train, TextStream):
                row["epochs"] = state.drawn[k] / len(part.train)
            found[part.name] = row
        return found

    def __iter__(self) -> Iterator[Row]:
        return (row for row, _ in self.items(self.begin(None)))

    def items(self, state: MixtureState) -> Iterator[tuple[Row, MixtureState]]:
        """从 ``state`` 接着给出 ``(一行, 它所在的一步给完之后的状态)``。"""
        saved = [StreamState(**one) if one else None for one in state.streams]
        read = saved or [None] * len(self.parts)  # 各个流读到了哪里
        drawn, tokens = list(state.drawn), list(state.tokens)
        feeds = [
            _feed(part.train, drawn[k], read[k], f"{self.seed}/{k}")
            for k, part in enumerate(self.parts)
        ]
        while True:
            rows: list[Row] = []
            for _ in range(self.window):
                k = next_source(self.shares, drawn)
                item, read[k] = next(feeds[k])
                row = _stamped(self.parts[k].row(item), k)
                drawn[k] += 1
                tokens[k] += sum(len(one.student.response) for one in _examples(row))
                rows.append(row)
            rows.sort(key=_length)
            first = read[0].epoch if read[0] else drawn[0] // len(self.parts[0].train)
            streams = [None if one is None else asdict(one) for one in read]
            after = MixtureState(first, list(drawn), list(tokens), streams)
            for row in rows:
                yield row, after


class MixedValidation(Dataset[Row]):
    """各来源的验证集，依次排在一起：``source_of(i)`` 是第 i 条来自第几个，``names`` 是它们的名字。

    至多 ``limit`` 条时按权重分给各来源，每个至少一条，在各自的里面均匀地取。
    """

    def __init__(self, parts: Sequence[Ingredient], limit: int | None = None) -> None:
        self.parts, self.names = tuple(parts), [part.name for part in parts]
        wanted = shares([part.weight for part in parts])
        self._places: list[tuple[int, int]] = []
        for k, part in enumerate(parts):
            total = len(part.validation)  # type: ignore[arg-type]
            count = total if limit is None else min(total, max(1, round(limit * wanted[k])))
            self._places += [(k, i * total // count) for i in range(count)]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Row:
        k, place = self._places[index]
        return _stamped(self.parts[k].row(self.parts[k].validation[place]), k)

    def source_of(self, index: int) -> int:
        """第 ``index`` 条来自第几个来源。"""
        return self._places[index][0]


def _feed(
    data: Any, drawn: int, state: StreamState | None, seed: str
) -> Iterator[tuple[Any, StreamState | None]]:
    """一个来源，从已给出 ``drawn`` 项处（流从 ``state``）接着来，``(一项, 流的状态)``。"""
    if isinstance(data, TextStream):
        yield from data.items(state or StreamState())
    epoch, used = divmod(drawn, len(data))
    while True:
        generator = torch.Generator()
        generator.manual_seed(random.Random(f"{seed}/{epoch}").getrandbits(63))
        order = torch.randperm(len(data), generator=generator).tolist()
        yield from ((data[index], None) for index in order[used:])
        epoch, used = epoch + 1, 0


def _examples(row: Row) -> tuple[Example, ...]:
    return row if isinstance(row, tuple) else (row,)


def _length(row: Row) -> int:
    return sum(len(view.ids) for example in _examples(row) for view in example.views)


def _stamped(row: Row, source: int) -> Row:
    if isinstance(row, tuple):
        return tuple(replace(example, source=source) for example in row)
    return replace(row, source=source)
