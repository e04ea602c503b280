"""Bootstrap 95 % 区间：整条序列、整个问题地重抽，总和之比只在最后除一次。

用 percentile 法（Efron & Tibshirani 1993，第 13 章）。同一个种子与同样的条数抽到的总是同样的几条，
所以一份数据上的各个数字，与两个模型的差，都由同一批重抽得出。本模块不导入 torch。
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ..figures import Figure

SAMPLES = 1000
"""重抽的次数。"""

ENDS = (2.5, 97.5)
"""区间的两端，百分位。"""

BLOCK = 1 << 20
"""一次抽这么多个下标：内存不随条数乘次数而长。"""


def ratio_figure(
    numerators: Sequence[float],
    denominators: Sequence[float],
    seed: int = 0,
    samples: int = SAMPLES,
    transform: Callable[[float], float] = float,
) -> Figure:
    """``transform(Σ 分子 / Σ 分母)``，与对各条一起重抽得到的区间；``transform`` 要单调。

    单独一条的分母可以是零或负（两个量之差），总和不行；有一次重抽的分母不是正数时，区间的两端为
    ``None``：这个比值还定不下来。一条也没有、长度不一或分母的总和不是正数时 ``ValueError``。
    """
    top, bottom = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    if top.ndim != 1 or top.shape != bottom.shape or not len(top):
        raise ValueError(
            f"numerators {list(top.shape)} and denominators {list(bottom.shape)} must be two "
            f"lists of one length, at least 1"
        )
    if not bottom.sum() > 0:
        raise ValueError(f"the denominators add up to {bottom.sum():g}, expected above 0")
    sums = [(top[rows].sum(1), bottom[rows].sum(1)) for rows in _resamples(len(top), seed, samples)]
    drawn_top, drawn_bottom = (np.concatenate(part) for part in zip(*sums, strict=True))
    ends = [math.nan, math.nan]
    if (drawn_bottom > 0).all():
        ends = np.percentile(drawn_top / drawn_bottom, ENDS).tolist()
    value = transform(float(top.sum() / bottom.sum()))
    low, high = sorted(map(transform, ends))
    return Figure(value=_finite(value), low=_finite(low), high=_finite(high))


def mean_figure(values: Sequence[float], seed: int = 0) -> Figure:
    """各条的平均。"""
    return ratio_figure(values, [1.0] * len(values), seed)


def difference_figure(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Figure:
    """同样的若干条上两个模型之差的均值 ``mean(a - b)``；区间跨过 0 就分不出高下。"""
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} items and b {len(b)}: they must be paired")
    return mean_figure([x - y for x, y in zip(a, b, strict=True)], seed)


def _resamples(items: int, seed: int, samples: int) -> Iterator[NDArray[np.int64]]:
    """有放回地重抽 ``samples`` 次，每次 ``items`` 个下标；分几块给出，每块 ``[S, items]``。"""
    random = np.random.default_rng(seed)
    together = max(1, BLOCK // items)
    for start in range(0, samples, together):
        yield random.integers(items, size=(min(together, samples - start), items))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
