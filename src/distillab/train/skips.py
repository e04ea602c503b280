"""训练中可以跳过的：读不出的数据行、不是有限值的步；以及跳到多少就该停下。

跳过由所有进程一起做：坏的行只让那一批少几条，通信照旧；条数随每步的归约相加，到了上限便一起停。
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from ..batch import Batch, FailedRow
from ..errors import DistillabError, typed_reason
from .state import TrainerState

logger = logging.getLogger("distillab")

MAX_SKIPPED_IN_A_ROW = 10
"""连续这么多步不是有限值就停下。"""

MAX_FAILED_ROWS = 100
"""平均每轮跳过的行多于这么多就停下：那是数据或代码有错，不是个别的坏行。"""


class _Row(NamedTuple):
    """数据集的一项，与它的编号；读不出时是原因。"""

    number: int
    item: Any
    reason: str | None = None


class Used(NamedTuple):
    """一步用了哪一轮的哪些批，都从 0 数起；为了能在日志里说出来。"""

    epoch: int
    first: int
    last: int

    @classmethod
    def of(cls, state: TrainerState, count: int, loader: Any) -> Used:
        """刚从 ``loader`` 取出的 ``count`` 批；一轮的最后一批之后，``state`` 已经翻到下一轮。"""
        end = state.batches_in_epoch or len(loader)
        return cls(state.current_epoch - (state.batches_in_epoch == 0), end - count, end - 1)


class GuardedRows(Dataset[Any]):
    """map-style 的数据集，读不出的行变成一个记号，而不是异常；与 ``GuardedCollate`` 配合。"""

    def __init__(self, data: Dataset[Any]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> _Row:
        try:
            return _Row(index, self.data[index])
        except Exception as error:  # 数据集可能抛出任何异常
            return _Row(index, None, typed_reason(error))


class GuardedCollate:
    """拼一批；读不出、拼不进去的行去掉，记在 ``Batch.failed`` 里。

    一条也不剩时，用一条好的顶替而不训练它：别的进程还等着这一批的通信。
    """

    def __init__(self, rows: GuardedRows, collate: Callable[[Sequence[Any]], Batch]) -> None:
        self.rows, self.collate = rows, collate

    def __call__(self, rows: Sequence[_Row]) -> Batch:
        """拼成一批；每一行单独都拼得成、合起来却不行，或没有一行可用，才抛出异常。"""
        good = [row for row in rows if row.reason is None]
        if len(good) == len(rows):
            try:
                return self.collate([row.item for row in good])
            except Exception:
                if all(self._alone(row).reason is None for row in rows):
                    raise
        checked = [self._alone(row) for row in rows]
        good = [row for row in checked if row.reason is None]
        failed = tuple(FailedRow(row.number, row.reason) for row in checked if row.reason)
        if good:
            return replace(self.collate([row.item for row in good]), failed=failed)
        return replace(self._stand_in(), failed=failed)

    def _alone(self, row: _Row) -> _Row:
        if row.reason is None:
            try:
                self.collate([row.item])
            except Exception as error:  # 同上
                return row._replace(reason=typed_reason(error))
        return row

    def _stand_in(self) -> Batch:
        for index in range(len(self.rows)):
            row = self._alone(self.rows[index])
            if row.reason is None:
                batch = self.collate([row.item])
                none = batch.labels[:0]
                student, teacher = (
                    replace(view, index=none) for view in (batch.student, batch.teacher)
                )
                return replace(
                    batch, student=student, teacher=teacher, labels=none, keys=None, stored=None
                )
        raise DistillabError("not one row of the training data can be read")


def report_failed_rows(window: Sequence[Batch]) -> int:
    """在日志里说出一个窗口里跳过的行；每个进程说自己的。返回行数。"""
    failed = [row for batch in window for row in batch.failed]
    for row in failed:  # error：不是主进程的也要说
        logger.error("row %d of the training data skipped: %s", row.index, row.reason)
    return len(failed)


def check_failed_rows(state: TrainerState) -> None:
    """跳过的行平均每轮超过 ``MAX_FAILED_ROWS`` 就停下；``state`` 在各进程上相同，所以一起停。"""
    if state.failed_rows > MAX_FAILED_ROWS * (state.current_epoch + 1):
        raise DistillabError(
            f"stopped at step {state.current_step}: {state.failed_rows} rows of the training data "
            f"failed, expected at most {MAX_FAILED_ROWS} in an epoch; the reasons are in the log"
        )


def skipped_step(
    state: TrainerState, loss: float, used: Used, learning_rate: float, scaler: Any
) -> None:
    """记下跳过的一步；连续 ``MAX_SKIPPED_IN_A_ROW`` 步都不是有限值就停下。

    ``loss`` 是全局的，它有限时不有限的就是梯度；``scaler`` 是 fp16 的 GradScaler 或 ``None``。
    """
    state.skipped_steps += 1
    state.skipped_in_a_row += 1
    logger.warning(
        "step %d skipped: %s is not finite (epoch %d, batches %d to %d)%s",
        state.current_step,
        "gradient norm" if math.isfinite(loss) else "loss",
        used.epoch,
        used.first,
        used.last,
        "" if scaler is None else f"; loss scale is now {scaler.get_scale():g}",
    )
    if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise DistillabError(
            f"stopped at step {state.current_step}: {MAX_SKIPPED_IN_A_ROW} steps in a row were "
            f"not finite; try a lower train.learning_rate (now {learning_rate:g}), "
            f"more train.warmup_steps, or train.precision=fp32"
        )
