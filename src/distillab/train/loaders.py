"""数据集变成一批一批的 ``Batch``：训练的由引擎分给各进程，评测的各取互不重叠的一份。"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby, islice
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset

from ..batch import Batch
from ..config.schema import TrainingConfig
from ..data.mixing import MixtureStream
from ..data.streams import TextStream
from ..distributed.watch import Watch
from ..errors import DistillabError
from .profiling import phase
from .skips import GuardedCollate, GuardedRows
from .state import TrainerState

Collate = Callable[[Sequence[Any]], Batch]
"""把若干项拼成 ``Batch``。"""


def evenly(total: int, limit: int | None = None) -> list[int]:
    """``total`` 条里从头到尾均匀地取至多 ``limit`` 条的下标；每次都是同样的若干条。"""
    count = min(total, limit or total)
    return [i * total // count for i in range(count)]


def in_step(
    batches: Iterable[Batch], loader: DataLoader[Any], accelerator: Accelerator
) -> Iterator[tuple[Batch, bool]]:
    """各进程给出同样多的 ``(批次, 算不算数)``：分片的模型前向一次，每个进程都要到场，凑数的不算。

    ``batches`` 是 ``loader``（``evaluation_loader`` 的），或它外面套了进度条的。
    """
    own = torch.tensor([len(loader)], device=accelerator.device)
    most = int(accelerator.gather(own).max())  # 在前向之前问：先走完的不能先问
    batch = None
    for batch in batches:
        yield batch, True
    for _ in range(most - len(loader)):
        if batch is None:  # 验证集比进程还少
            assert loader.collate_fn is not None
            batch = loader.collate_fn([loader.dataset.dataset[0]])  # type: ignore[attr-defined]
        yield batch, False


def train_loader(
    data: Dataset[Any],
    accelerator: Accelerator,
    collate: Collate,
    batch_size: int,
    sampler: Sampler[int] | None = None,
) -> Any:
    """训练数据，由引擎分给各进程；最后不足一批的不要，读不出的行跳过（见 ``skips``）。没有尽头的
    流是 ``StreamLoader``；不足每个进程一批是 ``DistillabError``。
    """
    if isinstance(data, IterableDataset):
        return StreamLoader(data, accelerator, collate, batch_size)  # type: ignore[arg-type]
    processes, count = accelerator.num_processes, len(data)  # type: ignore[arg-type]
    if count < batch_size * processes:
        raise DistillabError(
            f"the training data has {count} sequences, fewer than one batch of "
            f"train.batch_size={batch_size} on {processes} process(es)"
        )
    rows = GuardedRows(data)
    cuda = accelerator.device.type == "cuda"
    loader = DataLoader(
        rows,
        batch_size=batch_size,
        shuffle=sampler is None,
        sampler=sampler,
        drop_last=True,
        collate_fn=GuardedCollate(rows, collate),
        num_workers=2 if cuda else 0,
        pin_memory=cuda,
        generator=torch.Generator(),  # 否则每轮从全局随机数里取种子，恢复后便与未中断时不同
    )
    return accelerator.prepare(loader)


class StreamLoader:
    """一个流分给各进程：依次取「进程数 x 批大小」项，第 r 个进程取其中的第 r 批。

    一步由哪些项组成，与进程数、累积几次无关；每个进程都读整个流，所以记下的位置也与进程数无关。不预
    取：记下的位置总是刚用到的地方。
    """

    def __init__(
        self,
        stream: TextStream | MixtureStream,
        accelerator: Accelerator,
        collate: Collate,
        batch_size: int,
    ) -> None:
        self.stream, self.accelerator, self.collate = stream, accelerator, collate
        self.batch_size = batch_size

    def figures(self, state: TrainerState) -> dict[str, Any]:
        """``summary.json`` 的 ``sources``：混在一起的各来源用了多少；一个流没有。"""
        if not isinstance(self.stream, MixtureStream):
            return {}
        return {"sources": self.stream.figures(self.stream.begin(state.stream))}

    def windows(self, state: TrainerState, size: int, total_steps: int) -> Iterator[list[Batch]]:
        """给出窗口，每个 ``size`` 批，直到第 ``total_steps`` 步；先把读到的位置记进 ``state``。"""
        position: Any = self.stream.begin(state.stream)
        items = self.stream.items(position)
        start = self.accelerator.process_index * self.batch_size
        together = self.accelerator.num_processes * self.batch_size
        while state.current_step < total_steps:
            window = []
            for _ in range(size):
                read = list(islice(items, together))
                position = read[-1][1]
                own = [item for item, _ in read[start : start + self.batch_size]]
                window.append(self.collate(own).to(self.accelerator.device))
            state.stream, state.current_epoch = asdict(position), position.epoch
            state.batches_in_epoch += size
            yield window


def windows(
    loader: Any, state: TrainerState, size: int, total_steps: int, watch: Watch
) -> Iterator[list[Batch]]:
    """从 ``state`` 记的位置起，逐个给出一个 optimizer 步的 ``size`` 批；先记下读到哪里。

    一轮的最后一步可能不足 ``size`` 批。
    """
    if isinstance(loader, StreamLoader):
        yield from loader.windows(state, size, total_steps)
    batches: Iterator[Batch] = iter(())
    while state.current_step < total_steps:
        watch.at("reading data", state.current_step + 1)
        with phase("data"):
            window = list(islice(batches, size))
        if not window:  # 一轮的开始
            loader.set_epoch(state.current_epoch)
            batches = iter(skip_first_batches(loader, state.batches_in_epoch))
            continue
        state.batches_in_epoch += len(window)
        if state.batches_in_epoch >= len(loader):
            state.current_epoch, state.batches_in_epoch = state.current_epoch + 1, 0
        yield window


def steps_in_all(loader: Any, config: TrainingConfig, reuse: int) -> int:
    """一共走多少 optimizer 步，一个窗口走 ``reuse`` 步；流没有尽头，要有 ``max_steps``。"""
    if isinstance(loader, StreamLoader):
        rows: int | None = loader.stream.rows_in(config.num_epochs)
        if rows is None:
            if config.max_steps is None:
                raise DistillabError(
                    "data.streaming=true needs train.max_steps: a stream has no end"
                )
            return config.max_steps
        window = loader.batch_size * loader.accelerator.num_processes
        total = max(1, rows // (window * config.gradient_accumulation_steps)) * reuse
        return min(config.max_steps or total, int(total))
    windows = math.ceil(len(loader) / config.gradient_accumulation_steps)
    total = config.num_epochs * windows * reuse
    return min(config.max_steps or total, total)


def source_names(loader: DataLoader[Any]) -> list[str]:
    """``evaluation_loader`` 的数据由哪些来源混成；不是混成的没有名字。"""
    return list(getattr(loader.dataset.dataset, "names", ()))  # type: ignore[attr-defined]


def evaluation_loader(
    data: Dataset[Any],
    accelerator: Accelerator,
    collate: Collate,
    *,
    batch_size: int,
    max_sequences: int | None = None,
) -> DataLoader[Any]:
    """每个进程一份互不重叠的数据；从头到尾均匀地取，每次都是同样的若干条，一条也没有就报错。

    几个来源的验证集（``MixedValidation``），每批只来自一个。
    """
    chosen = evenly(len(data), max_sequences)  # type: ignore[arg-type]
    if not chosen:
        raise DistillabError("the validation data has no sequence")
    own = chosen[accelerator.process_index :: accelerator.num_processes]
    source_of = getattr(data, "source_of", lambda _: 0)
    batches = [
        list(group[start : start + batch_size])
        for _, part in groupby(range(len(own)), key=lambda i: source_of(own[i]))
        for group in [list(part)]
        for start in range(0, len(group), batch_size)
    ]
    return DataLoader(
        Subset(data, own),
        batch_sampler=batches,
        collate_fn=collate,
        generator=torch.Generator(),
    )
