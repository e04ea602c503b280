"""评测、报告与命令行共用的：带区间的数、补上了几成差距、困惑度，模型与指标给人看的名字。只用标准
库。
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

TEACHER, WITHOUT, BEFORE, AFTER = "teacher", "teacher_without", "student_before", "student_after"
"""一次运行自己的四个模型；``WITHOUT`` 是教师读学生的 prompt，没有特权信息时没有它。"""


class Label(NamedTuple):
    """一个模型给人看的名字：终端与日志里的，报告里的，模型卡里的。"""

    short: str
    page: str
    card: str


LABELS = {
    TEACHER: Label("teacher", "teacher", "Teacher"),
    WITHOUT: Label("teacher without", "teacher, without experience", "Teacher without experience"),
    BEFORE: Label("student before", "student before", "Student before training"),
    AFTER: Label("student after", "student after", "Student after training"),
}
"""按表中的先后；评测时另外给的模型排在后面，用自己的名字。"""

RUN_MODELS = (TEACHER, BEFORE, AFTER)
"""训练自己量的三个，``summary.json`` 里的先后。"""

_CHOICES = {"even": "evenly spaced", "influence": "by block influence",
            "greedy": "by greedy removal"}  # fmt: skip


def layers_said(total: int, source: str, choose: object, tokens: int) -> str:
    """学生的层从哪里来、怎样选的，一句英文：``the 30 of the teacher, by ...``。"""
    origin = "the teacher" if source == TEACHER else source
    measured = f" on {tokens:,} training tokens" if tokens else ""
    return f"the {total} of {origin}, {_CHOICES.get(str(choose), 'as listed')}{measured}"


def widths_said(kept: Mapping[str, Any]) -> str:
    """学生各层留下多宽，一句英文；``kept`` 是 ``KeptWidths`` 的各项，一层也没有的是空串。"""
    rows = [kept[name] for name in ("neurons", "heads", "kv_heads")]
    if not all(rows):
        return ""
    neurons, heads, kv_heads = (len(each[0]) for each in rows)
    shares = [f"{share:.0%} of the {name}'" for name, share in kept["shares"].items() if share < 1]
    return (
        f"{len(kept['channels']):,} channels, in each layer {neurons:,} neurons, {heads} heads and "
        f"{kv_heads} key/value heads" + (f": {', '.join(shares)} activations" if shares else "")
    )


AGREEMENT = {
    "forward_kl": "KL(teacher ‖ student)",
    "reverse_kl": "KL(student ‖ teacher)",
    "top1": "same top-1 token",
    "top5": "teacher's top-5 in student's top-5",
}
"""与教师的一致：前两项以 nat 计；最可能的 token 是否相同；教师最可能的五个 token 有几成也在学生的
前五里。"""


class Figure(TypedDict):
    """一个数与它的 95 % 区间；不是有限值的（如溢出的困惑度）、没有的区间为 ``None``。"""

    value: float | None
    low: float | None
    high: float | None


def exact(value: float | None) -> Figure:
    """没有区间的数。"""
    return Figure(value=value, low=None, high=None)


def exact_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Figure:
    """总和之比，没有区间。"""
    return exact(sum(numerators) / sum(denominators))


def gap_closed(
    scores: Mapping[str, Sequence[float]],
    ratio: Callable[[Sequence[float], Sequence[float]], Figure] = exact_ratio,
) -> Figure | None:
    """训练补上了几成差距：``Σ(after - before) / Σ(teacher - before)``，由 ``ratio`` 相除。

    ``scores`` 是模型名 → 同样的各条上的得分，越高越好（交叉熵要取负）；只有一个总数时就是一条。缺一
    个模型，或教师不比训练前的学生好时没有意义，为 ``None``；长度不一则 ``ValueError``。
    """
    if not scores.keys() >= set(RUN_MODELS):
        return None
    teacher, before, after = (scores[model] for model in RUN_MODELS)
    gained = [x - y for x, y in zip(after, before, strict=True)]
    lead = [x - y for x, y in zip(teacher, before, strict=True)]
    return ratio(gained, lead) if math.fsum(lead) > 0 else None


def perplexity(cross_entropy: float) -> float:
    """``exp(cross_entropy)``，nat；大到 float 装不下时为无穷。"""
    try:
        return math.exp(cross_entropy)
    except OverflowError:
        return math.inf
