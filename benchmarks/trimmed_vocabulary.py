"""学生自己的词表与教师的整个词表相比：切分、往返、参数、速度、内存，与同样文字上每字节的比特数。

分词器是 Qwen 真实的；``speed`` 的两个模型是 wiki-zh 的形状、随机的权重；``quality`` 先在同样的
文字上从零训练一个小教师，再由它各蒸馏一个学生，走的是命令行，断了再来一遍就接着走。

python benchmarks/vocabulary_text.py text.jsonl
python benchmarks/trimmed_vocabulary.py text.jsonl --json results/trimmed_vocabulary-cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import (
    Record,
    Worker,
    environment,
    number,
    open_channel,
    read_peak,
    reset_peak,
    save,
    send,
    synchronize,
    take_turns,
)
from rich.console import Console
from rich.table import Table

RANKS = "pypi:dashscope==2.0.2/dashscope/resources/qwen.tiktoken"
SECTIONS = ("segmentation", "speed", "quality")
VARIANTS = ("full", "trimmed")
ROWS = 151_936
"""Qwen2.5 的 embedding 的行数。"""

SHAPES = {
    "teacher": "{hidden_size: 192, num_layers: 4, num_heads: 6, num_kv_heads: 2, "
    "intermediate_size: 512, max_seq_len: 256}",
    "student": "{hidden_size: 128, num_layers: 2, num_heads: 4, num_kv_heads: 2, "
    "intermediate_size: 384, max_seq_len: 256}",
}
"""``quality`` 的两个模型。"""
RECIPE = """\
student:
  tokenizer: {tokenizer}
  config: {config}
  vocab: {vocab}
data: {{source: {text}, max_seq_len: 256, size_mb: null, validation_fraction: 0.05}}
train: {{batch_size: 4, max_steps: {steps}, warmup_steps: 10, learning_rate: 3e-3, num_epochs: 100,
  betas: [0.9, 0.95], log_interval: 10, eval_interval: {steps}, save_interval: 10}}
evaluate: {{max_sequences: 24}}
"""


def texts_of(path: Path) -> list[str]:
    """各篇。"""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def fuzzed(count: int, seed: int, texts: list[str]) -> list[str]:
    """随机的文字：任意的码位，各种文字的区段，语料里剪下来拼在一起的。"""
    rng = random.Random(seed)
    planes = [(0x20, 0x7F), (0x4E00, 0x9FFF), (0x3040, 0x30FF), (0xAC00, 0xD7A3), (0x400, 0x4FF),
              (0x600, 0x6FF), (0x900, 0x97F), (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF), (1, 0xD7FF),
              (0xE000, 0x10FFFF)]  # fmt: skip
    found = []
    for number_ in range(count):
        length = rng.randint(1, 80)
        if number_ % 2:
            text = rng.choice(texts)
            cuts = (rng.randrange(len(text)) for _ in range(length // 8 + 1))
            found.append("".join(text[at : at + rng.randint(1, 12)] for at in cuts))
        else:
            low, high = rng.choice(planes)
            found.append("".join(chr(rng.randint(low, high)) for _ in range(length)))
    return found


def trimmed_size(texts: list[str], coverage: float) -> tuple[Record, int]:
    """切分与往返的记录，与裁剪出的词表的大小。"""
    import unicodedata

    from distillab.data.encoding import ArticleEncoder
    from distillab.models.tokenizer import load_tokenizer, vocab_limit
    from distillab.models.trimming import BpeRules

    full = load_tokenizer(RANKS)
    before = ArticleEncoder(full).encode(texts)
    counts = np.bincount(np.concatenate(before), minlength=vocab_limit(full))
    started = time.perf_counter()
    rules = BpeRules(full)
    kept = rules.kept(counts, coverage)
    with tempfile.TemporaryDirectory() as folder:
        small = rules.write(kept, Path(folder))
    seconds = time.perf_counter() - started
    after, old = ArticleEncoder(small).encode(texts), np.array(kept)
    same = sum(np.array_equal(a, old[b]) for a, b in zip(before, after, strict=True))
    found = fuzzed(10_000, 0, texts)
    ids = small(found, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    returned = small.batch_decode(ids, clean_up_tokenization_spaces=False)
    # Qwen 的分词器先做 NFC
    equal = sum(a == unicodedata.normalize("NFC", b) for a, b in zip(returned, found, strict=True))
    record = {
        "section": "segmentation",
        "implementation": "trimmed",
        "coverage": coverage,
        "documents": len(texts),
        "documents_alike": same,
        "tokens": sum(map(len, before)),
        "tokens_after": sum(map(len, after)),
        "bytes": sum(len(text.encode()) for text in texts),
        "vocabulary_before": len(full),
        "vocabulary": len(kept),
        "used": int((counts > 0).sum()),
        "fuzzed": len(found),
        "fuzzed_alike": equal,
        "trimming_seconds": seconds,
    }
    return record, len(kept)


# ------------------------------------------------------------------ 速度与内存


def work(role: Record) -> None:
    """被测的进程：两个模型各走一步，来一行走一步。"""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from distillab.batch import collate_text
    from distillab.config.model_sections import ModelConfig
    from distillab.config.schema import LossConfig
    from distillab.models.interface import PretrainedLM
    from distillab.models.student import StudentModel
    from distillab.teachers.in_process import LocalTeacher
    from distillab.train.module import DistillationModule
    from distillab.vocabulary import Vocabulary

    channel, size = open_channel(), role["vocab"]
    torch.manual_seed(0)
    reset_peak("cpu")
    config = Qwen2Config(
        vocab_size=size, hidden_size=896, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, intermediate_size=4864, max_position_embeddings=512,
        tie_word_embeddings=True,
    )  # fmt: skip
    teacher = LocalTeacher(PretrainedLM(Qwen2ForCausalLM(config)))
    student = StudentModel(ModelConfig(vocab_size=size))
    module = DistillationModule(student, LossConfig(), Vocabulary(size)).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    ids = torch.randint(size, (role["batch"], role["length"]))
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1)
    items = [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]
    batch = collate_text(items, vocabulary=Vocabulary(size))
    send(channel, {
        "student_parameters": student.num_parameters(),
        "teacher_parameters": teacher.model.num_parameters(),
    })  # fmt: skip
    for _ in sys.stdin:
        started = time.process_time()
        targets = teacher.targets(batch.teacher, Vocabulary(size))
        (module(batch, targets).total / len(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize("cpu")
        send(channel, {"seconds": time.process_time() - started, "peak": read_peak("cpu")})


def speed(sizes: dict[str, int], options: argparse.Namespace) -> list[Record]:
    """两种词表轮流走几步；时间是进程的 CPU 时间，与别的工作共用一台机器也说得清。"""
    peaks: dict[str, int] = {}

    class Peaked(Worker):
        def ask(self) -> Record:
            report = super().ask()
            peaks[self.name] = max(report["peak"], peaks.get(self.name, 0))
            return report

    def start(name: str) -> Worker:
        worker = Peaked({"vocab": sizes[name], "batch": options.batch, "length": options.length})
        worker.name = name  # type: ignore[attr-defined]
        return worker

    reports, seconds = take_turns(start, VARIANTS, "building", options.rounds, warm_up=1)
    return [
        {
            "section": "speed",
            "implementation": name,
            "vocabulary": sizes[name],
            "tokens_per_second": options.batch * options.length / statistics.median(seconds[name]),
            "seconds": seconds[name],
            "peak_bytes": peaks[name],
            "batch": options.batch,
            "length": options.length,
            **reports[name],
        }
        for name in reports
    ]


# ------------------------------------------------------------------ 同样的文字学得怎样


def run(folder: Path, *arguments: str) -> None:
    """一条 distillab 命令，一个线程。"""
    command = [sys.executable, "-m", "distillab", *arguments]
    subprocess.run(command, cwd=folder, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def quality(text: Path, options: argparse.Namespace) -> list[Record]:
    """一个小教师，由它蒸馏出的两个学生；成绩取自 ``evaluation.json``。"""
    folder = options.work
    folder.mkdir(parents=True, exist_ok=True)

    def recipe(name: str, kind: str, steps: int, more: str, trim: bool = False) -> None:
        filled = RECIPE.format(
            tokenizer=RANKS,
            config=SHAPES[kind],
            vocab="{keep: corpus}" if trim else "null",
            text=text.resolve(),
            steps=steps,
        )
        (folder / f"{name}.yaml").write_text(filled + more)
        run(folder, "train", f"{name}.yaml", "--resume")

    recipe("teacher", "teacher", options.teacher_steps, "loss: {alpha: 0}\n")
    found = []
    for name in VARIANTS:
        more = "teacher: {path: runs/teacher/export}\nloss: {alpha: 0.5, temperature: 1.0}\n"
        recipe(name, "student", options.steps, more, trim=name == "trimmed")
    for name in VARIANTS:
        run(folder, "evaluate", name)
        directory = folder / "runs" / name
        summary = json.loads((directory / "summary.json").read_text())
        measured = json.loads((directory / "evaluation.json").read_text())
        models = measured["texts"]["validation"]["models"]
        found.append({
            "section": "quality",
            "implementation": name,
            "bits_per_byte": models["student_after"]["bits_per_byte"],
            "teacher_bits_per_byte": models["teacher"]["bits_per_byte"],
            "tokens": summary["tokens"],
            "seconds": summary["seconds"],
            "tokens_per_second": summary["tokens_per_second"],
            "peak_bytes": summary["peak_memory_bytes"],
            "parameters": summary["parameters"],
            "vocabulary": summary.get("vocabulary"),
        })  # fmt: skip
    return found


# ------------------------------------------------------------------ 命令行


def show(records: list[Record]) -> None:
    """印成表。"""
    for section in SECTIONS:
        rows = [record for record in records if record["section"] == section]
        if not rows:
            continue
        if section == "segmentation":
            for row in rows:
                print(json.dumps({k: v for k, v in row.items() if k != "section"}, indent=1))
            continue
        table = Table(title=section)
        for column in ("vocabulary", "parameters", "tokens/s", "peak GiB", "bits per byte"):
            table.add_column(column, justify="right")
        for row in rows:
            parameters = row.get("student_parameters") or row["parameters"]["student"]
            bits: Any = row.get("bits_per_byte") or {}
            table.add_row(
                row["implementation"],
                f"{parameters:,}",
                number(row["tokens_per_second"], ".1f"),
                number(row["peak_bytes"], ".2f", 2**30),
                number(bits.get("value"), ".4f"),
            )
        Console(width=100).print(table)


def parse(arguments: list[str]) -> argparse.Namespace:
    """命令行。"""
    parser = argparse.ArgumentParser(
        description="The student's own vocabulary beside the whole one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("text", type=Path, help="jsonl with a text in each line")
    add("--section", action="append", choices=SECTIONS, help="default: all")
    add("--coverage", type=float, default=1.0)
    add("--batch", type=int, default=1, help="sequences of a step in speed")
    add("--length", type=int, default=256, help="tokens of each")
    add("--rounds", type=int, default=3)
    add("--teacher-steps", type=int, default=120, help="of 1,020 tokens, in quality")
    add("--steps", type=int, default=120, help="the students'")
    add("--work", type=Path, default=Path("trimmed-vocabulary"), help="runs of quality")
    add("--json", type=Path, metavar="FILE", help="write the records to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """量完各段，印表；切分或往返有不同则返回 1。"""
    if arguments[:1] == ["--role"]:
        work(json.loads(arguments[1]))
        return 0
    options = parse(arguments)
    sections = options.section or list(SECTIONS)
    record, size = trimmed_size(texts_of(options.text), options.coverage)
    records = [record]
    if "speed" in sections:
        records += speed({"full": ROWS, "trimmed": size}, options)
    if "quality" in sections:
        records += quality(options.text, options)
    show(records)
    if options.json:
        about = environment("cpu")
        save(options.json, [each | about for each in records], ["section", "coverage"])
    exact = options.coverage < 1 or record["documents_alike"] == record["documents"]
    return 0 if exact and record["fuzzed_alike"] == record["fuzzed"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
