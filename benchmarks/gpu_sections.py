"""``gpu.py`` 的各段；一段一个函数，量的东西在各个基准里，这里只是在一块 GPU 上依次走完。"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from gpu_processes import ForkedWorker, in_turn, run_forked
from gpu_runs import teacher_is
from gpu_work import Work
from measuring import Record, environment, open_channel, ratio, send, synchronize, version_of

LIBRARIES = ("torch", "triton", "transformers", "accelerate", "deepspeed", "liger-kernel", "trl")
LARGE_CARD = 40 * 2**30
"""显存少于它的卡，损失只算 1,024 行：几家一起热身才放得下。"""

RIGHT = 1e-2
"""同类的梯度相对误差不超过它的才算对，才与它比。"""


def machine(work: Work) -> None:
    """卡、驱动与各库的版本；实测的矩阵乘与复制的速率，此后各段与它比。"""
    cuda, size = work.device == "cuda", 256 if work.tiny else 8192
    half = torch.bfloat16 if cuda and torch.cuda.get_device_capability() >= (8, 0) else None
    dtype = half or (torch.float16 if cuda else torch.float32)
    square = torch.randn(size, size, device=work.device, dtype=dtype)
    flops = 2 * size**3 / seconds_of(lambda: square @ square, work.device)
    count = 2**20 if work.tiny else 2**30
    source = torch.empty(count, device=work.device, dtype=torch.uint8)
    copy = torch.empty_like(source)
    bandwidth = 2 * count / seconds_of(lambda: copy.copy_(source), work.device)
    found = environment(work.device) | {
        "half": "fp16" if dtype == torch.float16 else "bf16",
        "driver": driver() if cuda else None,
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "versions": {name: v for name in LIBRARIES if (v := version(name)) is not None},
        "flops": flops,
        "bandwidth": bandwidth,
    }
    kind = str(dtype).removeprefix("torch.")
    result = f"{flops / 1e12:.1f} TFLOP/s, copy {bandwidth / 1e12:.2f} TB/s"
    work.record("torch", f"{kind} {size}^3", result, **found)


def seconds_of(call: Callable[[], object], device: str, repeats: int = 20) -> float:
    """一次 ``call`` 的平均秒数，先空跑几次。"""
    for _ in range(5):
        call()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def version(package: str) -> str | None:
    """版本；在 ``PYTHONPATH`` 上而没有装的，是它自己说的。"""
    module = sys.modules.get(package.replace("-", "_"))
    return version_of(package) or getattr(module, "__version__", None)


def driver() -> str | None:
    """驱动的版本。"""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip()


def tests(work: Work) -> None:
    """``tests/gpu/checks.py`` 的每一项，各有自己的进程，几个一起走。"""
    from check_parts import Skip
    from checks import CHECKS

    def check(name: str) -> None:
        channel, started = open_channel(), time.perf_counter()
        try:
            said, status = CHECKS[name](work.device) or "passed", "ok"
        except Skip as skip:
            said, status = str(skip), "skipped"
        seconds = time.perf_counter() - started
        send(channel, {"said": said, "status": status, "seconds": seconds})

    together = max(1, min(8, (os.cpu_count() or 1) // 2))
    waiting = [name for name in CHECKS if not work.tiny or "," not in name]  # 逗号之后是变体
    running: dict[str, ForkedWorker] = {}
    while waiting or running:
        while waiting and len(running) < together:
            name = waiting.pop(0)
            running[name] = ForkedWorker(partial(check, name))
        for name in [name for name, worker in running.items() if worker.ready()]:
            worker = running.pop(name)
            found = worker.answer()
            worker.close()
            if "failed" in found:
                work.failure(name, "", found["failed"])
            else:
                result = f"{found['said']} ({found['seconds']:.1f} s)"
                work.record(name, "", result, found["status"], seconds=found["seconds"])
        time.sleep(0.02)


def make_cell(work: Work, precision: str | None = None) -> Any:
    """Case b：Qwen2.5-0.5B 的形状教 123M，8 x 512。"""
    from train_step_models import SHAPES, Cell

    batch_size, seq_len = SHAPES["b", work.scale]["size"][work.device]
    usual = "fp32" if work.device == "cpu" else work.machine.get("half", "bf16")
    kind: Any = precision or usual
    return Cell("b", work.scale, batch_size, seq_len, kind, 0.5, work.device, 0)


VARIANTS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "eager": (None, {"compile": False}),
    "graphs": (None, {"compile": "auto", "max_steps": 400}),
    "compiled + graphs": (None, {"compile": True}),
    "graphs, fp16": ("fp16", {"compile": "auto", "max_steps": 400}),
}
"""名字 -> (精度, ``train`` 的键)；``auto`` 在短的训练里只录 CUDA graph。"""

ON_A_CPU = ("eager", "graphs")
"""``--tiny`` 在 CPU 上走的；编译要几十秒。"""

NOT_HERE = ("distillab-compiled", "trl-defaults")
"""``train_step.LOOPS`` 里不在这里走的：GPU 上 ``distillab`` 自己就编译，激活不重算。"""


def step(work: Work) -> None:
    """Case b 的一步：几种走法，各自的主机与设备时间。"""
    from gpu_step import StepClock, operations, sentence
    from train_step_implementations import distillab_loop

    def measure(cell: Any, settings: dict[str, Any]) -> None:
        distillab_loop(cell, StepClock(work.device, open_channel()), **settings)

    chosen = VARIANTS if work.device == "cuda" else {name: VARIANTS[name] for name in ON_A_CPU}
    cells = {name: make_cell(work, precision) for name, (precision, _) in chosen.items()}
    calls = {name: partial(measure, cells[name], chosen[name][1]) for name in chosen}
    for name, first, rest in in_turn(calls, work.deadline, rounds=1):
        cell = cells[name]
        if "failed" in first:
            work.failure(name, str(cell), first["failed"])
            continue
        found = rest[0]
        seconds = found["running_seconds"]
        found |= {
            "tokens_per_second": cell.trained_tokens / seconds,
            "flops": operations(cell) / seconds,
        }
        found["share"] = ratio(found["flops"], work.machine.get("flops"))
        work.record(name, str(cell), sentence(found), **found)


def loss_head(work: Work) -> None:
    """损失与它的梯度，与同类并排；准确的答案先用 float64 算好。"""
    import loss_head as benchmark
    from loss_head_implementations import IMPLEMENTATIONS, PEERS, Cell, exact_answer

    large = (work.machine.get("memory_bytes") or LARGE_CARD) >= LARGE_CARD
    sizes = {"rows": 4096 if large else 1024, "vocab": 151936, "student_width": 512,
             "teacher_width": 896, "liger_chunk": 1024}  # fmt: skip
    if work.tiny:
        sizes = {"rows": 32, "vocab": 500, "student_width": 16, "teacher_width": 24,
                 "liger_chunk": 16}  # fmt: skip
    halves = {"bf16": "bfloat16", "fp16": "float16"}
    dtype = halves[work.machine.get("half", "bf16")] if work.device == "cuda" else "float32"
    cells = [
        Cell(dtype=dtype, objective=objective, near=False, device=work.device, seed=0, **sizes)
        for objective in ("forward_kl", "jsd")
    ]
    exact = [str(work.directory / f"exact-{cell.objective}.pt") for cell in cells]

    def answer_exactly() -> None:
        for cell, path in zip(cells, exact, strict=True):
            torch.save(tuple(exact_answer(cell)), path)

    run_forked(answer_exactly)
    for cell, path in zip(cells, exact, strict=True):
        case = f"{cell}, {cell.rows} x {cell.vocab}"
        names = work.available(IMPLEMENTATIONS, PEERS, case)
        calls = {name: partial(benchmark.worker, name, cell, path) for name in names}
        right: dict[str, float] = {}
        for name, seconds, first in timed(work, calls, case, warm_up=2):
            said = f"{1e3 * seconds:.2f} ms"
            if name != "floor":
                said += (
                    f"; extra {(first['extra_bytes'] or 0) / 2**30:.2f} GiB; gradient error "
                    f"{first['gradient_error']:.1e}, value error {first['value_error']:.1e}"
                )
                if name == "distillab" or (name in PEERS and first["gradient_error"] <= RIGHT):
                    right[name] = seconds
            work.record(name, case, said, seconds=seconds, **asdict(cell) | first)
        fastest_peer(work, case, right)


def train_step(work: Work) -> None:
    """同一步，与 TRL、``transformers`` 里的 Liger、手写的循环并排。"""
    import train_step as benchmark
    from train_step_implementations import LOOPS, PEERS

    cell = make_cell(work)
    names = work.available([name for name in LOOPS if name not in NOT_HERE], PEERS, str(cell))
    calls = {name: partial(benchmark.worker, name, cell) for name in names}
    found: dict[str, float] = {}
    for name, seconds, first in timed(work, calls, str(cell), warm_up=3):
        speed = cell.trained_tokens / seconds
        said = f"{1e3 * seconds:.1f} ms; {speed:,.0f} tokens/s"
        if first.get("peak_bytes") is not None:
            said += f"; peak {first['peak_bytes'] / 2**30:.2f} GiB"
        said += f"; first loss {first['loss']:.4f}"
        work.record(name, str(cell), said, seconds=seconds, tokens_per_second=speed, **first)
        found[name] = seconds
    fastest_peer(work, str(cell), found)


def timed(
    work: Work, calls: dict[str, Callable[[], object]], case: str, warm_up: int, rounds: int = 7
) -> Iterator[tuple[str, float, Record]]:
    """``(名字, 各轮的中位数, 第一行报告)``；没能给出结果的记一条。"""
    for name, first, rest in in_turn(calls, work.deadline, rounds, warm_up):
        if "failed" in first:
            work.failure(name, case, first["failed"])
        else:
            yield name, statistics.median(report["seconds"] for report in rest), first


def fastest_peer(work: Work, case: str, seconds: dict[str, float]) -> None:
    """再记一条：``distillab`` 是最快的同类的几成。"""
    peers = {name: value for name, value in seconds.items() if not name.startswith("distillab")}
    if "distillab" in seconds and peers:
        name = min(peers, key=peers.__getitem__)
        share = seconds["distillab"] / peers[name]
        said = f"{share:.2f} x the time of {name}, the fastest peer"
        work.record("distillab / peer", case, said, ratio=share, peer=name)


def sampling(work: Work) -> None:
    """采样，与 ``transformers.generate``（动态与静态 cache）并排；随机权重，每行都采满。"""
    sizes = {"student": (8, 64, 128), "pretrained": (32, 128, 128)}
    if work.tiny:
        sizes = {"student": (2, 8, 6)}
    names = ("distillab", "distillab-growing", "transformers", "transformers-static")
    for model, size in sizes.items():
        batch, width, new = size
        case = f"{model}, {batch} x {width} + {new}"
        calls = {name: partial(sample, work, name, model, size) for name in names}
        found = {}
        for name, seconds, _ in timed(work, calls, case, warm_up=1, rounds=3):
            found[name], speed = seconds, batch * new / seconds
            said = f"{speed:,.0f} tokens/s; {1e3 * seconds / new:.2f} ms a token"
            work.record(name, case, said, seconds=seconds, tokens_per_second=speed)
        fastest_peer(work, case, found)


def sample(work: Work, implementation: str, kind: str, size: tuple[int, int, int]) -> None:
    """一个实现的进程；两家的权重都是半精度。"""
    channel = open_channel()
    from plan import FakeTokenizer
    from sampling import make_model, sampler
    from train_step_models import SHAPES, make_teacher

    from distillab.distributed.engine import DTYPES
    from distillab.generate.generator import padded

    cell = make_cell(work)
    half = DTYPES[cell.precision]
    model, hf_model = make_model(kind, make_teacher(cell).to(work.device, half))
    models = model.to(half), hf_model
    vocab = SHAPES[cell.case, cell.scale]["teacher"][-1]
    batch, width, new = size
    call = sampler(implementation, models, FakeTokenizer(vocab), new)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(width, width // 2, batch).int().tolist()
    prompts = [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]
    ids, mask = padded(prompts, 0, torch.device(work.device))
    call(ids, mask, 0)
    send(channel, {})
    for turn, _ in enumerate(sys.stdin):
        synchronize(work.device)
        started = time.perf_counter()
        rows = call(ids, mask, turn).tolist()
        seconds = time.perf_counter() - started
        assert [len(row) for row in rows] == [new] * batch
        send(channel, {"seconds": seconds})


def plan(work: Work) -> None:
    """``distillab plan`` 说的峰值，与真的走一步量到的；几种情形一起走。"""
    from plan import BOUNDS, compared, worker

    cases = ("quickstart", "from scratch", "two views", "sampling", "bf16", "LoRA, bf16 base")
    more: tuple[str, ...] = ()
    if work.tiny:
        cases, more = cases[:1], ("data.max_seq_len=16", "train.batch_size=1", *teacher_is(work))
    low, high = BOUNDS[work.device]

    def measure(case: str) -> None:
        channel = open_channel()
        send(channel, compared(case, work.device, worker(case, work.device, more), more))

    for start in range(0, len(cases), 3):
        calls = {case: partial(measure, case) for case in cases[start : start + 3]}
        for case, found, _ in in_turn(calls, work.deadline, rounds=0):
            if "failed" in found:
                work.failure(case, "", found["failed"])
                continue
            del found["implementation"]
            said = (
                f"planned {found['planned_bytes'] / 2**30:.2f}, measured "
                f"{found['peak_bytes'] / 2**30:.2f} GiB: {found['ratio']:.2f}"
            )
            if found["reserved_bytes"] is not None:
                said += f"; reserved {found['reserved_bytes'] / 2**30:.2f}"
            inside = work.tiny or low <= found["ratio"] <= high
            work.record(case, "", said, "ok" if inside else "failed", **found)
