"""算过一次的教师：分布存在磁盘上，第一轮边训练边写，以后的各轮只读。

键是教师读的一段文字（一条 ``Example``、一个文本块）本身，所以怎样分批、装行、打乱都不影响；目标总是
由存的那几个字节得出，第一轮也是，所以断在哪里、接着走时存了多少，结果都一样。
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..batch import Batch, View
from ..config.model_sections import CacheConfig
from ..models.interface import LanguageModel
from ..targets import DenseTargets, HiddenTargets, SparseTargets, Tail, Targets
from ..vocabulary import Vocabulary
from .in_process import LocalTeacher, ShardedTeacher
from .records import Layout, Records, weights
from .sampling_targets import sampled_targets, top_k_targets, uniforms
from .store import TargetStore

Keys = tuple[tuple[bytes, int], ...]


@dataclass(frozen=True)
class Rule:
    """存什么：``config`` 的规则，词表有 ``vocab_size`` 个 id。"""

    config: CacheConfig
    vocab_size: int

    @property
    def layout(self) -> Layout:
        """一个 response token 的记录。"""
        top_k = self.config.keep == "top_k"
        return Layout(self.vocab_size, self.count, probs=top_k)

    @property
    def count(self) -> int:
        """每个 token 存几个 id。"""
        return self.config.kept(self.vocab_size)

    def records(
        self, targets: HiddenTargets | DenseTargets, labels: Tensor, keys: Keys
    ) -> NDArray[np.uint8]:
        """现算的目标 → 记录 ``[P, layout.size]``。"""
        config = self.config
        if config.keep == "sampled":
            draws = [uniforms(config.seed, key, count) for key, count in keys]
            drawn = torch.cat(draws) if draws else torch.zeros(0, dtype=torch.float64)
            found = sampled_targets(targets, labels, drawn, self.count)
        else:
            found = top_k_targets(targets, labels, self.count, config.tail or "bucket")
        probs = found.probs if self.layout.probs else None
        parts: Any = (found.ids, probs, found.top, found.entropy, found.label_log_prob)
        arrays: Any = [None if part is None else part.cpu().numpy() for part in parts]
        return self.layout.pack(Records(*arrays))

    def targets(self, records: NDArray[np.uint8]) -> SparseTargets:
        """记录 ``[P, layout.size]`` → 目标，在 CPU 上。"""
        found = self.layout.unpack(records)
        probs = weights(found.ids) if found.probs is None else found.probs
        ids, probs_, top, entropy, label = map(torch.from_numpy, found._replace(probs=probs))
        return SparseTargets(ids, probs_, self._tail, entropy, label, top)

    @property
    def _tail(self) -> Tail:
        return self.config.tail or "sampled"


def document_keys(view: View) -> Keys:
    """``view``（在 CPU 上）里的各段文字：``(16 字节的摘要, 有几个 response token)``，按先后。

    摘要是这一段的全部 token 与 response 的位置的；一个 response token 也没有的段不在其中。
    """
    length, rows = view.input_ids.shape[1], view.input_ids.numpy().astype("<i4")
    index = view.index.numpy()
    found = []
    for start, end in _documents(view):
        row, first = divmod(start, length)
        low, high = np.searchsorted(index, [start, end])
        if low < high:
            digest = hashlib.sha256(rows[row, first : first + end - start].tobytes())
            digest.update(b"|" + (index[low:high] - start).astype("<i4").tobytes())
            found.append((digest.digest()[:16], int(high - low)))
    return tuple(found)


def _documents(view: View) -> Iterator[tuple[int, int]]:
    """各段在展平的 ``input_ids`` 里的首尾。"""
    count, length = view.input_ids.shape
    for row in range(count):
        start = row * length
        if view.position_ids is not None:
            begins = (view.position_ids[row] == 0).nonzero()[:, 0].tolist()
            ends = [*begins[1:], length]
            yield from (
                (start + begin, start + end) for begin, end in zip(begins, ends, strict=True)
            )
        else:
            mask = view.attention_mask
            yield start, start + (length if mask is None else int(mask[row].sum()))


class StoredCollate:
    """``collate`` 拼成的批，加上各段的键，与（全都存了时）存下的分布。"""

    def __init__(
        self, collate: Callable[[Sequence[Any]], Batch], store: TargetStore, rule: Rule
    ) -> None:
        self.collate, self.store, self.rule = collate, store, rule

    def __call__(self, items: Sequence[Any]) -> Batch:
        """几项 → 一批。"""
        batch = self.collate(items)
        keys = document_keys(batch.teacher)
        found = [records for key, _ in keys if (records := self.store.get(key)) is not None]
        stored = None
        if found and len(found) == len(keys):
            stored = self.rule.targets(np.concatenate(found))
        return replace(batch, keys=keys, stored=stored)


class StoredTeacher:
    """存着分布的教师：批里有存下的就用，没有的由 ``inner`` 现算、存下。"""

    SECONDS = 5.0
    """隔这么久写一次磁盘：被杀时至多丢这么多。"""

    def __init__(self, inner: LocalTeacher, store: TargetStore, rule: Rule) -> None:
        self.inner, self.store, self.rule = inner, store, rule
        self._flushed = time.monotonic()

    def __enter__(self) -> StoredTeacher:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """攒着的写进磁盘，放开存储。"""
        self.store.__exit__(kind, *rest)

    @property
    def model(self) -> LanguageModel:
        """现算时用的模型。"""
        return self.inner.model

    @property
    def inside(self) -> bool:
        """现算的目标是不是在学生的 forward 里取。"""
        return self.inner.inside

    @property
    def outside(self) -> Any:
        """``inner`` 的。"""
        return self.inner.outside

    def place(self, device: torch.device) -> None:
        """同 ``LocalTeacher.place``。"""
        self.inner.place(device)

    def whole(self, keep: bool = True) -> AbstractContextManager[LanguageModel]:
        """同 ``LocalTeacher.whole``。"""
        return self.inner.whole(keep)

    def measured_outside(self) -> Tensor | None:
        """同 ``LocalTeacher.measured_outside``。"""
        return self.inner.measured_outside()

    def release(self) -> None:
        """一步的目标都取完了；隔一会儿写一次磁盘。"""
        self.inner.release()
        if time.monotonic() - self._flushed > self.SECONDS:
            self.store.flush()
            self._flushed = time.monotonic()

    def of(self, batch: Batch, vocabulary: Vocabulary) -> Targets:
        """一批的目标；不是训练与验证的批（没有键）照旧现算。磁盘满了是 ``DistillabError``。"""
        if self._everywhere(batch.stored is not None):
            assert batch.stored is not None
            return batch.stored
        found = self.inner.targets(batch.teacher, vocabulary)
        if batch.keys is None:
            return found
        records = self.rule.records(found, batch.labels, batch.keys)
        end = 0
        for key, count in batch.keys:
            start, end = end, end + count
            known = self.store.get(key)
            if known is not None:  # 别的批算过：以存下的为准
                records[start:end] = known
            else:
                self.store.add(key, records[start:end])
        return self.rule.targets(records).map(lambda part: part.to(batch.labels.device))

    def _everywhere(self, stored: bool) -> bool:
        """这一批是不是不必现算：教师的权重分在各进程时，要算就得一起算。"""
        together = torch.distributed.is_initialized() and (
            self.inside or isinstance(self.inner, ShardedTeacher)
        )
        if not together:
            return stored
        flag = torch.tensor([float(stored)], device=self.model.head.weight.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
        return bool(flag.item())


Teacher = LocalTeacher | StoredTeacher
