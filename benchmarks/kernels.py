"""损失的 Triton kernel：不要 GPU，为几代卡编译，报告寄存器、溢出、共享内存与每个元素的指令数；
以及整个损失要搬多少字节，由形状数出。

    python benchmarks/kernels.py
    python benchmarks/kernels.py --arch 90 --json kernels.json
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from markdown_table import markdown_table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from distillab.loss import kernels
from distillab.loss.chunking import GROUP, Chunking, budget_bytes
from distillab.loss.products import FP16_GRADIENT_SCALE

VOCAB = 151_936
CASES = (("forward_kl", 1.0, 1.0), ("forward_kl", 0.5, 2.0), ("reverse_kl", 0.5, 2.0),
         ("jsd", 1.0, 1.0), ("jsd", 0.5, 2.0), ("skew_reverse_kl", 0.5, 2.0))  # fmt: skip
"""divergence、alpha、T；alpha 为 1 时不看标签。"""

THREADS, REGISTERS = {75: 1024, 80: 2048, 90: 2048}, 65536
"""一个 SM 最多同时几个线程、几个寄存器。"""


def compiled(arch: int, divergence: str, alpha: float, temperature: float) -> dict[str, Any]:
    """为 ``arch`` 编译一种 kernel：寄存器、溢出与共享内存的字节、各遍每个元素的指令。"""
    half = "*fp16" if arch < 80 else "*bf16"
    pointers = {"student": "*fp32", "teacher": "*fp32", "gradient": half, "values": "*fp32"}
    if alpha < 1:
        pointers["labels"] = "*i64"
    constants = {
        "DIVERGENCE": divergence, "MIX": 0.1 if divergence.startswith("skew") else 0.5,
        "ALPHA": alpha, "TEMPERATURE": temperature, "SMOOTHING": 0.0, "ABSENT": 0,
        "SCALE": 1.0, "SOFTCAP": None, "TEACHER_SCALE": 1.0, "TEACHER_SOFTCAP": None,
        "FACTOR": FP16_GRADIENT_SCALE if arch < 80 else 1.0, "BLOCK": kernels.BLOCK,
    }  # fmt: skip
    names = kernels.distil_rows.arg_names
    integers = dict.fromkeys(("stride", "vocab", "rows"), "i32")
    types = {name: (pointers | integers).get(name, "constexpr") for name in names}
    constants |= {name: None for name in names if types[name] == "constexpr"} | constants
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name == "stride" or (name in pointers and name != "labels")
    }
    result = triton.compile(
        ASTSource(kernels.distil_rows, types, constants, aligned),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": kernels.WARPS, "enable_fp_fusion": True},
    )
    return {
        "arch": arch, "divergence": divergence, "alpha": alpha, "temperature": temperature,
        "shared": result.metadata.shared, **assembled(result.asm["ptx"]),
        "instructions": instructions(result.asm["cubin"]),
    }  # fmt: skip


def tools(name: str) -> list[Path]:
    """Triton 自带的 CUDA 工具；新的卡有另外一份 ``ptxas``。"""
    return sorted((Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob(f"{name}*"))


def assembled(ptx: str) -> dict[str, int]:
    """``ptxas -v`` 说的：``registers`` 与 ``spilled``（字节）。"""
    architecture = re.search(r"\.target (\w+)", ptx)
    assert architecture
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        for tool in tools("ptxas"):
            command = [tool, "-v", f"--gpu-name={architecture[1]}", path, "-o", "/dev/null"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                break
        else:
            raise SystemExit(done.stderr)
    spilled = [int(size) for size in re.findall(r"(\d+) bytes spill", done.stderr)]
    registers = re.search(r"Used (\d+) registers", done.stderr)
    assert registers
    return {"registers": int(registers[1]), "spilled": sum(spilled)}


def instructions(cubin: bytes) -> list[float]:
    """机器码里各个循环（kernel 的各遍）的指令数，除以一个线程一次处理的元素数。"""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [*tools("nvdisasm")[:1], "-c", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    labels, code = {}, []
    for line in done.stdout.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*);", line):
            code.append(found[1])
    each = kernels.BLOCK / (32 * kernels.WARPS)
    loops = []
    for index, line in enumerate(code):
        jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if jump and labels.get(jump[1], len(code)) < index:
            loops.append(round((index + 1 - labels[jump[1]]) / each, 1))
    return loops


def traffic(
    rows: int, vocab: int, student_width: int, teacher_width: int, passes: int
) -> dict[str, dict[str, float]]:
    """一次损失与梯度（bf16）读写的 GB，之前的与现在的；``passes`` 是 kernel 读几遍 logits。"""
    elements = rows * vocab / 1e9
    student, teacher = 2 * vocab * student_width / 1e9, 2 * vocab * teacher_width / 1e9
    accumulator = 2 * 4 * vocab * student_width / 1e9
    memory = 80 * 2**30
    now = Chunking.of(rows, vocab, 8, 2, "cuda", budget_bytes("cuda", memory, True), True)
    chunks, groups = -(-rows // now.size), -(-rows // now.group)
    before = -(-rows // Chunking.of(rows, vocab, 8, 2, "cuda", 512 * 2**20).size)
    return {
        "logits written": {"before": 8 * elements, "now": 8 * elements},
        "heads read for them": {
            "before": before * (student + teacher),
            "now": chunks * (student + teacher),
        },
        "row arithmetic": {
            # amax、log Σ exp 各两份；expm1 写出两份中间结果；求和再读；写梯度；转成半精度
            "before": (8 + 8 + 16 + 16 + 12 + 6) * elements,
            "now": (8 * passes + 2) * elements,
        },
        "gradient read by two products": {"before": 4 * elements, "now": 4 * elements},
        "head read for d hidden": {"before": before * student, "now": groups * student},
        "d weight accumulated": {"before": before * accumulator, "now": groups * accumulator},
        "d weight zeroed, scaled": {"before": 1.5 * accumulator, "now": 1.5 * accumulator},
    }


def main() -> None:
    """各代卡的表，再是字节的表。"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=[75, 80, 90])
    parser.add_argument("--cases", type=int, nargs="+", default=range(len(CASES)))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = [compiled(arch, *CASES[index]) for arch in options.arch for index in options.cases]
    header = ("kernel", "sm", "registers", "spilled bytes", "shared bytes", "programs an SM",
              "instructions an element, pass by pass")  # fmt: skip
    body = [
        (f"{one['divergence']}, alpha {one['alpha']:g}, T {one['temperature']:g}", str(one["arch"]),
         str(one["registers"]), str(one["spilled"]), str(one["shared"]), str(together(one)),
         " + ".join(f"{count:g}" for count in one["instructions"]))
        for one in found
    ]  # fmt: skip
    print(markdown_table(header, body))
    for name, passes in (("forward_kl", 2), ("jsd", 3)):
        parts = traffic(4096, VOCAB, 512, 896, passes)
        totals = {when: sum(part[when] for part in parts.values()) for when in ("before", "now")}
        body = [
            (part, *(f"{size[when]:.1f}" for when in ("before", "now")))
            for part, size in (parts | {"GB": totals}).items()
        ]
        for rate in (3.0, 4.8):
            times = (f"{totals[when] / rate:.1f}" for when in ("before", "now"))
            body.append((f"ms at {rate:g} TB/s, nothing but bytes", *times))
        print(f"\n{name}, groups of {GROUP} chunks\n")
        print(markdown_table((name, "before", "now"), body))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))


def together(one: dict[str, Any]) -> int:
    """一个 SM 放得下几个 program。"""
    threads = 32 * kernels.WARPS
    rounded = -(-one["registers"] // 8) * 8
    return int(min(THREADS[one["arch"]] // threads, REGISTERS // (rounded * threads)))


if __name__ == "__main__":
    main()
