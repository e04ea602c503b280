"""``distillab plan`` 说的峰值，与真的走一步量到的。

每种情形是一份随包的配方加几个覆盖项，各有自己的进程：按算出的形状造随机权重的模型与算出的那么长的
数据，用真正的 ``DistillationTrainer`` 走几步，量最后一步比库都导入、损失编译好之后多占的内存。

    python benchmarks/plan.py --json benchmarks/results/plan-cpu.json
    python benchmarks/plan.py --cases quickstart lora
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import (
    Record,
    Worker,
    choose_device,
    environment,
    open_channel,
    read_peak,
    reset_peak,
    save,
    send,
    synchronize,
)
from rich.console import Console
from rich.table import Table

CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "quickstart": ("quickstart", ("train.precision=fp32",)),
    "checkpointing": (
        "quickstart",
        ("train.precision=fp32", "train.batch_size=4", "train.activation_checkpointing=true"),
    ),
    "bf16": ("quickstart", ("train.precision=bf16",)),
    "cross-entropy": ("quickstart", ("train.precision=fp32", "loss.alpha=0")),
    "accumulation": (
        "quickstart",
        ("train.precision=fp32", "train.gradient_accumulation_steps=2"),
    ),
    "from scratch": (
        "wiki-zh",
        ("train.precision=fp32", "teacher.dtype=bfloat16", "train.batch_size=1"),
    ),
    "two views": ("experience/demo-skd", ("train.batch_size=4",)),
    "sampling": (
        "experience/demo-gkd",
        ("responses.student_fraction=1.0", "train.batch_size=4"),
    ),
    "LoRA": ("experience/demo-skd", ("student.lora={rank: 16}", "train.batch_size=4")),
    "LoRA, 0.5B": (
        "experience/demo-skd",
        (
            "student={path: Qwen/Qwen2.5-0.5B, lora: {rank: 8}}",
            "student.sha256=null", "teacher.path=Qwen/Qwen2.5-0.5B", "teacher.sha256=null",
            "train.batch_size=2",
        ),
    ),
    "LoRA, bf16 base": (
        "qwen3-chat",
        (
            "student.path=Qwen/Qwen3-0.6B", "teacher.path=Qwen/Qwen3-0.6B",
            "student.lora={rank: 16, dtype: bfloat16}", "train.precision=bf16",
            "train.activation_checkpointing=false", "data.max_seq_len=128", "train.batch_size=2",
        ),
    ),
}  # fmt: skip
"""名字 -> (配方, 覆盖项)。"""

BOUNDS = {"cpu": (0.67, 1.05), "cuda": (0.85, 1.15)}
"""算出的是测到的几成；CPU 上 malloc 留在堆里的不算。"""

STEPS = {"cpu": 2, "cuda": 6}
"""第一步建起 optimizer 的状态，最后一步才量；GPU 上中间还要录 CUDA graph。"""


class FakeTokenizer:
    """只有 ``TextGenerator`` 看的几样：没有停止 token，采样因而总是采满。"""

    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012 - 从不改
    eos_token_id = bos_token_id = None
    pad_token_id = 0
    name_or_path = "fake"

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def get_vocab(self) -> dict[str, int]:
        """每个 id 都有 token。"""
        return {str(index): index for index in range(self.size)}

    def get_added_vocab(self) -> dict[str, int]:
        """没有后加的。"""
        return {}

    def get_chat_template(self, **_: Any) -> str:
        """没有模板，``transformers`` 的也是这样说的。"""
        raise ValueError("no chat template")


def make_plan(case: str, device: str, more: Sequence[str] = ()) -> Any:
    """这种情形的打算；``more`` 是另加的覆盖项。"""
    from distillab.config.recipes import load_recipe
    from distillab.plan.hardware import find_device
    from distillab.plan.plan import plan

    recipe, overrides = CASES[case]
    found = load_recipe(recipe, [*overrides, *more])
    return plan(found, find_device("cpu" if device == "cpu" else None))


def make_models(found: Any, device: str) -> tuple[Any, Any]:
    """学生与给出目标的教师，随机权重；教师可以没有。"""
    from distillab.models.lora import add_lora
    from distillab.models.own_blocks import through_own_blocks
    from distillab.teachers.in_process import AdapterOffTeacher, LocalTeacher

    step, section = found.step, found.recipe.student
    if section.path is not None:
        student = pretrained(step.student, step.base_precision)
        if section.lora is not None:
            student = add_lora(student, section.lora)
    else:
        student = scratch(step.student)
    if step.teacher is None:
        return student, None
    if step.self_teacher:
        return student, AdapterOffTeacher(student)
    teacher = pretrained(step.teacher, step.teacher_precision)
    return student, LocalTeacher(through_own_blocks(teacher) if device == "cuda" else teacher)


def pretrained(shape: Any, precision: str) -> Any:
    """同样形状的 transformers 模型。"""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    from distillab.distributed.engine import DTYPES
    from distillab.models.interface import PretrainedLM

    kinds: Any = (LlamaConfig, LlamaForCausalLM)
    if shape.qkv_bias:
        kinds = (Qwen2Config, Qwen2ForCausalLM)
    if shape.qk_norm:
        kinds = (Qwen3Config, Qwen3ForCausalLM)
    config = kinds[0](
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=8192,
    )
    torch.set_default_dtype(DTYPES[precision])
    try:
        return PretrainedLM(kinds[1](config))
    finally:
        torch.set_default_dtype(torch.float32)


def scratch(shape: Any) -> Any:
    """同样形状的 ``StudentModel``。"""
    from distillab.config.model_sections import ModelConfig
    from distillab.models.student import StudentModel

    return StudentModel(
        ModelConfig(
            hidden_size=shape.hidden_size,
            num_layers=shape.num_layers,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            intermediate_size=shape.intermediate_size,
            vocab_size=shape.vocab_size,
        )
    )


def make_data(found: Any) -> tuple[list[Any], Any]:
    """一个 optimizer 步的数据与 collate：各条都有算出的那么长；对话有一条短一点，才有 padding。"""
    from functools import partial

    from distillab.batch import Example, Tokens, collate_examples, collate_text

    step = found.step
    count = step.batch_size * step.accumulation
    vocab = step.student.vocab_size
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(vocab, (length,), generator=generator).tolist()

    if found.recipe.data.format == "text":
        rows = [torch.tensor(ids(step.seq_len + 1)) for _ in range(count)]
        return [{"input_ids": row[:-1], "labels": row[1:]} for row in rows], collate_text
    response = min(step.response_rows // step.batch_size, step.seq_len - 1)
    examples = []
    for number in range(count):
        short = number % step.batch_size == 1
        own, answer = step.seq_len - response - short, ids(response)
        more = (step.teacher_seq_len or step.seq_len) - step.seq_len
        views = [
            Tokens(
                ids(max(1, before)) + answer, list(range(max(1, before), max(1, before) + response))
            )
            for before in (own, own + more)
        ]
        examples.append(Example(*views))
    return examples, partial(collate_examples, pad_id=0)


def warm_up(found: Any, device: str) -> None:
    """导入训练要用的一切，并以同样的行数与词表算一次很窄的损失：编译器的内存归在开销里。"""
    from transformers import LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM  # noqa: F401

    import distillab.train.trainer
    from distillab.loss.fused import fused_distillation_loss
    from distillab.targets import Head, HiddenTargets

    step = found.step
    rows, vocab = step.response_rows, step.student.vocab_size
    hidden = torch.randn(rows, 2, device=device, requires_grad=True)
    weight = torch.randn(vocab, 2, device=device, requires_grad=True)
    labels = torch.zeros(rows, dtype=torch.long, device=device)
    targets = HiddenTargets(hidden.detach(), Head(weight.detach()))
    sums = fused_distillation_loss(hidden, weight, labels, targets, found.recipe.loss)
    sums.total.backward()  # type: ignore[no-untyped-call]
    del distillab


def worker(case: str, device: str, more: Sequence[str] = ()) -> Record:
    """在自己的进程里走几步，量最后一步。"""
    logging.disable(logging.WARNING)
    found = make_plan(case, device, more)
    warm_up(found, device)
    baseline = reset_peak(device) or 0
    from distillab.generate.generator import TextGenerator
    from distillab.train.compilation import record_bodies
    from distillab.train.on_policy import OnPolicy
    from distillab.train.rollout import Rollout
    from distillab.train.trainer import DistillationTrainer

    torch.manual_seed(0)
    student, teacher = make_models(found, device)
    data, collate = make_data(found)
    recipe, step = found.recipe, found.step
    on_policy = None
    if step.sampling is not None:
        generator: Any = TextGenerator(student, FakeTokenizer(step.student.vocab_size))
        rollouts = [Rollout(generator, recipe.sampling)]
        on_policy = OnPolicy(rollouts, recipe.responses, collate, 0)
    with tempfile.TemporaryDirectory() as directory:
        trainer = DistillationTrainer(
            student, teacher, data, data, recipe.train.model_copy(update={"warmup_steps": 0}),
            directory, loss=recipe.loss, collate=collate, on_policy=on_policy,
        )  # fmt: skip
        size = step.batch_size
        window = [
            collate(data[start : start + size]).to(device) for start in range(0, len(data), size)
        ]
        read_by = None if teacher is None else teacher.model
        record_bodies(student, read_by, lambda: window[0], trainer._compute)  # 如 train()
        for number in range(STEPS[device]):
            if number == STEPS[device] - 1:
                current = reset_peak(device) or 0
                start = time.perf_counter()
            trainer._step(next(trainer._prepared(window)))
        synchronize(device)
        seconds = time.perf_counter() - start
        peak = read_peak(device)
    reserved = torch.cuda.max_memory_reserved() if device == "cuda" else None
    return {
        "reserved_bytes": reserved,
        "baseline_bytes": baseline,
        "kept_bytes": current - baseline,
        "peak_bytes": peak - baseline,
        "seconds": seconds,
    }


def measure(case: str, device: str) -> Record:
    """一种情形：算出的与量到的。"""
    with contextlib.closing(Worker([case, device])) as process:
        return compared(case, device, process.receive())


def compared(case: str, device: str, measured: Record, more: Sequence[str] = ()) -> Record:
    """``worker`` 量到的，与算出的。"""
    found = make_plan(case, device, more)
    parts = {name: size for name, size in found.parts.items() if name != "overhead"}
    recipe, overrides = CASES[case]
    return {
        "implementation": "plan",
        "planned": case,
        "recipe": recipe,
        "overrides": list(overrides),
        "device": device,
        "moment": found.moment,
        "parts": parts,
        "planned_bytes": sum(parts.values()),
        **measured,
        "ratio": sum(parts.values()) / measured["peak_bytes"],
        **environment(device),
    }


def show(records: list[Record]) -> None:
    """印成表。"""
    table = Table(title="peak of a step beyond the libraries, GiB")
    for column in (
        "case",
        "planned",
        "measured",
        "ratio",
        "kept",
        "baseline",
        "seconds",
        "peak in",
    ):
        table.add_column(column, justify="left" if column == "case" else "right", no_wrap=True)
    for record in records:
        table.add_row(
            record["planned"],
            f"{record['planned_bytes'] / 2**30:.2f}",
            f"{record['peak_bytes'] / 2**30:.2f}",
            f"{record['ratio']:.2f}",
            f"{record['kept_bytes'] / 2**30:.2f}",
            f"{record['baseline_bytes'] / 2**30:.2f}",
            f"{record['seconds']:.1f}",
            record["moment"],
        )
    Console(width=max(90, Console().width)).print(table)


def main(arguments: list[str]) -> int:
    """逐个量；返回退出码：有一个在 ``BOUNDS`` 之外就是 1。"""
    parser = argparse.ArgumentParser(description="Planned peak memory beside the measured one.")
    add = parser.add_argument
    add("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="which to measure")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--json", type=Path, metavar="FILE", help="merge the records into this file")
    add("--role", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.role:
        channel = open_channel()
        send(channel, worker(*json.loads(options.role)))
        return 0
    device = choose_device(options.device)
    records = []
    for case in options.cases:
        print(f"  {case}", flush=True)
        records.append(measure(case, device))
        if options.json:
            save(options.json, records[-1:], ["planned", "device"])
    show(records)
    low, high = BOUNDS[device]
    return int(any(not low <= record["ratio"] <= high for record in records))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
