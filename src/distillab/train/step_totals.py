"""一步在所有进程上的总和：在设备上归约一次，异步抄到主机，晚一步才读。

读一个还在算的数，主机要等设备，设备随后又要等主机。所以先把下一步的前向与反向发出去，再来读；这一步要不
要跳过却等不得，由设备自己看 ``found_inf``。
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..distributed.engine import on_device
from ..distributed.sharding import whole
from ..loss.losses import LossSums
from ..signals import StopRequest
from .on_policy import PREFIX, Prepared
from .progress import TrainingProgress
from .rollout import RolloutSums
from .skips import Used, skipped_step
from .state import TrainerState

if TYPE_CHECKING:
    from accelerate import Accelerator

_LOSSES, _ROLLOUT = len(LossSums._fields), len(RolloutSums._fields)


class StepTotals(NamedTuple):
    """一步在所有进程上的总和，已经在主机上；``votes`` 见 ``StopRequest``。"""

    losses: dict[str, float]
    grad_norm: float
    tokens: int
    failed_rows: int
    rollout: list[float]
    votes: list[float]

    @property
    def finite(self) -> bool:
        """损失与梯度都是有限值；与 ``Launched.found_inf`` 是同一个判断。"""
        return math.isfinite(self.losses["total"]) and math.isfinite(self.grad_norm)

    def sums(self, sampled: bool) -> dict[str, float]:
        """记录用的各项；采样的窗口还有键以 ``rollout.`` 开头的。两个交叉熵就是 Σ -log 概率。"""
        losses, found = self.losses, {}
        if sampled:
            found = dict(zip(RolloutSums._fields, self.rollout, strict=True)) | {
                "scored": self.tokens,
                "student_nll": losses["cross_entropy"],
                "teacher_nll": losses["teacher_cross_entropy"],
            }
        return {f"{PREFIX}{name}": value for name, value in found.items()} | {
            "steps": 1,
            "tokens": self.tokens,
            "loss": losses["total"],
            "divergence": losses["divergence"],
            "cross_entropy": losses["cross_entropy"],
            "grad_norm": self.grad_norm,
        }


class Launched:
    """发给了设备、总和还没有读回的一步；造它要归约一次，各进程一起。

    ``losses [6]``（float64）、``failed_rows``、``votes`` 与 ``prepared`` 是本进程的；``norm`` 是全
    局的梯度范数，FSDP2 的是 DTensor，DeepSpeed 的是数。``totals`` 与 ``found_inf`` 在设备上。
    """

    def __init__(
        self,
        accelerator: Accelerator,
        prepared: Prepared,
        losses: Tensor,
        norm: Tensor | float,
        failed_rows: int,
        votes: Sequence[float],
        used: Used,
    ) -> None:
        self.sampled, self.used = prepared.sampled, used
        tokens = sum(len(batch) for batch in prepared.batches)
        known = on_device([tokens, failed_rows, *prepared.sums, *votes], losses.device)
        share = whole(torch.as_tensor(norm)).to(losses).reshape(1) / accelerator.num_processes
        totals: Tensor = accelerator.reduce(torch.cat([losses, share, known]), reduction="sum")
        self.totals = totals
        self.found_inf = (totals[0] + totals[_LOSSES]).isfinite().logical_not().float()
        self._host = totals.to("cpu", non_blocking=totals.is_cuda)  # 异步的就在锁页内存里
        self._copied = None
        if totals.is_cuda:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def read(self) -> StepTotals:
        """等到抄完为止；后来发出去的不必算完。"""
        if self._copied is not None:
            self._copied.synchronize()
        values = self._host.tolist()
        norm, tokens, failed, *rest = values[_LOSSES:]
        losses = dict(zip(LossSums._fields, values[:_LOSSES], strict=True))
        rollout, votes = rest[:_ROLLOUT], rest[_ROLLOUT:]
        return StepTotals(losses, norm, int(tokens), int(failed), rollout, votes)


class Ledger:
    """一次训练的账：发出去的那一步读回之后记到哪里，用了多久。

    ``since`` 是训练用时记到了哪一刻：验证与存盘之后重新开始。
    """

    def __init__(self) -> None:
        self.launched: Launched | None = None
        self.progress: TrainingProgress | None = None
        self.since = time.perf_counter()

    def settle(
        self, state: TrainerState, stop: StopRequest, scheduler: Any, rate: float, scaler: Any
    ) -> None:
        """读回发出去的那一步，记进 ``state``、``stop`` 与进度条；有限的一步，日程才走。

        学习率的峰值 ``rate`` 与 ``scaler`` 见 ``skipped_step``，连续跳过太多步也由它停下。
        """
        launched, self.launched = self.launched, None
        if launched is None:
            return
        totals = launched.read()
        stop.agree(totals.votes)
        state.failed_rows += totals.failed_rows
        sums: dict[str, float] = {}
        if totals.finite:
            scheduler.step()
            state.tokens += totals.tokens
            state.skipped_in_a_row = 0
            sums = totals.sums(launched.sampled)
        else:
            skipped_step(state, totals.losses["total"], launched.used, rate, scaler)
        now = time.perf_counter()
        sums["seconds"], self.since = now - self.since, now
        state.seconds += sums["seconds"]
        state.add(sums)
        if self.progress is not None:
            self.progress.step(state.current_step, sums)
