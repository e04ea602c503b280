"""两个进程与一个进程训练出同样的数：梯度按全局 token 数归一，数据不重不漏。"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from run_files import rows

from distillab.distributed.launch import engine_config


def train(*arguments: str, **changed: str) -> str:
    environment = (
        os.environ | {"OMP_NUM_THREADS": "1"} | (changed or {"ACCELERATE_USE_CPU": "true"})
    )
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(command):
    recipe = ["recipe.yaml", "--set", "student.init.choose=influence"]
    assert command("train", *recipe, "--set", "name=one")[0] == 0
    shutil.rmtree("cache/layers")  # 两个进程一起来量
    log = train("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                "-m", "distillab", "train", *recipe, "--set", "name=two",
                "--set", "train.batch_size=2")  # fmt: skip
    began = [Path("runs", name, "initial.json").read_text() for name in ("one", "two")]
    assert began[0] == began[1]
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


@pytest.mark.slow
def test_zero3_starts_from_its_config_file(command):
    recipe = ["recipe.yaml", "--set", "train.max_steps=6"]
    halved = ["--set", "train.batch_size=2"]
    assert command("train", *recipe, "--set", "name=one")[0] == 0
    train("-m", "accelerate.commands.launch", "--config_file", str(engine_config("zero3")),
          "--num_processes", "2", "--main_process_port", "0",
          "-m", "distillab", "train", *recipe, "--set", "name=two", *halved,
          DS_ACCELERATOR="cpu")  # fmt: skip
    log = train("-m", "distillab", "launch", *recipe, "--processes", "2", "--engine", "zero3",
                "--set", "name=half", "--set", "train.precision=bf16", *halved,
                DS_ACCELERATOR="cpu")  # fmt: skip
    assert "computing in bf16" in log
    one = rows("one", "train")
    for name, rel in (("two", 1e-5), ("half", 0.05)):
        found = rows(name, "train")
        assert len(found) == len(one) == 6
        for left, right in zip(one, found, strict=True):
            assert right["tokens"] == left["tokens"]
            for key in ("loss", "grad_norm"):
                assert right[key] == pytest.approx(left[key], rel=rel)
