"""两个进程与一个进程训练出同样的数：梯度按全局 token 数归一，数据不重不漏。"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distillab.metrics import read_metrics


def train(*arguments: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def rows(run: str, kind: str) -> list[dict]:
    return [
        row for row in read_metrics(Path("runs") / run / "metrics.jsonl") if row["kind"] == kind
    ]


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(workdir):
    train("-m", "distillab", "train", "recipe.yaml", "--set", "name=one")
    log = train("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                "-m", "distillab", "train", "recipe.yaml", "--set", "name=two",
                "--set", "train.batch_size=2")  # fmt: skip
    assert log.count("computing in fp32") == 1  # 每句话只说一遍
    one, two = rows("one", "train"), rows("two", "train")
    assert len(one) == len(two) == 12
    for left, right in zip(one, two, strict=True):
        assert right["tokens"] == left["tokens"]
        for key in ("loss", "divergence", "cross_entropy", "grad_norm"):
            assert right[key] == pytest.approx(left[key], rel=1e-5)
    for left, right in zip(rows("one", "validation"), rows("two", "validation"), strict=True):
        assert right["perplexity"] == pytest.approx(left["perplexity"], rel=1e-4)
    assert (Path("runs/two/export") / "model.safetensors").is_file()
