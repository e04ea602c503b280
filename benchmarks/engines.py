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

from distillab.run_file_shapes import read_metrics

BASELINE = "single"
KD_VARIANTS = ("resumed", "shard")
"""也与在线 KD 比较的：从另一个引擎的检查点恢复的，教师分片的。"""


def compare(runs: Path) -> Iterator[Record]:
    """每个运行目录 ``ENGINE-METHOD`` 与 ``single-METHOD`` 的最大相对差。

    Args:
        runs: 目录；没有可比的跳过。

    Yields:
        记录；权重的差除以那个张量里最大的数。键的偏置另列：它对 softmax 没有影响，梯度只是舍入
        误差，Adam 却会放大。
    """
    for path in sorted(runs.iterdir()):
        engine, _, method = path.name.partition("-")
        base = runs / f"{BASELINE}-{'kd' if method in KD_VARIANTS else method}"
        if path == base or not (base / "export").is_dir():
            continue
        yield {
            "engine": engine,
            "method": method,
            **{key: _steps(path, base, key) for key in ("loss", "grad_norm")},
            "weights": _weights(path, base, key_biases=False),
            "key_biases": _weights(path, base, key_biases=True),
        }


def _steps(path: Path, base: Path, key: str) -> float:
    found, expected = (
        [row[key] for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"]
        for run in (path, base)
    )
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def _weights(path: Path, base: Path, key_biases: bool) -> float:
    found, expected = (load_file(run / "export" / "model.safetensors") for run in (path, base))
    return max(
        float((found[name] - weight).abs().max() / weight.abs().max())
        for name, weight in expected.items()
        if name.endswith("k_proj.bias") == key_biases
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
