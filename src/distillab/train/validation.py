"""验证：交叉熵、困惑度、与教师的 KL 和 top-1 一致率，都由 token 上的总和得出。"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..config.schema import LossConfig
from ..distributed.watch import Watch
from ..figures import perplexity
from ..loss.losses import LossSums

if TYPE_CHECKING:
    from accelerate import Accelerator

WITH_TEACHER = LossConfig(divergence="forward_kl", alpha=0.5, temperature=1.0)
"""验证用的目标函数：T = 1 的 KL(教师||学生)，外加交叉熵；它的 ``total`` 没有人看。"""

WITHOUT_TEACHER = LossConfig(alpha=0.0, temperature=1.0)

Sum = Tensor | float


class Metrics(TypedDict):
    """一个模型在验证集上的成绩；单位 nat/token。没有教师时 ``kl`` 与一致率为 ``None``。"""

    perplexity: float
    cross_entropy: float
    kl: float | None
    top1_agreement: float | None


@torch.no_grad()
def validation_sums(
    accelerator: Accelerator,
    module: nn.Module,
    batches: Iterable[tuple[Batch, bool]],
    targets: Callable[[Batch], Any],
    watch: Watch,
) -> tuple[LossSums, int]:
    """整个验证集在所有进程上的 ``LossSums`` 与 response token 数；``batches`` 是 ``in_step`` 的。

    各批依次发给设备，全部的总和最后只读一次。
    """
    device = accelerator.device
    totals = torch.zeros(len(LossSums._fields) + 1, dtype=torch.float64, device=device)
    module.eval()
    for batch, counted in batches:
        watch.at("validation")
        batch = batch.to(device)
        part: LossSums = module(batch, targets(batch))
        if counted:
            totals[0] += len(batch)
            totals[1:] += torch.stack(part)
    module.train()
    totals = accelerator.reduce(totals, reduction="sum").cpu()
    return LossSums(*totals[1:].unbind()), int(totals[0])


def validated(sums: LossSums, tokens: int, compared: bool) -> tuple[Metrics, Metrics | None]:
    """由整个验证集的总和得出 ``(学生, 教师)`` 的成绩；没有与教师比较（``compared``）时没有后者。"""
    if not compared:
        return _metrics(tokens, sums.cross_entropy), None
    student = _metrics(tokens, sums.cross_entropy, sums.divergence, sums.top1_agreement)
    return student, _metrics(tokens, sums.teacher_cross_entropy, 0, tokens)  # 教师与自己相比


def _metrics(tokens: int, cross_entropy: Sum, kl: Sum | None = None, top1: Sum = 0) -> Metrics:
    """各个总和除以 token 数；困惑度是 ``exp(总 nat / 总 token)``。"""
    mean = float(cross_entropy) / tokens
    return Metrics(
        perplexity=perplexity(mean),
        cross_entropy=mean,
        kl=None if kl is None else float(kl) / tokens,
        top1_agreement=None if kl is None else float(top1) / tokens,
    )
