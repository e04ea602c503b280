"""GPU 上的训练：与 CPU 相同，断点续训，fp16 的 loss scale，主机不等设备。"""

import os
import tempfile
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from check_parts import (
    VOCAB,
    Plain,
    Skip,
    nothing_steps_aside,
    pretrained,
    relative,
    student,
)

from distillab.batch import Example, Tokens, collate_examples, collate_text
from distillab.config.model_sections import LoraConfig
from distillab.config.schema import LossConfig, TrainingConfig
from distillab.config.sections import ResponsesConfig, SamplingConfig
from distillab.generate.generator import TextGenerator
from distillab.models.interface import PretrainedLM
from distillab.models.lora import add_lora
from distillab.models.own_blocks import through_own_blocks
from distillab.run_file_shapes import read_metrics
from distillab.teachers.in_process import AdapterOffTeacher, LocalTeacher
from distillab.train.on_policy import OnPolicy
from distillab.train.rollout import Rollout
from distillab.train.trainer import DistillationTrainer

LENGTH = 24


def text(count=32):
    """等长的文本块。"""
    starts = torch.arange(count)[:, None] * 31
    ids = (starts + 7 * torch.arange(LENGTH)) % VOCAB
    last = torch.full((count, 1), -100)
    labels = torch.cat([ids[:, 1:], last], 1)
    return [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]


def pairs(count=32):
    """长短不一的对话；教师多读一段经验。"""
    found = []
    for number in range(count):
        before, answer = (
            3 + number % 5,
            [(number * 13 + i * 7) % VOCAB for i in range(4 + number % 3)],
        )
        prompt = [(number * 3 + i) % VOCAB for i in range(before)]
        experience = [(number * 5 + i) % VOCAB for i in range(6 + number % 4)]
        views = [
            Tokens(ids + answer, list(range(len(ids), len(ids) + len(answer))))
            for ids in (prompt, experience + prompt)
        ]
        found.append(Example(*views))
    return found


def make(device, directory, kind="text", own=None, teacher=None, **config):
    """一个训练循环；``kind`` 是 ``text``、``pairs``，或由学生采样的 ``sampled``。"""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_CPU"] = "true" if device == "cpu" else "false"
    own, teacher = own or student(), teacher or LocalTeacher(PretrainedLM(pretrained()))
    data, collate, on_policy = text(), collate_text, None
    if kind != "text":
        data, collate = pairs(), partial(collate_examples, pad_id=0)
    if kind == "sampled":
        rollout = Rollout(TextGenerator(own, Plain()), SamplingConfig(max_new_tokens=8))
        on_policy = OnPolicy([rollout], ResponsesConfig(student_fraction=1.0), collate, seed=0)
    settings = {
        "batch_size": 4, "max_steps": 4, "warmup_steps": 1, "learning_rate": 3e-3,
        "log_interval": 1, "eval_interval": 1000, "save_interval": 1000, "precision": "fp32",
        "compile": False,
    }  # fmt: skip
    return DistillationTrainer(
        own, teacher, data, data[:4], TrainingConfig(**settings | config), directory,
        loss=LossConfig(alpha=0.5 if kind == "text" else 1.0), collate=collate,
        on_policy=on_policy,
    )  # fmt: skip


def losses(directory):
    rows = read_metrics(Path(directory, "metrics.jsonl"))
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train" and "loss" in row}


def weights(trainer):
    """键的偏置对 softmax 没有影响，梯度只是舍入误差，Adam 却会放大，所以不比。"""
    named = trainer.student.named_parameters()
    kept = [p.detach().cpu().flatten() for name, p in named if not name.endswith("k_proj.bias")]
    return torch.cat(kept)


def trained(device, **options):
    """``(每步的损失, 权重的变化)``。"""
    with tempfile.TemporaryDirectory() as directory, nothing_steps_aside():
        trainer = make(device, directory, **options)
        before = weights(trainer)
        trainer.train()
        return losses(directory), weights(trainer) - before


def step_equals_cpu(device, **options):
    """几步之后，损失与权重的变化同 CPU 上逐个算子执行的一样。"""
    if device == "cpu" and options.get("compile"):
        raise Skip("compiled bodies on a CPU: tests/train/test_compilation.py")
    plain = {key: value for key, value in options.items() if key in ("kind", "max_steps")}
    expected, expected_change = trained("cpu", **plain)
    found, change = trained(device, **options)
    assert found.keys() == expected.keys(), f"steps {sorted(found)}"
    worst = max(abs(found[step] / expected[step] - 1) for step in expected)
    moved = relative(change, expected_change.double())
    said = f"losses within {worst:.1e}, weights within {moved:.1e} of their change"
    assert worst <= 3e-5, said
    assert moved <= 1e-2, said
    return said


def half_is_close(device, precision):
    """半精度的几步，损失与 float32 的相差不到 1%。"""
    if device == "cpu" and precision == "fp16":
        raise Skip("fp16 needs a GPU")
    if device == "cuda" and precision == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        raise Skip("this GPU has no bf16")
    expected, _ = trained(device)
    found, _ = trained(device, precision=precision)
    worst = max(abs(value / expected[step] - 1) for step, value in found.items())
    said = f"losses of {len(found)} steps within {worst:.1e} of float32"
    assert found, said
    assert worst <= 1e-2, said
    return said


def lora_equals_cpu(device):
    """教师就是关掉 adapter 的学生。"""
    changes = []
    for place in ("cpu", device):
        own = PretrainedLM(pretrained())
        torch.manual_seed(2)
        add_lora(own, LoraConfig(rank=4))
        changes.append(trained(place, kind="pairs", own=own, teacher=AdapterOffTeacher(own)))
    (expected, expected_change), (found, change) = changes
    moved = relative(change, expected_change.double())
    worst = max(abs(found[step] - expected[step]) for step in expected)
    said = f"losses within {worst:.1e} nat, adapters within {moved:.1e} of their change"
    assert found.keys() == expected.keys(), f"steps {sorted(found)}"
    assert worst <= 1e-5, said
    assert moved <= 1e-2, said
    return said


class Killed(Exception):
    """训练在这里被打断。"""


def resume_is_exact(device, **config):
    """被打断再接上，与一气走完的逐位相同；同样的两次若本就不同，说出差多少。"""

    if device == "cpu" and config.get("precision") == "fp16":
        raise Skip("fp16 needs a GPU")

    def kill(path):
        if read_metrics(path)[-1]["step"] > 4:
            raise Killed

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    with tempfile.TemporaryDirectory() as directory:
        runs = []
        for name in ("whole", "again"):
            trainer = make(device, Path(directory, name), max_steps=7, **config)
            trainer.train()
            runs.append(weights(trainer))
        options = {"max_steps": 7, "save_interval": 4} | config
        try:
            make(device, Path(directory, "parts"), **options).train(on_metrics=kill)
            raise AssertionError("the run was not interrupted")
        except Killed:
            pass
        second = make(device, Path(directory, "parts"), **options)
        second.train(resume=True)
        resumed = weights(second)
        same = losses(Path(directory, "parts")) == losses(Path(directory, "whole"))
    whole, again = runs
    own, found = (relative(each, whole.double()) for each in (again, resumed))
    said = f"differs by {found:.1e}, and two whole runs by {own:.1e}"
    assert found <= 2 * own, said
    if own:
        return said
    assert same, "the losses differ"
    return "bit-equal after 7 steps"


def fp16_skips_and_goes_on(device):
    """损失放大得太多，头几步溢出：跳过、调低，此后照常；权重总是有限的。"""
    if device == "cpu":
        raise Skip("fp16 needs a GPU")
    with tempfile.TemporaryDirectory() as directory:
        trainer = make(device, directory, precision="fp16", max_steps=16)
        scaler = trainer.accelerator.scaler
        scaler._init_scale = 2.0**40
        scaler.set_backoff_factor(2.0**-8)
        before = weights(trainer)
        state = trainer.train()
        found = losses(directory)
        after = weights(trainer)
    said = f"{state.skipped_steps} steps skipped, loss scale {scaler.get_scale():g}"
    assert 0 < state.skipped_steps < 8, said
    assert after.isfinite().all(), said
    assert not torch.equal(after, before), said
    values = list(found.values())
    assert values[-1] < values[0], f"{said}, loss {values[0]:.3f} to {values[-1]:.3f}"
    return said


def no_wait_before_the_optimizer(device, kind="text", precision="bf16", lora=False, **config):
    """从数据到 ``optimizer.step``，主机一次也不等设备；头几步（编译、录制）不看。"""
    if device == "cpu":
        raise Skip("only a GPU is waited for")
    if precision == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        precision = "fp16"
    own, teacher = None, LocalTeacher(through_own_blocks(PretrainedLM(pretrained().eval())))
    if lora:
        own = add_lora(PretrainedLM(pretrained()), LoraConfig(rank=4))
        teacher = AdapterOffTeacher(own)
    options = {"precision": precision, "max_steps": 12, "log_interval": 100} | config
    with tempfile.TemporaryDirectory() as directory:
        trainer = make(device, directory, kind, own, teacher, **options)
        step, updates = trainer._step, []

        def watched(prepared):
            if len(updates) >= 6:
                torch.cuda.set_sync_debug_mode("warn")
            return step(prepared)

        def updating(*_):
            torch.cuda.set_sync_debug_mode("default")
            updates.append(1)

        trainer._step = watched
        trainer.optimizer.optimizer.register_step_pre_hook(updating)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
    waits = Counter(
        f"{Path(one.filename).name}:{one.lineno}"
        for one in caught
        if "synchronizing CUDA operation" in str(one.message)
    )
    assert len(updates) == 12, f"{len(updates)} updates"
    assert not waits, ", ".join(f"{count} x {place}" for place, count in waits.most_common(8))
    return "6 steps without a wait"
