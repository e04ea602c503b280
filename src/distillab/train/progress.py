"""训练时终端上看到的东西：进度条、日志行。"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from ..bars import make_bar
from .validation import Metrics

logger = logging.getLogger("distillab")

Item = TypeVar("Item")


class TrainingProgress:
    """训练的进度条：步数、tokens/s、剩余时间、各项损失；只有主进程显示。

    终端上画进度条；输出被重定向时，改为每个 ``log_interval`` 一行日志。
    """

    def __init__(self, total_steps: int, current_step: int, enabled: bool) -> None:
        self.enabled = enabled
        self.total_steps = total_steps
        self._speed = 0.0
        self._bar = make_bar(enabled)
        self.interactive = not self._bar.disable
        self._task = self._bar.add_task(
            "train", total=total_steps, completed=current_step, status="starting"
        )

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, step: int, sums: Mapping[str, float]) -> None:
        """走完一步，``sums`` 是它的总和；跳过的一步不动。速度做指数平滑。"""
        if not (tokens := sums.get("tokens")):
            return
        speed = tokens / sums["seconds"]
        losses = {key: sums[key] / tokens for key in ("loss", "divergence", "cross_entropy")}
        self._speed = 0.9 * (self._speed or speed) + 0.1 * speed
        self._bar.update(
            self._task,
            completed=step,
            status=f"{self._speed:,.0f} tok/s  loss {losses['loss']:.3f}  "
            f"D {losses['divergence']:.3f}  CE {losses['cross_entropy']:.3f}",
        )

    def log(self, row: Mapping[str, Any]) -> None:
        """没有进度条时的日志行。"""
        if self.enabled and not self.interactive and "loss" in row:
            losses = "loss {loss:.3f} D {divergence:.3f} CE {cross_entropy:.3f}".format(**row)
            speed = f"lr {row['learning_rate']:.1e} {row['tokens_per_second']:,.0f} tok/s"
            logger.info("step %d/%d %s %s", row["step"], self.total_steps, losses, speed)

    def validated(self, step: int, metrics: Metrics) -> None:
        """验证之后的日志行。"""
        if self.enabled:
            teacher = ""
            if metrics["kl"] is not None and metrics["top1_agreement"] is not None:
                teacher = f", KL {metrics['kl']:.3f}, top-1 {metrics['top1_agreement']:.1%}"
            elif (bits := metrics.get("bits_per_byte")) is not None:
                teacher = f", {bits:.3f} bits per byte"
            perplexity = f"{metrics['perplexity']:,.2f}"
            logger.info("step %d validation: perplexity %s%s", step, perplexity, teacher)

    def track(self, items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
        """给一段较长的工作（验证）另开一条进度条，用完撤下。"""
        task = self._bar.add_task(description, total=total, status=description)
        try:
            for item in items:
                yield item
                self._bar.advance(task)
        finally:
            self._bar.remove_task(task)
