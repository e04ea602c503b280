"""验证：交叉熵、困惑度、与教师的 KL 和 top-1 一致率，都由 token 上的总和得出。"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, cast

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..config.schema import LossConfig
from ..distributed.watch import Watch
from ..figures import perplexity
from ..loss.losses import LossSums

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .two_tokenizers import Across

WITH_TEACHER = LossConfig(divergence="forward_kl", alpha=0.5, temperature=1.0)
"""验证用的目标函数：T = 1 的 KL(教师||学生)，外加交叉熵；它的 ``total`` 没有人看。"""

WITHOUT_TEACHER = LossConfig(alpha=0.0, temperature=1.0)

ACROSS = LossConfig(divergence="alm", alpha=0.0)
"""分词器不同时没有逐 token 的 KL：两边各自的交叉熵。"""

Sum = Tensor | float


class _Measured(TypedDict):
    perplexity: float
    cross_entropy: float
    kl: float | None
    top1_agreement: float | None


class Metrics(_Measured, total=False):
    """一个模型在验证集上的成绩；单位 nat/token。没有教师，或它用自己的分词器时，``kl`` 与一致率为
    ``None``；那时教师的也以学生的 token 计，同样的文字才可比。从前的运行没有 ``bits_per_byte``；
    几个来源的，还有各来源自己的：``NAME/perplexity`` 等。
    """

    bits_per_byte: float | None


class Sums(NamedTuple):
    """一个来源的验证集的 ``LossSums``、response token 数，与学生、教师的 response 的字节数。"""

    losses: LossSums
    tokens: int
    sizes: tuple[float, float]

    @classmethod
    def of(cls, row: Tensor) -> Sums:
        """``validation_sums`` 里的一行。"""
        return cls(LossSums(*row[3:].unbind()), int(row[0]), (float(row[1]), float(row[2])))


@torch.no_grad()
def validation_sums(
    accelerator: Accelerator,
    module: nn.Module,
    batches: Iterable[tuple[Batch, bool]],
    targets: Callable[[Batch], Any],
    watch: Watch,
    across: Across,
    sources: int,
) -> list[Sums]:
    """验证集在所有进程上的总和，``sources`` 个来源各一份，没有名字的就是一个。

    ``batches`` 是 ``in_step`` 的，每批只来自一个来源；``across`` 数它的字节。各批依次发给设备，全部
    的总和最后只读一次。
    """
    device = accelerator.device
    totals = torch.zeros(
        max(sources, 1), len(LossSums._fields) + 3, dtype=torch.float64, device=device
    )
    module.eval()
    for batch, counted in batches:
        watch.at("validation")
        batch = batch.to(device)
        part: LossSums = module(batch, targets(batch))
        if counted:
            own = totals[batch.examples[0].source if batch.examples else 0]
            own[0] += len(batch)
            own[1:3] += across.bytes_of(batch)
            own[3:] += torch.stack(part)
    module.train()
    totals = accelerator.reduce(totals, reduction="sum").cpu()
    return [Sums.of(row) for row in totals]


def validated(
    found: Sequence[Sums], names: Sequence[str], compared: bool, same_tokens: bool
) -> tuple[Metrics, Metrics | None]:
    """由各来源的总和得出 ``(学生, 教师)`` 的成绩；没有与教师比较（``compared``）时没有后者。

    来源有名字（``names``）的，各自的也在里面；``same_tokens`` 说教师是不是用学生的分词器。
    """
    whole = found[0]
    for one in found[1:]:
        whole = Sums(
            LossSums(*(a + b for a, b in zip(whole.losses, one.losses, strict=True))),
            whole.tokens + one.tokens,
            (whole.sizes[0] + one.sizes[0], whole.sizes[1] + one.sizes[1]),
        )
    student, teacher = _both(whole, compared, same_tokens)
    for name, one in zip(names, found, strict=False):
        if one.tokens:
            both = zip((student, teacher), _both(one, compared, same_tokens), strict=True)
            for every, own in both:
                if every is not None and own is not None:
                    cast("dict[str, Any]", every).update(
                        {f"{name}/{key}": value for key, value in own.items()}
                    )
    return student, teacher


def _both(found: Sums, compared: bool, same_tokens: bool) -> tuple[Metrics, Metrics | None]:
    sums, tokens, sizes = found
    ours, theirs = sums.cross_entropy, sums.teacher_cross_entropy
    if not compared:
        return _metrics(tokens, sizes[0], ours), None
    if not same_tokens:  # 两边的文字在块的两头差几个字节
        theirs = theirs * (sizes[0] / max(sizes[1], 1.0))
        return _metrics(tokens, sizes[0], ours), _metrics(tokens, sizes[0], theirs)
    student = _metrics(tokens, sizes[0], ours, sums.divergence, sums.top1_agreement)
    return student, _metrics(tokens, sizes[0], theirs, 0, tokens)  # 教师与自己相比


def _metrics(
    tokens: int, size: float, cross_entropy: Sum, kl: Sum | None = None, top1: Sum = 0
) -> Metrics:
    """各个总和除以 token 数；困惑度是 ``exp(总 nat / 总 token)``，比特数除以字节数 ``size``。"""
    mean = float(cross_entropy) / tokens
    return Metrics(
        perplexity=perplexity(mean),
        cross_entropy=mean,
        kl=None if kl is None else float(kl) / tokens,
        top1_agreement=None if kl is None else float(top1) / tokens,
        bits_per_byte=float(cross_entropy) / math.log(2) / size if size else None,
    )
