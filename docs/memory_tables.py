"""「显存与时间」的表：由 ``distillab.plan.memory`` 算出，旁边是 ``benchmarks`` 里的记录。"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from markdown_table import markdown_table

from distillab.config.model_sections import ModelConfig
from distillab.config.recipes import load_recipe
from distillab.plan.hardware import GPUS
from distillab.plan.memory import Step
from distillab.plan.plan import plan
from distillab.plan.shapes import SHAPES, Shape

RECORDS = Path(__file__).parents[1] / "benchmarks" / "results"
GIB = 2**30

STUDENT = Shape.of(ModelConfig())
WIKI_ZH = plan(load_recipe("wiki-zh"), GPUS["t4"])
EIGHT = {
    "`qwen3-chat`，1 块": plan(load_recipe("qwen3-chat"), GPUS["h100"]),
    "`experience/skd`，8 块 FSDP2": plan(load_recipe("experience/skd"), GPUS["h100"], 8, "fsdp2"),
    "同一配方，`student.lora` rank 32，1 块": plan(
        load_recipe("experience/skd", ["student.lora={rank: 32, dtype: bfloat16}"]), GPUS["h100"]
    ),
}
PARTS = {
    "student weights": "学生权重",
    "gradients": "梯度",
    "optimizer": "AdamW 的 m 与 v",
    "student activations": "学生激活值",
    "autocast weights": "autocast 的半精度权重",
    "teacher weights": "教师权重",
    "teacher forward": "教师前向",
    "loss": "损失的缓冲区与 hidden state",
    "communication": "收齐的两层与 head，或梯度的桶",
    "overhead": "PyTorch 开销（CUDA context、碎片）",
}
SEED = {
    "student weights": "~0.5 GB",
    "gradients": "~0.5 GB",
    "optimizer": "~1.0 GB",
    "student activations": "~3-4 GB",
    "teacher weights": "~1.0 GB",
    "teacher forward": "~2-3 GB",
    "overhead": "~1 GB",
}
"""最初的估算，逐行对照。"""


def t4() -> str:
    """``wiki-zh`` 在一块 T4 上，旁边是最初的估算。"""
    parts, largest = WIKI_ZH.parts, WIKI_ZH.largest
    rows = [
        [PARTS[name], SEED.get(name, "未列"), _gib(parts.get(name, 0)), _gib(largest[name])]
        for name in PARTS
        if name in largest
    ]
    rows += [["**合计**", "**~9-11 GB**", f"**{_gib(WIKI_ZH.total)}**", ""]]
    return markdown_table(["部分", "最初的估算", "峰值那一刻", "自己最多时"], rows)


def eight() -> str:
    """一块或八块 80 GB 的卡，峰值那一刻每块卡上的字节数。"""
    rows = [
        [label, *(_gib(x.parts[part]) if x.parts.get(part) else "" for x in EIGHT.values())]
        for part, label in PARTS.items()
    ]
    rows += [["**合计**", *(f"**{_gib(x.total)}**" for x in EIGHT.values())]]
    rows += [["（完整 logits 另要）", *(_gib(_dense_logits(x.step)) for x in EIGHT.values())]]
    return markdown_table(["每块卡", *EIGHT], rows)


def measured() -> str:
    """测到的一步的时间，与同样形状的运算量。"""
    steps = {
        "a": ("SmolLM2-135M -> 15 层，4 x 256",
              Step(Shape(576, 15, 9, 3, 64, 1536, 49152), SHAPES["SmolLM2-135M"], 4, 256)),
        "b": ("Qwen2.5-0.5B -> 123.4M，1 x 512", Step(STUDENT, SHAPES["Qwen2.5-0.5B"], 1, 512)),
    }  # fmt: skip
    rows = []
    for record in json.loads((RECORDS / "train_step-cpu.json").read_text()):
        if record["implementation"] == "distillab":
            label, step = steps[record["case"]]
            operations = sum(step.operations().values())
            rows.append([
                label, f"{operations / 1e12:.2f}", f"{record['seconds']:.2f}",
                f"{operations / record['seconds'] / 1e9:.0f}", record["date"],
            ])  # fmt: skip
    return markdown_table(["一步，fp32，2 个 CPU 核", "TFLOP", "秒", "GFLOP/s", "日期"], rows)


def planned() -> str:
    """``benchmarks/plan.py`` 的记录：算出的峰值与测到的。"""
    rows = [
        [record["planned"], f"`{record['recipe']}`", _gib(record["planned_bytes"]),
         _gib(record["peak_bytes"]), f"{record['ratio']:.2f}"]
        for record in json.loads((RECORDS / "plan-cpu.json").read_text())
    ]  # fmt: skip
    return markdown_table(["情形", "配方", "算出", "测到", "算出 / 测到"], rows)


def lora() -> str:
    """LoRA 学生兼作自己的教师，与另放一份基座。"""
    rows = []
    for record in json.loads((RECORDS / "lora_memory-cpu.json").read_text()):
        shape = Shape(
            record["hidden_size"], record["layers"], record["heads"], record["kv_heads"],
            record["hidden_size"] // record["heads"], record["ffn"], record["vocab"],
        )  # fmt: skip
        copies = 1 if record["teacher"] == "self" else 2
        step = Step(shape, None, 1, 1, lora_rank=record["rank"])
        computed = shape.parameters * 4 * copies + step.trained * 4
        name = "学生自己，关掉 adapter" if copies == 1 else "另一份基座"
        rows.append([name, _gib(computed), _gib(record["weight_bytes"]),
                     _gib(record["peak_bytes"]), record["date"]])  # fmt: skip
    return markdown_table(
        ["教师", "权重，算出", "权重，测到", "整个进程的峰值，测到", "日期"], rows
    )


def operations() -> str:
    """每步的运算量；时间由它与持续算力得出。"""
    rows = []
    for found in (WIKI_ZH, *EIGHT.values()):
        step = found.step
        counts = step.operations()
        total = sum(counts.values())
        parts = [f"{counts[part] / total:.0%}" for part in ("student", "teacher", "heads")]
        name = f"`{found.recipe.name}`，{step.batch_size} x {step.seq_len}"
        name += "，LoRA" * (step.lora_rank is not None)
        rows.append([name, f"{total / 1e12:.2f}", *parts])
    return markdown_table(
        ["一个 micro-batch", "TFLOP", "学生模型体", "教师模型体", "两个词表投影"], rows
    )


TABLES: dict[str, Callable[[], str]] = {
    "t4": t4, "eight": eight, "planned": planned, "measured": measured, "lora": lora,
    "operations": operations,
}  # fmt: skip


def _dense_logits(step: Step) -> int:
    """若把两个模型的 logits 以 float32 整个放下要多少字节；distillab 从不这样做。"""
    both = step.student.vocab_size + (step.teacher.vocab_size if step.teacher else 0)
    return both * step.response_rows * 4


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
