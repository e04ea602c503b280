"""一步怎样分给各进程：检查点换了引擎、换了进程数还能接着走，靠的是它记下了原来的。"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from ..config.schema import TrainingConfig
from ..errors import DistillabError
from .engine import engine_name

logger = logging.getLogger("distillab")


@dataclass(frozen=True)
class Layout:
    """一步怎样分给各进程；存进检查点，换了就要换算位置。

    Attributes:
        engine: 引擎的名字。
        processes: 进程数。
        batch_size: 每个进程每批几条。
        accumulation: 每步几批。
    """

    engine: str
    processes: int
    batch_size: int
    accumulation: int

    @classmethod
    def of(cls, accelerator: Accelerator, config: TrainingConfig) -> Layout:
        """现在的。"""
        return cls(
            engine_name(accelerator),
            accelerator.num_processes,
            config.batch_size,
            config.gradient_accumulation_steps,
        )

    def moved(self, batches: int, path: Path, now: Layout) -> int:
        """本轮里每个进程用掉的 micro-batch 数，换算成 ``now`` 的，并在日志里说变了什么。

        Args:
            batches: 存下时的。
            path: 检查点的路径，用于报错。
            now: 现在的。

        Raises:
            DistillabError: 一步的序列数变了：学习率的日程与数据的位置都对不上。
        """
        before, after = (
            each.processes * each.batch_size * each.accumulation for each in (self, now)
        )
        if before != after:
            raise DistillabError(
                f"{path}: an optimizer step had {before} sequences and now has {after} "
                f"({now.processes} process(es) x train.batch_size={now.batch_size} x "
                f"train.gradient_accumulation_steps={now.accumulation}): change the last two to "
                f"make {before}"
            )
        used = batches * self.processes * self.batch_size
        logger.info(
            "the checkpoint was written by %s with %d process(es), this is %s with %d: weights and "
            "optimizer moments are split anew, the data continues after sequence %d of the epoch",
            self.engine, self.processes, now.engine, now.processes, used,
        )  # fmt: skip
        if self.processes != now.processes:
            logger.info("random states (dropout) are seeded anew: they belonged to each process")
        return used // (now.processes * now.batch_size)
