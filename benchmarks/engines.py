"""两个进程与一个进程差多少：各引擎、各方法的损失、梯度范数与导出的权重。

训练由测试来走，这里只比较它留下的运行目录::

    python -m pytest tests/e2e/test_engines.py --basetemp /tmp/engines
    python benchmarks/engines.py /tmp/engines/engines0/runs
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from measuring import Record, environment, save, version_of
from safetensors.torch import load_file

from distillab.metrics import read_metrics

BASELINE = "single"


def compare(runs: Path) -> Iterator[Record]:
    """每个运行目录 ``ENGINE-METHOD`` 与 ``single-METHOD`` 的最大相对差。

    Args:
        runs: 目录；没有可比的跳过。

    Yields:
        记录；权重的差除以那个张量里最大的数。
    """
    for path in sorted(runs.iterdir()):
        engine, _, method = path.name.partition("-")
        base = runs / f"{BASELINE}-{method}"
        if engine == BASELINE or not (base / "export").is_dir():
            continue
        yield {
            "engine": engine,
            "method": method,
            **{key: _steps(path, base, key) for key in ("loss", "grad_norm")},
            "weights": _weights(path, base),
        }


def _steps(path: Path, base: Path, key: str) -> float:
    found, expected = (
        [row[key] for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"]
        for run in (path, base)
    )
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def _weights(path: Path, base: Path) -> float:
    found, expected = (load_file(run / "export" / "model.safetensors") for run in (path, base))
    return max(
        float((found[name] - weight).abs().max() / weight.abs().max())
        for name, weight in expected.items()
    )


def main() -> None:
    """命令行入口。"""
    parser = argparse.ArgumentParser(description="compare engines with one process")
    parser.add_argument("runs", type=Path, help="runs/ of tests/e2e/test_engines.py")
    parser.add_argument("--json", type=Path, help="write the records here")
    arguments = parser.parse_args()
    records = list(compare(arguments.runs))
    for record in records:
        print(record)
    if arguments.json:
        about = environment("cpu") | {"deepspeed": version_of("deepspeed"), "processes": 2}
        save(arguments.json, [record | about for record in records], ["engine", "method"])


if __name__ == "__main__":
    main()
