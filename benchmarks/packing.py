"""同样的对话：各占一行补齐、长短相近的补齐、几条装进一行，各要多久。

一轮是每条对话恰好一次的前向与反向（教师在内，optimizer 不在内），三种做法在一个进程里轮流走；总损失
必须相同，否则命令失败。CPU 上量的是进程的 CPU 时间。

python benchmarks/packing.py
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from itertools import islice
from pathlib import Path

import torch
from measuring import (
    Record,
    check_least,
    choose_device,
    environment,
    number,
    ratio,
    save,
    synchronize,
)
from rich.console import Console
from rich.table import Table

from distillab.batch import Batch, Example, Tokens
from distillab.config.model_sections import ModelConfig
from distillab.config.schema import LossConfig
from distillab.data.chat_dataset import ChatDataset, LengthGroupedSampler
from distillab.data.packing import PackedDataset, best_fit, collate_rows, keeps_documents_apart
from distillab.models.interface import LanguageModel, PretrainedLM
from distillab.models.student import StudentModel
from distillab.teachers.in_process import LocalTeacher
from distillab.train.module import DistillationModule
from distillab.vocabulary import Vocabulary

IMPLEMENTATIONS = ("random order", "length-grouped", "packed")
MODELS = ("student", "transformers")
MANY = 4000
SIDES = ("student", "teacher")
SIZES = ("conversations", "batch_size", "max_seq_len", "rounds", "experience")


def lengths(count: int, options: argparse.Namespace) -> list[int]:
    """截断的对数正态分布：多数很短，少数很长，像指令数据那样。"""
    rng = random.Random(options.seed)
    most = options.max_seq_len - options.experience
    return [
        min(most, max(12, int(rng.lognormvariate(math.log(most / 5), 0.9)))) for _ in range(count)
    ]


def conversations(options: argparse.Namespace) -> list[Example]:
    """从 ``MANY`` 条里长短相近地分好的几组，一组接一组；三分之二是 response，内容是随机的。

    几十条里凑不出几条一样长的，那样的分组会显得没有用。
    """
    rng = random.Random(options.seed)

    def ids(count: int) -> list[int]:
        return [rng.randrange(1, options.vocab) for _ in range(count)]

    found = []
    many = lengths(MANY, options)
    grouped = LengthGroupedSampler([n + options.experience for n in many], options.batch_size)
    for length in (many[i] for i in islice(grouped, options.conversations)):
        prompt, response = ids(length // 3), ids(length - length // 3)

        def view(before: list[int], response: list[int] = response) -> Tokens:
            return Tokens([*before, *response], list(range(len(before), len(before + response))))

        student = view(prompt)
        teacher = view(ids(options.experience) + prompt) if options.experience else student
        found.append(Example(student, teacher))
    return found


def batches(name: str, data: ChatDataset, options: argparse.Namespace) -> list[Batch]:
    """一轮的全部批次；装在一起的，每批的行数使一批的 token 数与另外两种相当。"""
    if name == "packed":
        rows = PackedDataset(data, seed=options.seed)
        size = max(1, round(options.batch_size * len(rows) / len(data)))
        items = [rows[i] for i in range(len(rows))]
        groups = [items[i : i + size] for i in range(0, len(items), size)]
    else:
        size, order = options.batch_size, list(range(len(data)))
        if name == "random order":  # 数据本来就是分好组的次序
            random.Random(options.seed).shuffle(order)
        groups = [[data[i] for i in order[at : at + size]] for at in range(0, len(order), size)]
    return [collate_rows(group, pad_id=0).to(options.device) for group in groups]


def padding_of_many(options: argparse.Namespace) -> list[Record]:
    """``MANY`` 条对话时的 padding，只看长度。"""
    students = lengths(MANY, options)
    teachers = [n + options.experience for n in students]
    size, order = options.batch_size, list(range(MANY))
    grouped = list(LengthGroupedSampler(students, size, options.seed))
    random.Random(options.seed).shuffle(order)
    rows = best_fit(list(zip(students, teachers, strict=True)), options.max_seq_len, options.seed)
    records = []
    for name, chosen in zip(IMPLEMENTATIONS, (order, grouped, None), strict=True):
        shares = []
        for sizes in (students, teachers):
            slots = len(rows) * options.max_seq_len
            if chosen is not None:
                starts = range(0, len(chosen), size)
                groups = [[sizes[i] for i in chosen[at : at + size]] for at in starts]
                slots = sum(len(group) * max(group) for group in groups)
            shares.append(1 - sum(sizes) / slots)
        records.append({
            "implementation": name,
            "model": f"none, {MANY:,} lengths",
            "student_padding": shares[0],
            "teacher_padding": shares[1],
        })  # fmt: skip
    return records


def make_model(name: str, options: argparse.Namespace) -> LanguageModel:
    """随机的权重，同样的形状。"""
    torch.manual_seed(options.seed)
    shape = {
        "hidden_size": options.hidden_size,
        "intermediate_size": 4 * options.hidden_size,
        "vocab_size": options.vocab,
    }
    heads = options.hidden_size // 64
    if name == "student":
        return StudentModel(
            ModelConfig(**shape, num_layers=options.layers, num_heads=heads, num_kv_heads=heads,
                        max_seq_len=options.max_seq_len)
        )  # fmt: skip
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return PretrainedLM(
        Qwen2ForCausalLM(
            Qwen2Config(**shape, num_hidden_layers=options.layers, num_attention_heads=heads,
                        num_key_value_heads=heads, max_position_embeddings=options.max_seq_len,
                        tie_word_embeddings=True)
        )
    )  # fmt: skip


def measure(model: str, options: argparse.Namespace) -> list[Record]:
    """一种模型的三种做法，轮流各走几轮。"""
    data = ChatDataset(conversations(options), max_seq_len=options.max_seq_len)
    student = make_model(model, options).to(options.device)
    assert keeps_documents_apart(student)
    teacher = LocalTeacher(make_model(model, options).to(options.device))
    vocabulary = Vocabulary(options.vocab)
    module = DistillationModule(student, LossConfig(alpha=0.5, temperature=1.0), vocabulary)
    module.train()
    # 与别的工作共用的 CPU 上，墙上的时间说的是别人；一个线程的 CPU 时间说的是自己。
    clock = time.perf_counter if options.device == "cuda" else time.process_time
    ready = {name: batches(name, data, options) for name in IMPLEMENTATIONS}
    seconds: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    losses: dict[str, float] = {}
    for turn in range(options.rounds + 1):  # 第一轮热身
        for name, epoch in ready.items():
            module.zero_grad()
            synchronize(options.device)
            start = clock()
            losses[name] = 0.0
            for batch in epoch:
                total = module(batch, teacher.targets(batch.teacher, vocabulary)).total
                total.backward()
                losses[name] += total.item()
            synchronize(options.device)
            if turn:
                seconds[name].append(clock() - start)
    if not all(math.isclose(loss, losses["packed"], rel_tol=1e-4) for loss in losses.values()):
        raise SystemExit(f"the losses differ: {losses}")
    tokens = [sum(sizes) for sizes in zip(*data.view_lengths, strict=True)]
    records = []
    for name, epoch in ready.items():
        slots = [sum(getattr(b, side).input_ids.numel() for b in epoch) for side in SIDES]
        median = statistics.median(seconds[name])
        records.append({
            "implementation": name,
            "model": model,
            "seconds": median,
            "conversation_tokens_per_second": tokens[0] / median,
            "student_padding": 1 - tokens[0] / slots[0],
            "teacher_padding": 1 - tokens[1] / slots[1],
            "conversation_tokens": tokens[0],
            "loss": losses[name],
        })  # fmt: skip
    return records


def show(records: list[Record]) -> None:
    """印成表；比值是对同一模型的 ``length-grouped``。"""
    peers = {r["model"]: r.get("conversation_tokens_per_second") for r in records
             if r["implementation"] == "length-grouped"}  # fmt: skip
    table = Table()
    columns = ("model", "rows", "tokens/s", "seconds", "padding", "teacher's", "ratio")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:2] else "right", no_wrap=True)
    for record in records:
        speed = record.get("conversation_tokens_per_second")
        table.add_row(
            record["model"],
            record["implementation"],
            number(speed, ".0f"),
            number(record.get("seconds"), ".2f"),
            number(record["student_padding"], ".1%"),
            number(record["teacher_padding"], ".1%"),
            number(speed and ratio(speed, peers[record["model"]]), ".2f"),
        )
    Console(width=max(100, Console().width)).print(table)


def parse(arguments: list[str]) -> argparse.Namespace:
    """命令行。"""
    parser = argparse.ArgumentParser(
        description="Padded rows, rows of similar length and packed rows, side by side.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--models", nargs="*", choices=MODELS, default=list(MODELS))
    add("--conversations", type=int, default=32, help="of an epoch")
    add("--experience", type=int, default=0, help="tokens that only the teacher reads")
    add("--batch-size", type=int, default=8, help="conversations of a padded batch")
    add("--max-seq-len", type=int, default=512, help="tokens of a packed row")
    add("--hidden-size", type=int, default=256, help="width of both models; a multiple of 64")
    add("--layers", type=int, default=2, help="transformer blocks of both models")
    add("--vocab", type=int, default=4096, help="rows of the tied heads")
    add("--rounds", type=int, default=2)
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--seed", type=int, default=0, help="seeds weights, lengths and tokens")
    add("--json", type=Path, metavar="FILE", help="write the records to this file")
    options = parser.parse_args(arguments)
    check_least(parser, options, {"conversations": 8, "batch_size": 1, "rounds": 1, "layers": 1})
    options.device = choose_device(options.device)
    return options


def main(arguments: list[str]) -> int:
    """量完所有的格，印表；返回退出码。"""
    options = parse(arguments)
    records = padding_of_many(options)
    records += [record for model in options.models for record in measure(model, options)]
    show(records)
    if options.json:
        about = {name: getattr(options, name) for name in SIZES} | environment(options.device)
        keys = ["model", "experience", "device_name"]
        save(options.json, [record | about for record in records], keys)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
