"""「显存与时间」页的表：由 ``distillab.memory`` 算出，旁边是 ``benchmarks/results`` 里测到的。"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from markdown_table import markdown_table

from distillab.config import ModelConfig
from distillab.memory import SHAPES, Shape, Step

RECORDS = Path(__file__).parents[1] / "benchmarks" / "results"
GIB = 2**30

STUDENT = Shape.of(ModelConfig())
WIKI_ZH = Step(STUDENT, SHAPES["Qwen2.5-0.5B"], 8 * 512, precision="fp16", teacher_precision="fp16")
QWEN3_CHAT = Step(
    SHAPES["Qwen3-0.6B"], SHAPES["Qwen3-4B"], 4 * 1024,
    precision="bf16", teacher_precision="bf16", checkpointing=True,
)  # fmt: skip
EXPERIENCE = Step(
    SHAPES["Qwen3-8B"], SHAPES["Qwen3-8B"], 2 * 4096,
    precision="bf16", teacher_precision="bf16", checkpointing=True, shards=8,
)  # fmt: skip
LORA = replace(EXPERIENCE, teacher=None, shards=1, lora_rank=32, base_precision="bf16")
PARTS = {
    "student weights": "学生权重",
    "gradients": "梯度",
    "optimizer": "AdamW 的 m 与 v",
    "student activations": "学生激活值",
    "autocast weights": "autocast 的半精度权重",
    "gathered weights": "收齐的一层",
    "teacher weights": "教师权重",
    "teacher forward": "教师前向",
    "loss": "损失的缓冲区与 hidden state",
}
SEED = {
    "student weights": "~0.5 GB",
    "gradients": "~0.5 GB",
    "optimizer": "~1.0 GB",
    "student activations": "~3-4 GB",
    "teacher weights": "~1.0 GB",
    "teacher forward": "~2-3 GB",
}
"""最初的估算，逐行对照。"""


def t4() -> str:
    """``wiki-zh`` 在一块 T4 上，旁边是最初的估算。"""
    parts = WIKI_ZH.memory()
    rows = [
        [PARTS[name], SEED.get(name, "未列"), _gib(parts[name])] for name in PARTS if name in parts
    ]
    rows += [["PyTorch 开销（CUDA context、碎片）", "~1 GB", "不计算"]]
    rows += [["**合计**", "**~9-11 GB**", f"**{_gib(sum(parts.values()))}**"]]
    return markdown_table(["部分", "最初的估算", "算出"], rows)


def eight() -> str:
    """一块或八块 80 GB 的卡，每块卡上的字节数。"""
    steps = {
        "`qwen3-chat`，1 块": QWEN3_CHAT,
        "`experience/skd`，8 块 ZeRO-3 / FSDP2": EXPERIENCE,
        "同一任务，`student.lora` rank 32，1 块": LORA,
    }
    found = {name: step.memory() for name, step in steps.items()}
    rows = [
        [label, *(_gib(parts[part]) if part in parts else "" for parts in found.values())]
        for part, label in PARTS.items()
    ]
    rows += [["**合计**", *(f"**{_gib(sum(parts.values()))}**" for parts in found.values())]]
    rows += [["（完整 logits 另要）", *(_gib(step.dense_logits()) for step in steps.values())]]
    return markdown_table(["每块卡", *steps], rows)


def measured() -> str:
    """测到的一步，与同样形状算出的。"""
    steps = {
        "a": ("SmolLM2-135M -> 15 层，4 x 256",
              Step(Shape(576, 15, 9, 3, 64, 1536, 49152), SHAPES["SmolLM2-135M"], 4 * 256)),
        "b": ("Qwen2.5-0.5B -> 123.4M，1 x 512", Step(STUDENT, SHAPES["Qwen2.5-0.5B"], 512)),
    }  # fmt: skip
    rows = []
    for record in json.loads((RECORDS / "train_step-cpu.json").read_text()):
        if record["implementation"] == "distillab":
            label, step = steps[record["case"]]
            parts = step.memory("cpu")
            kept = ("student weights", "teacher weights", "optimizer")
            computed = sum(size for name, size in parts.items() if name not in kept)
            operations = sum(step.operations(record["seq_len"]).values())
            rows.append([
                label, _gib(computed), _gib(record["extra_bytes"]),
                f"{operations / 1e12:.2f}", f"{record['seconds']:.2f}",
                f"{operations / record['seconds'] / 1e9:.0f}", record["date"],
            ])  # fmt: skip
    header = ["一步，fp32，2 个 CPU 核", "算出", "测到", "TFLOP", "秒", "GFLOP/s", "日期"]
    return markdown_table(header, rows)


def lora() -> str:
    """LoRA 学生兼作自己的教师，与另放一份基座。"""
    rows = []
    for record in json.loads((RECORDS / "lora_memory-cpu.json").read_text()):
        shape = Shape(
            record["hidden_size"], record["layers"], record["heads"], record["kv_heads"],
            record["hidden_size"] // record["heads"], record["ffn"], record["vocab"],
        )  # fmt: skip
        copies = 1 if record["teacher"] == "self" else 2
        step = Step(shape, None, 1, lora_rank=record["rank"])
        computed = shape.parameters * 4 * copies + step.trained * 4
        name = "学生自己，关掉 adapter" if copies == 1 else "另一份基座"
        rows.append([name, _gib(computed), _gib(record["weight_bytes"]),
                     _gib(record["peak_bytes"]), record["date"]])  # fmt: skip
    return markdown_table(
        ["教师", "权重，算出", "权重，测到", "整个进程的峰值，测到", "日期"], rows
    )


def operations() -> str:
    """每步的运算量；时间由它与持续算力得出。"""
    cases = (
        ("`wiki-zh`，8 x 512", WIKI_ZH, 512),
        ("`qwen3-chat`，4 x 1024", QWEN3_CHAT, 1024),
        ("`experience/skd`，每块卡 2 x 4096", EXPERIENCE, 4096),
    )
    rows = []
    for name, step, seq_len in cases:
        found = step.operations(seq_len)
        total = sum(found.values())
        parts = [f"{found[part] / total:.0%}" for part in ("student", "teacher", "heads")]
        rows.append([name, f"{total / 1e12:.2f}", *parts])
    return markdown_table(
        ["一个 micro-batch", "TFLOP", "学生模型体", "教师模型体", "两个词表投影"], rows
    )


TABLES: dict[str, Callable[[], str]] = {
    "t4": t4, "eight": eight, "measured": measured, "lora": lora, "operations": operations,
}  # fmt: skip


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
