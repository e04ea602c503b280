"""教师在一个 response token 处的目标写成几个字节：定长，读回来与写进去的逐位相同。

一条记录依次是 K 个 id（``sampled`` 再加教师最可能的 token），每个 ``⌈log2 V⌉`` 位，低位在前、首尾
相接，补齐到整字节；有概率的，K 个 float16；教师的熵与标签的对数概率各一个 float32。都是
little-endian。
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

MAX_BITS = 25
"""一个 id 至多这么多位：连同前一字节里剩下的 7 位，4 个字节装得下。"""
MAX_PROBS = 4094
"""至多这么多个概率：最大的一个由 1 减去其余的得出，不会被它们的舍入误差盖过。"""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


class Records(NamedTuple):
    """P 个 response token 处的目标。

    Attributes:
        ids: ``[P, K]``，int64。有概率时互不相同，第一个最可能；没有时是抽到的，可以重复。
        probs: ``[P, K]``，float32，T = 1 的概率；抽样的为 ``None``，权重见 ``weights``。
        top: ``[P]``，int64，教师最可能的 token；有概率时就是 ``ids[:, 0]``。
        entropy: ``[P]``，float32，教师完整分布的熵，单位 nat。
        label_log_prob: ``[P]``，float32，标签的对数概率。
    """

    ids: Ints
    probs: Floats | None
    top: Ints
    entropy: Floats
    label_log_prob: Floats


@dataclass(frozen=True)
class Layout:
    """一条记录的样子：词表 ``vocab_size`` 里的 ``ids`` 个 token，``probs`` 时带着概率。

    概率是 float16，而尾部 ``1 - Σ probs`` 常常比 1 附近 float16 的间隔（4.9e-4）还小，所以第一个
    概率与尾部中较大的那个不存，由 1 减去其余的得出：第一格是第一个概率，符号位为 1 时是尾部。
    float16 都是 2^-24 的倍数，在 float32 里减没有误差，尾部因而与其余的概率同样精确。
    """

    vocab_size: int
    ids: int
    probs: bool

    def __post_init__(self) -> None:
        if not 1 <= self.vocab_size <= 1 << MAX_BITS:
            raise ValueError(f"vocab_size={self.vocab_size}, expected 1 to {1 << MAX_BITS}")
        most = min(self.vocab_size, MAX_PROBS) if self.probs else MAX_PROBS
        if not 1 <= self.ids <= most:
            raise ValueError(f"ids={self.ids}, expected 1 to {most}")

    @property
    def bits(self) -> int:
        """一个 id 几位。"""
        return max(1, (self.vocab_size - 1).bit_length())

    @property
    def size(self) -> int:
        """一条记录几个字节。"""
        return self._id_bytes + 2 * self.ids * self.probs + 8

    @property
    def _id_bytes(self) -> int:
        return -(-self._columns * self.bits // 8)

    @property
    def _columns(self) -> int:
        return self.ids + (not self.probs)

    def pack(self, records: Records) -> Bytes:
        """``[P, size]``，uint8；形状、id 的范围或次序不对是 ``ValueError``。

        概率会舍入：当场就用的，也要用 ``unpack`` 得到的，才与日后读回来的逐位相同。
        """
        self._check(records)
        columns = records.ids
        if not self.probs:
            columns = np.concatenate([columns, records.top[:, None]], 1)
        first, shift = np.divmod(np.arange(self._columns) * self.bits, 8)
        words = (columns.astype("<u4") << shift.astype("<u4"))[..., None].view(np.uint8)
        rows = np.zeros((len(columns), self.size), np.uint8)
        for column, start in enumerate(first):  # 相邻的 id 合用一个字节
            rows[:, start : start + 4] |= words[:, column]
        parts = [] if records.probs is None else [_to_half(records.probs)]
        parts += [array[:, None].astype("<f4") for array in records[-2:]]
        rows[:, self._id_bytes :] = np.concatenate([part.view(np.uint8) for part in parts], 1)
        return rows

    def unpack(self, rows: Bytes) -> Records:
        """``pack`` 的逆：``rows [P, size]``，uint8；得到的都是新的数组。"""
        if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != self.size:
            raise ValueError(
                f"rows {rows.dtype} {list(rows.shape)}, expected uint8 [P, {self.size}]"
            )
        first, shift = np.divmod(np.arange(self._columns) * self.bits, 8)
        words = rows.take((first[:, None] + np.arange(4)).ravel(), 1).view("<u4")
        mask = np.uint32((1 << self.bits) - 1)
        columns = ((words >> shift.astype(np.uint32)) & mask).astype(np.int64)
        probs = None
        if self.probs:
            probs = _from_half(_floats(rows[:, self._id_bytes : -8], "<f2"))
        last = _floats(rows[:, -8:], "<f4").astype(np.float32)
        entropy, label_log_prob = last.T.copy()
        top = columns[:, 0 if self.probs else -1].copy()
        return Records(columns[:, : self.ids], probs, top, entropy, label_log_prob)

    def _check(self, records: Records) -> None:
        ids, probs = records.ids, records.probs
        rest = (records.top, records.entropy, records.label_log_prob)
        if ids.ndim != 2 or ids.shape[1] != self.ids:
            raise ValueError(f"ids {list(ids.shape)}, expected [P, {self.ids}]")
        if any(array.shape != ids.shape[:1] for array in rest):
            shapes = [list(array.shape) for array in rest]
            raise ValueError(f"top, entropy and label_log_prob {shapes}, expected [{len(ids)}]")
        for array in (ids, records.top):
            if array.size and not 0 <= array.min() <= array.max() < self.vocab_size:
                raise ValueError(f"an id is outside the vocabulary of {self.vocab_size}")
        if (probs is not None) != self.probs:
            raise ValueError(f"probs given: {probs is not None}, expected {self.probs}")
        if probs is not None:
            if probs.shape != ids.shape:
                raise ValueError(f"probs {list(probs.shape)}, expected {list(ids.shape)}")
            if (records.top != ids[:, 0]).any() or (probs[:, :1] < probs).any():
                raise ValueError("the first id must be the likeliest, and the top")


def weights(ids: Ints) -> Floats:
    """抽到的 ``ids [P, K]`` 的权重 ``[P, K]``，float32：各 1 / K，重复的加在一起就是次数 / K。"""
    return np.full(ids.shape, 1 / ids.shape[1], np.float32)


def _floats(part: Bytes, kind: str) -> npt.NDArray[np.floating]:
    return np.ascontiguousarray(part).view(kind)


def _to_half(probs: Floats) -> npt.NDArray[np.float16]:
    """``[P, K]``；见 ``Layout``。"""
    tail = (1 - probs.sum(-1, dtype=np.float64)).clip(0)
    stored = probs.astype("<f2")
    stored[:, 0] = np.where(probs[:, 0] < tail, stored[:, 0], -tail.astype("<f2"))
    return stored


def _from_half(stored: npt.NDArray[np.floating]) -> Floats:
    probs = stored.astype(np.float32)
    first = probs[:, 0]
    rest = 1 + np.minimum(first, 0) - probs[:, 1:].sum(-1)
    probs[:, 0] = np.where(np.signbit(first), rest, first)
    return probs
