"""运行目录里的文件：读出指标的各行，退回到某一步的检查点。"""

import shutil
from pathlib import Path

from distillab.run_file_shapes import read_metrics


def rows(run, kind="train"):
    found = read_metrics(Path("runs") / run / "metrics.jsonl")
    return [row for row in found if row["kind"] == kind]


def back_to(run, step):
    """像是在第 ``step`` 步之后被杀的。"""
    Path(f"runs/{run}/summary.json").unlink()
    for path in Path(f"runs/{run}/checkpoints").glob("step-*"):
        if int(path.name[-8:]) > step:
            shutil.rmtree(path)
