"""一块 GPU 上的一切：测试、一步、损失、采样、显存、真的配方；几分钟，一张表。

不上网。每一段有自己的进程与时限，超时就连同子孙一起杀掉，已经量到的都在；要紧的在前，余下的时间
由后面的分。量的东西在 ``gpu_sections.py`` 等文件里，这里只管先后、时间与记录。
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import tempfile
import textwrap
import time
import warnings
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_work import Section
    from measuring import Record

HERE = Path(__file__).parent
WIDTH = 80
LEAST = {False: 20.0, True: 1.0}
"""剩下不到这么多秒的一段就不做了；``--tiny`` 时是后者。"""

SECTIONS = {
    "machine": (0.5, "versions; the measured rate of matrix products and of copies"),
    "tests": (5.0, "loss against float64, CPU against GPU, resume, fp16, host waits"),
    "step": (3.0, "0.5B teaching 123M, 8 x 512: eager, graphs, compiled; host, device, waits"),
    "loss_head": (3.0, "the loss and its gradients beside TRL and Liger"),
    "train_step": (3.0, "the same step beside TRL, Liger in transformers' loop, a plain loop"),
    "sampling": (2.5, "responses beside transformers.generate, dynamic and static cache"),
    "plan": (2.0, "the peak that `distillab plan` computes beside the measured one"),
    "recipes": (6.0, "quickstart and experience/demo-gkd for real; needs --smollm2 and --text"),
    "engines": (2.0, "FSDP2 and ZeRO-3 in one process, bf16 and fp16"),
}
"""名字 -> (占多少时间, 帮助)，按先后；函数在 ``gpu_sections`` 或 ``gpu_runs`` 里，同名。"""

PRELOADED = (
    "accelerate", "transformers", "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.llama.modeling_llama", "transformers.generation", "torch._dynamo",
    "distillab.train.trainer", "distillab.generate.generator", "distillab.export.convert",
)  # fmt: skip
"""各段都要的，fork 之前导入一次；没有的由用到它的一段去说。"""

SETTINGS = {
    "CUDA_VISIBLE_DEVICES": "0",  # 有几块也只用一块：transformers 的 Trainer 会都用上
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # 否则问一声有没有 GPU 就碰了 CUDA
    "HF_HUB_OFFLINE": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "4",  # 几个进程同时编译
    "TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/torchinductor_distillab",  # 再走时还在
}
"""没有设的环境变量设成这样。"""

WITHOUT = "DISTILLAB_GPU_WITHOUT_PRELOADING"
"""设了就不预先导入：哪个库一导入就碰 CUDA 的机器上，fork 之后不能再用它。"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """命令行。"""
    parser = argparse.ArgumentParser(
        description="What one GPU does with distillab: checks and measurements, most important "
        "first, one table at the end. Needs PyTorch, transformers and accelerate; pydantic, rich "
        "and the like may be given on PYTHONPATH: a section says what it lacks and is skipped. "
        "Nothing is downloaded.",
        epilog="sections, in this order:\n"
        + "".join(f"  {name:<11}{text}\n" for name, (_, text) in SECTIONS.items())
        + "\nexamples:\n"
        "  PYTHONPATH=src python3 benchmarks/gpu.py --minutes 8 --json gpu.json\n"
        "  python benchmarks/gpu.py --section step --section loss_head\n"
        "  python benchmarks/gpu.py --smollm2 SmolLM2-135M-Instruct.Q4_1.gguf \\\n"
        "      --text summaries_en-us.json\n"
        "  CUDA_VISIBLE_DEVICES= python benchmarks/gpu.py --tiny    # only to try the script\n"
        "\nRecords are merged into benchmarks/results/SECTION-gpu.json, one per card and case.\n"
        "Exit status 1: something failed; 2: nothing could run.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="for all sections together (default: 8)")
    add("--section", action="append", choices=list(SECTIONS), help="only this one; repeatable")
    add("--json", type=Path, metavar="FILE", help="write every record to this file too")
    add("--smollm2", type=Path, metavar="FILE.gguf", help="SmolLM2-135M-Instruct, for recipes")
    add("--text", type=Path, metavar="FILE.json", help="Wikipedia summaries, for recipes")
    add("--tiny", action="store_true", help="tiny shapes, CPU or GPU: only to try the script")
    add("--results", type=Path, metavar="DIR", help="merge the records there instead")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes is {options.minutes:g}, expected more than 0")
    for flag in ("smollm2", "text"):
        path = getattr(options, flag)
        if path is not None and not path.exists():
            parser.error(f"--{flag}: no file {path}")
        setattr(options, flag, path and path.resolve())  # 训练在别的目录里走
    return options


def preload() -> str:
    """导入各段都要的，说出这里是 ``cuda`` 还是 ``cpu``；自己不碰 CUDA。"""
    from gpu_processes import asked

    warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork")  # 没有线程在算东西
    if WITHOUT not in os.environ:
        for name in PRELOADED:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)

    def probe() -> str:
        import torch

        if torch.cuda._is_in_bad_fork():
            return "touched"
        return "cuda" if torch.cuda.is_available() else "cpu"

    if (found := asked(probe)) == "touched":
        os.environ[WITHOUT] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    return found


def sections(options: argparse.Namespace) -> list[Section]:
    """要走的各段，按先后；缺东西的马上就略过，不给它留时间。"""
    import gpu_runs
    import gpu_sections
    from gpu_work import NEEDS, NEEDS_OF, Section, missing

    found = []
    for name, (weight, _) in SECTIONS.items():
        if options.section and name not in (*options.section, "machine"):
            continue
        absent = missing(NEEDS_OF.get(name, NEEDS))
        if name == "recipes":
            absent += [f"--{flag}" for flag in ("smollm2", "text") if not getattr(options, flag)]
        where = gpu_runs if name in ("recipes", "engines") else gpu_sections
        found.append(Section(name, getattr(where, name), 0.0 if absent else weight, absent))
    return found


def show(record: Record) -> None:
    """记录来一条印一条：整个脚本被杀掉时，这些还在。"""
    label = ", ".join(filter(None, (record["implementation"], record["case"])))
    status = "" if record["status"] == "ok" else f"{record['status'].upper()}: "
    print(f"  {label}: {status}{record['result']}", flush=True)


def table(machine: Record, records: list[Record]) -> list[str]:
    """最后的表，``WIDTH`` 列。"""
    versions = machine.get("versions", {})
    about = [machine.get("device_name") or "unknown device"]
    if machine.get("driver"):
        about.append(f"driver {machine['driver']}")
    about += [f"{name} {versions[name]}" for name in versions]
    lines = ["=" * WIDTH, *textwrap.wrap(", ".join(about), WIDTH), "=" * WIDTH]
    for (section, case), group in groupby(records, key=lambda r: (r["section"], r["case"])):
        lines += textwrap.wrap(f"{section}: {case}" if case else section, WIDTH)
        for record in group:
            status = "" if record["status"] == "ok" else f"{record['status'].upper()}: "
            label = textwrap.wrap(record["implementation"], 24)
            text = textwrap.wrap(status + record["result"], WIDTH - 27)
            for i in range(max(len(label), len(text))):
                left, right = (part[i] if i < len(part) else "" for part in (label, text))
                lines.append(f"  {left:<24} {right}".rstrip())
    counts = [sum(r["status"] == status for r in records) for status in ("ok", "failed", "skipped")]
    return [*lines, "=" * WIDTH, "{} ok, {} failed, {} skipped".format(*counts)]


def keep(records: list[Record], machine: Record, directory: Path) -> None:
    """并入 ``directory`` 里这一段的记录；卡、实现与情形都相同的换成新的，跳过的不留。"""
    from measuring import save

    about = {key: machine.get(key) for key in ("device_name", "driver", "versions", "date")}
    fresh = [record | about for record in records if record["status"] != "skipped"]
    if fresh:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{fresh[0]['section']}-gpu.json"
        save(path, fresh, ["case", "device_name"])


def main(arguments: list[str]) -> int:
    """依次走各段；返回退出码。"""
    started = time.monotonic()
    options = parse(arguments)
    if find_spec("torch") is None:
        print("PyTorch is not installed: nothing can run", file=sys.stderr)
        return 2
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    sys.path[:0] = [str(HERE), str(HERE.parent / "tests" / "gpu"), str(HERE.parent / "src")]
    device = preload()
    if device == "cpu" and not options.tiny:
        print("no CUDA device was found; --tiny tries the script on a CPU", file=sys.stderr)
        return 2
    from gpu_work import Work, run

    records: list[Record] = []
    machine: Record = {}
    left = sections(options)
    end = started + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="distillab-gpu-") as name:
        directory = Path(name)
        tempfile.tempdir = os.environ["TMPDIR"] = name  # 被杀掉的留下的文件，最后一起删
        common: dict[str, Any] = {
            "device": device, "tiny": options.tiny, "directory": directory,
            "smollm2": options.smollm2, "text": options.text,
        }  # fmt: skip
        while left:
            now, share = time.monotonic(), sum(section.weight for section in left) or 1.0
            section = left.pop(0)
            seconds = (end - now) * section.weight / share
            work = Work(
                deadline=now + seconds, records=directory / f"{section.name}.jsonl",
                machine=machine, **common,
            )  # fmt: skip
            print(f"{section.name}, at most {max(0.0, seconds):.0f} s", flush=True)
            fresh = run(section, work, show, LEAST[options.tiny])
            records += fresh
            if section.name == "machine":
                machine = next((r for r in fresh if r["status"] == "ok"), {})
            if options.json:
                options.json.write_text(json.dumps(records, indent=1) + "\n")
            if options.results or not options.tiny:
                keep(fresh, machine, options.results or HERE / "results")
    print("\n".join(table(machine, records)))
    return int(any(record["status"] == "failed" for record in records))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
