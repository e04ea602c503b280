"""``TrainerState``：训练走到了哪里，与上次记录以来的总和。"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .on_policy import PREFIX, RolloutGuard


@dataclass
class TrainerState:
    """训练走到了哪里；存进检查点的 JSON。

    Attributes:
        current_epoch: 第几轮，从 0 起。
        current_step: 已走的 optimizer 步数（含跳过的）。
        batches_in_epoch: 本轮里每个进程已用掉的 micro-batch 数。
        tokens: 已训练的 response token 数，所有进程合计。
        seconds: 训练用时，不含验证与存盘。
        best_val_loss: 至今最低的验证交叉熵，nat/token。
        best_step: 它在哪一步。
        skipped_steps: 因非有限值而跳过的步数。
        skipped_in_a_row: 其中最近连续的步数。
        failed_rows: 跳过的数据行，所有进程合计。
        interval: 上次记录以来的总和，下一行 metrics 由它得出。
        guard: 从学生采样时，拿来与以后比较的。
        data: 训练数据的指纹；``None`` 是没有指纹的数据集。
        run: 属于哪一次运行；``None`` 是较早的检查点，没有记。
        metrics: 存盘时 ``metrics.jsonl`` 的大小与 sha256。
        stream: 训练数据是流时，读到了哪里：``StreamState`` 的各项。
    """

    current_epoch: int = 0
    current_step: int = 0
    batches_in_epoch: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_val_loss: float | None = None
    best_step: int | None = None
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    failed_rows: int = 0
    interval: dict[str, float] = field(default_factory=dict)
    guard: RolloutGuard = field(default_factory=RolloutGuard)
    data: str | None = None
    run: str | None = None
    metrics: tuple[int, str] | None = None
    stream: dict[str, Any] | None = None

    def add(self, sums: Mapping[str, float]) -> None:
        """记下一步的总和；跳过的一步只有 ``seconds``。"""
        for key, value in sums.items():
            self.interval[key] = self.interval.get(key, 0.0) + value

    def close_interval(self) -> dict[str, Any]:
        """上次以来的总和变成一行 metrics，并重新开始；损失的单位是 nat/token。"""
        sums, self.interval = self.interval, {}
        row: dict[str, Any] = {
            "step": self.current_step,
            "epoch": self.current_epoch,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "skipped_steps": self.skipped_steps,
            "failed_rows": self.failed_rows,
        }
        if tokens := sums.get("tokens"):
            row |= {key: sums[key] / tokens for key in ("loss", "divergence", "cross_entropy")}
            row["grad_norm"] = sums["grad_norm"] / sums["steps"]
            row["tokens_per_second"] = round(tokens / sums["seconds"], 1)
            rollout = {
                key.removeprefix(PREFIX): value
                for key, value in sums.items()
                if key.startswith(PREFIX)
            }
            row |= self.guard.row(rollout, self.current_step)
        return row
