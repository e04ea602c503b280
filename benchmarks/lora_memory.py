"""LoRA 一步训练的峰值内存：教师是关掉 adapter 的学生自己，与教师是同一个模型的第二份。

模型是随机权重的 Qwen2，缺省是 135M 的形状；教师比学生多读一段经验。两种做法各用一个进程，跑同样的
几步，量最后一步；两边的损失必须相同，否则退出码为 1。

    python benchmarks/lora_memory.py --dtype float32
    python benchmarks/lora_memory.py --hidden-size 1024 --layers 28 --heads 16 --kv-heads 8
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measuring import (
    Record,
    Worker,
    check_least,
    choose_device,
    environment,
    open_channel,
    read_peak,
    reset_peak,
    send,
    synchronize,
)
from rich.console import Console
from rich.table import Table

TEACHERS = ("self", "copy")
SIZES = ("hidden_size", "layers", "heads", "kv_heads", "ffn", "vocab", "rank",
         "batch_size", "experience", "prompt", "response", "steps")  # fmt: skip


def build(options: argparse.Namespace) -> tuple[Any, Any]:
    """学生与它的教师，在 ``options.device`` 上。"""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from distillab.config.model_sections import LoraConfig
    from distillab.models.interface import PretrainedLM
    from distillab.models.lora import add_lora
    from distillab.teachers.in_process import AdapterOffTeacher, LocalTeacher

    torch.manual_seed(options.seed)
    config = Qwen2Config(
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        intermediate_size=options.ffn,
        vocab_size=options.vocab,
        tie_word_embeddings=True,
    )
    with torch.device(options.device):
        torch.set_default_dtype(getattr(torch, options.dtype))  # 不先造一份 float32 的
        model = Qwen2ForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    second = copy.deepcopy(model) if options.teacher == "copy" else None
    student = add_lora(PretrainedLM(model), LoraConfig(rank=options.rank))
    if options.checkpointing:
        student.enable_activation_checkpointing()
    if second is None:
        return student, AdapterOffTeacher(student)
    return student, LocalTeacher(PretrainedLM(second))


def make_batch(options: argparse.Namespace) -> Any:
    """随机的 token；教师的 prompt 前面多一段经验。"""
    from distillab.batch import Example, Tokens, collate_examples

    generator = torch.Generator().manual_seed(options.seed)
    parts = [options.experience, options.prompt, options.response]
    examples = []
    for _ in range(options.batch_size):
        ids = torch.randint(options.vocab, (sum(parts),), generator=generator).tolist()
        start = options.experience + options.prompt
        teacher = Tokens(ids, list(range(start, len(ids))))
        student = Tokens(
            ids[options.experience :], list(range(options.prompt, len(ids) - options.experience))
        )
        examples.append(Example(student, teacher))
    return collate_examples(examples, pad_id=0).to(options.device)


def worker(options: argparse.Namespace) -> Record:
    """训练几步，量最后一步：optimizer 的状态已经在，编译与缓存已经过去。"""
    from distillab.config.schema import LossConfig, TrainingConfig
    from distillab.distributed.engine import make_optimizer
    from distillab.models.lora import adapter_parameters
    from distillab.train.module import DistillationModule
    from distillab.vocabulary import Vocabulary

    student, teacher = build(options)
    batch = make_batch(options)
    vocabulary = Vocabulary(student.vocab_size)
    module = DistillationModule(student, LossConfig(alpha=1.0, temperature=1.0), vocabulary).train()
    optimizer = make_optimizer(module, TrainingConfig(learning_rate=1e-4))
    losses = []
    seconds = 0.0
    for step in range(options.steps):
        if step == options.steps - 1:
            reset_peak(options.device)
        synchronize(options.device)
        start = time.perf_counter()
        targets = teacher.targets(batch.teacher, vocabulary)
        total = module(batch, targets).total / len(batch)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(options.device)
        seconds = time.perf_counter() - start
        losses.append(total.item())
        del total, targets
    storages = {
        parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes()
        for model in (student, teacher.model)
        for parameter in model.parameters()
    }
    return {
        "teacher": options.teacher,
        "weight_bytes": sum(storages.values()),
        "adapter_bytes": sum(p.nbytes for p in adapter_parameters(student)),
        "peak_bytes": read_peak(options.device),
        "seconds": seconds,
        "losses": losses,
    }


def measure(teacher: str, options: argparse.Namespace) -> Record:
    """在自己的进程里量一种做法。"""
    role = {**vars(options), "teacher": teacher, "json": None, "role": None}
    with contextlib.closing(Worker(role)) as process:
        record = process.receive()
    fields = ("device", "dtype", "checkpointing", "seed", *SIZES)
    return record | {name: getattr(options, name) for name in fields} | environment(options.device)


def show(records: list[Record]) -> None:
    """印成表。"""
    first = records[0]
    title = f"one LoRA step, {first['dtype']} base on {first['device']}"
    table = Table(title=title)
    for column in ("teacher", "weights MiB", "adapters MiB", "peak MiB", "seconds", "last loss"):
        table.add_column(column, justify="left" if column == "teacher" else "right", no_wrap=True)
    for record in records:
        sizes = (record[f"{name}_bytes"] / 2**20 for name in ("weight", "adapter", "peak"))
        table.add_row(
            record["teacher"],
            *(f"{size:,.1f}" for size in sizes),
            f"{record['seconds']:.2f}",
            f"{record['losses'][-1]:.6f}",
        )
    Console(width=max(90, Console().width)).print(table)


def parse(arguments: list[str]) -> argparse.Namespace:
    """命令行。"""
    parser = argparse.ArgumentParser(
        description="Peak memory of a LoRA step: the student as its own teacher, or a second copy.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--hidden-size", type=int, default=576, help="width of the model")
    add("--layers", type=int, default=30, help="transformer blocks")
    add("--heads", type=int, default=9, help="query heads")
    add("--kv-heads", type=int, default=3, help="key/value heads")
    add("--ffn", type=int, default=1536, help="width of the feed-forward layers")
    add("--vocab", type=int, default=49152, help="rows of the tied head")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the frozen base")
    add("--rank", type=int, default=16, help="rank of the adapters")
    add("--batch-size", type=int, default=2, help="sequences")
    add("--experience", type=int, default=64, help="tokens that only the teacher reads")
    add("--prompt", type=int, default=64, help="tokens of the prompt")
    add("--response", type=int, default=128, help="response tokens of a sequence")
    add("--steps", type=int, default=2, help="the last one is measured")
    add("--checkpointing", action="store_true", help="recompute activations")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--seed", type=int, default=0, help="seeds weights and tokens")
    add("--json", type=Path, metavar="FILE", help="write the records to this file")
    add("--role", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    check_least(parser, options, dict.fromkeys(SIZES, 1))
    if options.hidden_size % options.heads or options.heads % options.kv_heads:
        parser.error("--heads must divide --hidden-size, and --kv-heads must divide --heads")
    return options


def main(arguments: list[str]) -> int:
    """量两种做法；返回退出码。"""
    options = parse(arguments)
    if options.role:
        channel = open_channel()
        send(channel, worker(argparse.Namespace(**json.loads(options.role))))
        return 0
    options.device = choose_device(options.device)
    records = [measure(teacher, options) for teacher in TEACHERS]
    show(records)
    own, second = records
    difference = (second["peak_bytes"] - own["peak_bytes"]) / 2**20
    print(f"the student as its own teacher saves {difference:,.1f} MiB of peak memory")
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    same = all(
        math.isclose(left, right, rel_tol=1e-6)
        for left, right in zip(own["losses"], second["losses"], strict=True)
    )
    if not same:
        print(f"the losses differ: {own['losses']} and {second['losses']}", file=sys.stderr)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
