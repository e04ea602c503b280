"""``distillab plan`` 认得的设备：装得下多少，标称多快，估时间时按标称的几成。"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import psutil

from ..errors import DistillabError, nearest

GIB = 2**30
TERA = 1e12


@dataclass(frozen=True)
class Device:
    """一个进程用的设备。

    Attributes:
        name: 命令行上的名字。
        memory: 可用的字节数；GPU 是 PyTorch 报告的容量，比标称的少一点。
        flops: 计算精度 -> 标称的浮点运算每秒（稠密矩阵乘）；没有的精度就是不支持。
        bandwidth: 内存带宽，字节每秒。
        efficiency: 估时间时持续的是标称的几成。
        overhead: 库、CUDA context 与分配器碎片占的字节数。
        basis: 上面几个数与 ``efficiency`` 的依据，一句英文。
    """

    name: str
    memory: int
    flops: Mapping[str, float]
    bandwidth: float
    efficiency: float
    overhead: int
    basis: str

    @property
    def kind(self) -> str:
        """``cpu`` 或 ``cuda``。"""
        return "cpu" if self.name == "cpu" else "cuda"

    def shared_by(self, processes: int) -> Device:
        """``processes`` 个进程时各自的一份：GPU 每个进程一块，CPU 与它的内存大家分。"""
        if self.kind == "cuda":
            return self
        flops = {name: rate / processes for name, rate in self.flops.items()}
        return replace(self, memory=self.memory // processes, flops=flops,
                       bandwidth=self.bandwidth / processes)  # fmt: skip


def _gpu(name: str, gib: float, tflops: Mapping[str, float], gb_per_s: int, share: float,
         basis: str) -> Device:  # fmt: skip
    rates = MappingProxyType({precision: rate * TERA for precision, rate in tflops.items()})
    return Device(name, int(gib * GIB), rates, gb_per_s * 1e9, share, GIB, basis)


_LARGE = (
    "Llama 3 405B reached 38-43 % of an H100 in bf16 (arXiv:2407.21783); smaller models and "
    "micro-batches reach less"
)
GPUS: Mapping[str, Device] = MappingProxyType(
    {
        device.name: device
        for device in (  # nvidia.com/en-us/data-center/{tesla-t4,a100,h100,h200}，SXM，不计稀疏
            _gpu("t4", 14.7, {"fp32": 8.1, "fp16": 65}, 320, 0.25,
                 "a T4 has 70 W: its nominal rate does not last; not measured"),
            _gpu("a100-80g", 79.1, {"fp32": 19.5, "bf16": 312, "fp16": 312}, 2039, 0.35, _LARGE),
            _gpu("h100", 79.1, {"fp32": 67, "bf16": 989, "fp16": 989}, 3350, 0.35, _LARGE),
            _gpu("h200", 139.7, {"fp32": 67, "bf16": 989, "fp16": 989}, 4800, 0.35, _LARGE),
        )
    }
)  # fmt: skip

CORE_FLOPS = 50e9
"""一个 CPU 核持续的 float32 运算每秒：``benchmarks/results/train_step-cpu.json`` 两核约 1e11。"""

CPU_BANDWIDTH = 4e9
"""采样时持续的字节每秒：``benchmarks/results/sampling-cpu.json`` 8 行每步读一遍 0.5 GB 的权重。"""

CPU_OVERHEAD = int(0.55 * GIB)
"""Python、PyTorch、transformers 与编译器常驻的内存，``benchmarks/plan.py`` 量到的。"""


def find_device(name: str | None) -> Device:
    """由名字得到设备；缺省是这台机器：有 GPU 时是它，没有就是 CPU。

    Raises:
        DistillabError: 没有这个名字。
    """
    if name is not None and name in GPUS:
        return GPUS[name]
    if name is not None and name != "cpu":
        choices = [*GPUS, "cpu"]
        raise DistillabError(f"--device {name}: unknown device; {nearest(name, choices)}")
    if name is None and (here := _this_gpu()) is not None:
        return here
    rate = CORE_FLOPS * (os.cpu_count() or 1)
    return Device(
        "cpu", psutil.virtual_memory().total, {"fp32": rate, "bf16": rate}, CPU_BANDWIDTH, 1.0,
        CPU_OVERHEAD, "50 GFLOP/s a core were measured (benchmarks/README.md)",
    )  # fmt: skip


def _this_gpu() -> Device | None:
    """这台机器的 GPU：容量由 PyTorch 报告，速度取名字里有的那一款，没有就取 A100 的。"""
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    known = next((gpu for key, gpu in GPUS.items() if key.partition("-")[0].upper() in found.name),
                 GPUS["a100-80g"])  # fmt: skip
    return replace(known, memory=found.total_memory)
