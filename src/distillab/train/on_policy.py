"""On-policy：哪些批次从学生采样，以及采出来的东西是否还像样。"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from ..batch import Batch, Example
from ..config.sections import ResponsesConfig
from ..models.interface import LanguageModel
from .rollout import Rollout, RolloutSums, student_fraction

logger = logging.getLogger("distillab")

PREFIX = "rollout."
"""一步的总和里，采样的那些的键以它开头。"""

TRUNCATED, REPEATED, EMPTY = 0.5, 0.5, 0.5
"""超过这些份额就在日志里说：被截断的 response、重复的 4-gram、空的 response。"""

LENGTH_CHANGE = 2.0
"""平均长度变到最初的这么多倍（或几分之一）就在日志里说。"""

LOW_ENTROPY = 0.05
"""学生在自己的 response 上的熵低于它（单位 nat/token）：采样已经没有多样性。"""


@dataclass(frozen=True)
class Prepared:
    """一步的 micro-batch，response 已经定下来，可以数 token 了。

    Attributes:
        batches: 一个累积窗口。
        sampled: response 是不是从学生采样的；一个窗口要么全是，要么全不是。
        sums: 本进程采样的总和。
    """

    batches: list[Batch]
    sampled: bool = False
    sums: RolloutSums = field(default_factory=RolloutSums)


class OnPolicy:
    """以 ``student_fraction`` 的概率把一步的 response 换成当前学生采样的。

    整个窗口一起采样：小的 micro-batch 是为反向的显存，生成时大一些才快。是否采样与每条的随机数
    只取决于种子、步数和它在这一步里的位置，所以怎样切成 micro-batch、分给几个进程，结果都相同。
    几个来源混在一起时各有各的采样，没有 prompt 的（文本）留着数据里的。

    Args:
        rollouts: 各来源怎样采样；``None`` 为不采样。
        config: 概率与它的日程。
        collate: 把 ``Example`` 拼成 ``Batch``。
        seed: 抛硬币与采样的种子。
    """

    def __init__(
        self,
        rollouts: Sequence[Rollout | None],
        config: ResponsesConfig,
        collate: Callable[[Sequence[Example]], Batch],
        seed: int,
    ) -> None:
        self.rollouts, self.config, self.collate, self.seed = rollouts, config, collate, seed

    def prepare(
        self,
        window: list[Batch],
        step: int,
        total_steps: int,
        rank: int = 0,
        processes: int = 1,
        student: Callable[[], AbstractContextManager[LanguageModel]] | None = None,
    ) -> Prepared:
        """决定一步的 response。

        Args:
            window: 本进程在这一个 optimizer 步的 micro-batch。
            step: 从 0 起的步数。
            total_steps: 总步数。
            rank: 本进程的编号；第 m 个 micro-batch 是全局的第 ``m * processes + rank`` 个。
            processes: 进程数。
            student: 给出权重完整的学生；缺省为 ``rollouts`` 自己的。要采样才调用，一次采样只调用
                一次：分片的权重收齐之后，各进程何时说完互不相干。
        """
        fraction = student_fraction(self.config, step, total_steps)
        if random.Random(f"{self.seed}/{step}").random() >= fraction:
            return Prepared(window)
        old = [batch.examples or () for batch in window]  # 采样的都是对话，见 Recipe
        size = len(old[0])
        seeds = [
            random.Random(f"{self.seed}/{step}/{(m * processes + rank) * size + i}").getrandbits(63)
            for m, examples in enumerate(old)
            for i in range(len(examples))
        ]
        prompts = [example for examples in old for example in examples]
        new: dict[int, Example] = dict(enumerate(prompts))
        sums = RolloutSums()
        with nullcontext() if student is None else student() as model:
            for source, own in enumerate(self.rollouts):
                if own is None:
                    continue
                rollout = own if model is None else own.of(model)
                asked = [row for row, one in enumerate(prompts) if one.source == source]
                for group in rollout.groups([prompts[row] for row in asked]):
                    rows = [asked[place] for place in group]
                    sampled, part = rollout.sample(
                        [prompts[row] for row in rows], [seeds[row] for row in rows]
                    )
                    new |= zip(rows, sampled, strict=True)
                    sums = RolloutSums(*map(sum, zip(sums, part, strict=True)))
        rest = (new[row] for row in range(len(prompts)))
        batches = [
            self.collate(list(itertools.islice(rest, len(examples)))).to(batch.labels.device)
            for batch, examples in zip(window, old, strict=True)
        ]
        return Prepared(batches, True, sums)


@dataclass
class RolloutGuard:
    """把 rollout 的总和变成一行指标；不像样时在日志里说一次。

    它记得的随训练进度存进检查点：断点续训仍与最初的长度相比，说过的不再说。

    Attributes:
        first_length: 第一次记录时的平均长度，token。
        warned: 说过、至今没有好转的。
    """

    first_length: float | None = None
    warned: list[str] = field(default_factory=list)

    def row(self, sums: Mapping[str, float], step: int) -> dict[str, Any]:
        """一个记录间隔的指标，并检查它们。

        Args:
            sums: 间隔里 ``StepTotals.sums`` 的采样各项之和，键不带 ``PREFIX``。
            step: 当前步数，用于日志。

        Returns:
            ``rollout_*`` 各项；没有采样时为空。
        """
        count = sums.get("responses", 0.0)
        if not count:
            return {}
        scored = max(sums["scored"], 1.0)
        row = {
            "rollout_responses": int(count),
            "rollout_length": sums["tokens"] / count,
            "rollout_truncated": sums["truncated"] / count,
            "rollout_empty": sums["empty"] / count,
            "rollout_repetition": sums["repetition"] / count,
            "rollout_student_entropy": sums["student_nll"] / scored,
            "rollout_teacher_logprob": -sums["teacher_nll"] / scored,
        }
        self.first_length = self.first_length or row["rollout_length"]
        change = row["rollout_length"] / self.first_length
        checks = {
            "truncated": (
                row["rollout_truncated"] > TRUNCATED,
                f"{row['rollout_truncated']:.0%} of the sampled responses end at "
                f"sampling.max_new_tokens: raise it, or the student has lost its end token",
            ),
            "empty": (
                row["rollout_empty"] > EMPTY,
                f"{row['rollout_empty']:.0%} of the sampled responses are empty",
            ),
            "repetition": (
                row["rollout_repetition"] > REPEATED,
                f"{row['rollout_repetition']:.0%} of the 4-grams in sampled responses repeat",
            ),
            "length": (
                not 1 / LENGTH_CHANGE <= change <= LENGTH_CHANGE,
                f"sampled responses are {change:.1f} times as long as at the start "
                f"({row['rollout_length']:.0f} tokens)",
            ),
            "entropy": (
                row["rollout_student_entropy"] < LOW_ENTROPY,
                f"the student's entropy on its own responses is "
                f"{row['rollout_student_entropy']:.3f} nat per token: sampling explores nothing",
            ),
        }
        for kind, (wrong, message) in checks.items():
            if wrong and kind not in self.warned:
                self.warned.append(kind)
                logger.warning("step %d: %s", step, message)
            elif not wrong and kind in self.warned:
                self.warned.remove(kind)
        return row
