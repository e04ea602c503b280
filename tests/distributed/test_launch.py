"""``distillab launch``：随包的引擎配置，拒绝起不来的，退出码照原样传出。"""

import json
import sys

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig

from distillab.config.recipes import shipped_recipes
from distillab.distributed import launch as module
from distillab.distributed.launch import engine_config, launch
from distillab.errors import DistillabError
from distillab.sources import shipped_directory

ENGINES = ["ddp", "fsdp2", "zero2", "zero3"]


@pytest.mark.parametrize("engine", ENGINES)
def test_engine_configs_are_what_accelerate_writes(engine):
    path = engine_config(engine)
    config = ClusterConfig.from_yaml_file(str(path))
    assert (config.num_processes, config.mixed_precision) == (8, "bf16")
    written = json.loads(json.dumps(config.to_dict(), default=str))
    for key, value in yaml.safe_load(path.read_text()).items():
        assert str(written.get(key)) == str(value), key


def test_engine_configs_are_no_recipes():
    assert not [name for name in shipped_recipes() if name.startswith("accelerate")]


def test_the_deepspeed_file_is_the_stage_3_of_the_accelerate_config():
    found = json.loads((shipped_directory() / "deepspeed" / "zero3.json").read_text())
    config = yaml.safe_load(engine_config("zero3").read_text())["deepspeed_config"]
    assert found["zero_optimization"]["stage"] == config["zero_stage"] == 3


@pytest.mark.parametrize(
    ("engine", "processes", "gpus", "message"),
    [
        ("ddp", 0, 0, "--processes is 0, expected at least 1"),
        ("ddp", 4, 2, "this machine has 2 GPU"),
        ("fsdp2", 2, 0, "--engine fsdp2 needs GPUs"),
    ],
)
def test_what_cannot_start_is_refused(monkeypatch, engine, processes, gpus, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(DistillabError, match=message):
        launch(engine, processes, [])


def test_deepspeed_must_be_installed(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(DistillabError, match=r"distillab\[deepspeed\]"):
        launch("zero3", 2, [])


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "code"), [(["recipes"], 0), (["train", "no-such"], 2)])
def test_the_exit_code_is_that_of_the_processes(monkeypatch, arguments, code):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "argv", ["distillab"])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert launch("ddp", 2, arguments) == code
