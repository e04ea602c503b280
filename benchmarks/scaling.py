"""一步的时间与内存随批大小、长度、词表怎样增长，读文本随篇数怎样增长，附拟合的指数。

小模型；各个尺寸在同一个进程里轮流计时，取中位数，内存另量。指数是 ``log y`` 对 ``log x`` 的斜率：1
是成正比，0 是不变。内存是一步在权重与 optimizer 状态之外还要的。

    python benchmarks/scaling.py --json benchmarks/results/scaling-cpu.json
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import Record, check_least, environment, read_peak, reset_peak, save
from rich.console import Console
from rich.table import Table
from tables import SCALING

AXES: dict[str, tuple[int, ...]] = {
    "batch": (2, 4, 8, 16),
    "sequence": (64, 128, 256, 512),
    "vocabulary": (8192, 16384, 32768, 65536),
    "articles": (500, 1000, 2000, 4000),
}
BASE = {"batch": 4, "sequence": 128, "vocabulary": 8192}
"""另外两样不变时的值。"""


def step(batch: int, sequence: int, vocabulary: int) -> Callable[[], None]:
    """一个小模型的一步：教师、学生、损失、反向、AdamW。"""
    from distillab.batch import collate_text
    from distillab.config.model_sections import ModelConfig
    from distillab.config.schema import LossConfig, TrainingConfig
    from distillab.distributed.engine import make_optimizer
    from distillab.models.student import StudentModel
    from distillab.teachers.in_process import LocalTeacher
    from distillab.train.module import DistillationModule
    from distillab.vocabulary import Vocabulary

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 384,
             "vocab_size": vocabulary, "max_seq_len": sequence}  # fmt: skip
    student = StudentModel(ModelConfig(num_layers=4, **sizes))
    teacher = LocalTeacher(StudentModel(ModelConfig(num_layers=8, **sizes)))
    module = DistillationModule(student, LossConfig(), Vocabulary(vocabulary)).train()
    optimizer = make_optimizer(module, TrainingConfig())
    ids = torch.randint(vocabulary, (batch, sequence + 1))
    window = collate_text([{"input_ids": row[:-1], "labels": row[1:]} for row in ids])

    def run() -> None:
        sums = module(window, teacher.targets(window.teacher, Vocabulary(vocabulary)))
        (sums.total / len(window)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def loading(articles: int) -> Callable[[], None]:
    """``articles`` 篇文章第一次切成训练序列：读、编码、拼接、写缓存。"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from distillab.data.chunks import WikiDataset

    words = [f"word{number}" for number in range(1000)]
    vocabulary = {word: number for number, word in enumerate(["<eos>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    directory = Path(tempfile.mkdtemp(prefix="scaling-"))
    source = directory / "text.jsonl"
    rows = (
        json.dumps({"text": " ".join(words[(n * 7 + i * i) % 1000] for i in range(200))})
        for n in range(articles)
    )
    source.write_text("\n".join(rows) + "\n")
    rounds = iter(range(10**6))

    def run() -> None:
        os.environ["DISTILLAB_CACHE"] = str(directory / f"cache-{next(rounds)}")  # 每次都是第一次
        WikiDataset.build(str(source), tokenizer, max_seq_len=128, size_mb=None)

    return run


def exponent(sizes: tuple[int, ...], values: list[float]) -> float:
    """``log value`` 对 ``log size`` 的最小二乘斜率。"""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    return statistics.linear_regression(x, y).slope


def measure(axis: str, rounds: int) -> Record:
    """一条轴：各尺寸轮流计时；内存各量一次。"""
    sizes = AXES[axis]
    runs = [loading(n) if axis == "articles" else step(**BASE | {axis: n}) for n in sizes]
    for run in runs:  # 编译，optimizer 的状态
        run()
    seconds: list[list[float]] = [[] for _ in sizes]
    for _ in range(rounds):
        for times, run in zip(seconds, runs, strict=True):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    extra = []
    for run in runs:
        before = reset_peak("cpu") or 0
        run()
        extra.append(max(read_peak("cpu") - before, 2**20))
    medians = [statistics.median(times) for times in seconds]
    return {
        "implementation": "distillab",
        "axis": axis,
        "sizes": list(sizes),
        "seconds": medians,
        "extra_bytes": extra,
        "time_exponent": exponent(sizes, medians),
        "memory_exponent": exponent(sizes, [float(size) for size in extra]),
        "scaling_rounds": rounds,
        **environment("cpu"),
    }


def show(records: list[Record]) -> None:
    """印成表。"""
    table = Table(*(name for name, _ in SCALING), title="growth of a step, and of reading text")
    for record in records:
        table.add_row(*(text(record) for _, text in SCALING))
    Console(width=max(110, Console().width)).print(table)


def main(arguments: list[str]) -> int:
    """逐条轴量。"""
    parser = argparse.ArgumentParser(description="How a step grows with its sizes.")
    add: Any = parser.add_argument
    add("--axes", nargs="+", choices=list(AXES), default=list(AXES), help="which to measure")
    add("--rounds", type=int, default=5, help="timed rounds; the median is reported")
    add("--json", type=Path, metavar="FILE", help="merge the records into this file")
    options = parser.parse_args(arguments)
    check_least(parser, options, {"rounds": 1})
    logging.disable(logging.WARNING)
    records = []
    for axis in options.axes:
        print(f"  {axis}", flush=True)
        records.append(measure(axis, options.rounds))
        if options.json:
            save(options.json, records[-1:], ["axis"])
    show(records)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
