"""从取到数据到更新参数，主机从不等设备：没有一处读设备上的数；以及一步发出多少个算子。"""

import traceback
from collections import Counter
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from test_rollout import example
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from distillab.batch import Example, collate_examples, collate_text
from distillab.config.model_sections import LoraConfig, ModelConfig
from distillab.config.schema import LossConfig, TrainingConfig
from distillab.config.sections import ResponsesConfig, SamplingConfig
from distillab.generate.generator import TextGenerator
from distillab.models.interface import PretrainedLM
from distillab.models.lora import add_lora
from distillab.models.student import StudentModel
from distillab.teachers.in_process import AdapterOffTeacher, LocalTeacher
from distillab.train import module, profiling
from distillab.train.on_policy import OnPolicy, Prepared
from distillab.train.rollout import Rollout
from distillab.train.step_totals import Launched
from distillab.train.trainer import DistillationTrainer

READS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2"}
"""值要回到主机的算子，在 GPU 上都要等。"""

CALLS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"}
"""张量的方法，同上；张量在 CPU 上时，有的不经过算子。"""


class Waits(TorchDispatchMode):
    """其间每一处主机的等待：``(文件, 做了什么)``。transformers 自己的不算。"""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter()
        self.calls = Calls(self.note)

    def __enter__(self):
        self.calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.calls.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = name.startswith("index") and any(
            isinstance(part, torch.Tensor) and part.dtype == torch.bool
            for part in (args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ())
        )
        if name in READS or masks:
            self.note(name)
        return function(*args, **kwargs or {})

    def note(self, what: str) -> None:
        frames = [frame for frame, _ in traceback.walk_stack(None)]
        files = [frame.f_code.co_filename for frame in frames]
        files = [file for file in files if file != __file__]
        if what == "to" and "/torch/" in files[0]:
            return  # torch 自己的 ``norm.to(first_device)``：本来就在那里
        own = next(file for file in files if "/torch/" not in file)
        if "/transformers/" not in own:
            self.found[Path(own).name, what] += 1


class Calls(TorchFunctionMode):
    """``CALLS``，与主机和设备之间同步的复制：不在锁页内存里的，或没有 ``non_blocking`` 的。"""

    def __init__(self, note) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in CALLS:
            self.note(name)
        devices = [
            x for x in (*args[1:], kwargs.get("device")) if isinstance(x, torch.device | str)
        ]
        if name in ("to", "cuda") and devices and not kwargs.get("non_blocking"):
            self.note("to")
        if name in ("tensor", "as_tensor") and devices:
            self.note(name)
        return function(*args, **kwargs)


collate = partial(collate_examples, pad_id=397)


def model(layers=2, **shape):
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 48,
             "vocab_size": 400, "max_seq_len": 64}  # fmt: skip
    return StudentModel(ModelConfig(num_layers=layers, **small | shape))


@pytest.fixture
def make(tmp_path, tiny_qwen2, tiny_tokenizer):
    """一种方法的训练循环；教师读到的比学生多，长短不一。"""

    def make(method, **config):
        student, on_policy = model(), None
        teacher, loss = LocalTeacher(model(3)), LossConfig(alpha=0.5, temperature=2.0)
        data = [example(length, seed=length) for length in (3, 9, 5, 7, 4, 6, 8, 2)]
        if method == "kd":
            data = [Example(row.student, row.student) for row in data]
        if method == "gkd":
            rollout = Rollout(TextGenerator(student, tiny_tokenizer),
                              SamplingConfig(temperature=0.9, max_new_tokens=8), 64)  # fmt: skip
            on_policy = OnPolicy([rollout], ResponsesConfig(student_fraction=1.0), collate, seed=0)
            loss = LossConfig(divergence="jsd", alpha=1.0, temperature=1.0)
        if method == "lora":
            student = add_lora(PretrainedLM(tiny_qwen2), LoraConfig(rank=4))
            teacher = AdapterOffTeacher(student)
        fast = {"batch_size": 2, "max_steps": 4, "warmup_steps": 1, "log_interval": 100,
                "eval_interval": 100, "save_interval": 100}  # fmt: skip
        return DistillationTrainer(
            student, teacher, data, data[:2], TrainingConfig(**fast | config), tmp_path / "run",
            loss=loss, collate=collate, on_policy=on_policy,
        )  # fmt: skip

    return make


@pytest.fixture
def watched(monkeypatch):
    """``Waits``：从数据备好（采样之后）到参数更新。晚一步的读不算，那时设备有别的可做。"""
    waits, step, read = Waits(), DistillationTrainer._step, Launched.read

    def recorded(trainer, prepared):
        with waits:
            return step(trainer, prepared)

    def unrecorded(launched):
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return read(launched)

    monkeypatch.setattr(DistillationTrainer, "_step", recorded)
    monkeypatch.setattr(Launched, "read", unrecorded)
    return waits


THE_COPY = ("step_totals.py", "to")
"""抄总和的那一处；从 GPU 来时是异步的。"""


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("kd", {}),
        ("skd", {}),
        ("gkd", {}),
        ("lora", {}),
        ("skd", {"gradient_accumulation_steps": 2, "max_steps": 2}),
        ("kd", {"activation_checkpointing": True}),
    ],
)
def test_the_host_waits_for_nothing_between_the_data_and_the_update(make, watched, method, config):
    trainer = make(method, **config)
    trainer.train()
    assert watched.found == {THE_COPY: trainer.total_steps}


@pytest.mark.parametrize("read", ["item", "tolist", "nonzero", "__bool__", "cpu", "numpy"])
def test_a_read_in_the_loss_is_noticed(make, watched, monkeypatch, read):
    fused = module.fused_distillation_loss

    def reading(*arguments, **options):
        sums = fused(*arguments, **options)
        getattr(sums.divergence, read)()
        return sums

    monkeypatch.setattr(module, "fused_distillation_loss", reading)
    make("kd").train()
    assert set(watched.found) > {THE_COPY}


class Operators(TorchDispatchMode):
    """一步里发出的算子，按段数；只换一个看法、不算什么的（``view``）不计。"""

    def __init__(self) -> None:
        super().__init__()
        self.counts, self.now = Counter(), "other"

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[self.now] += not function.is_view
        return function(*args, **kwargs or {})

    @contextmanager
    def phase(self, name):
        self.now, before = name, self.now
        yield
        self.now = before

    def step(self):
        return nullcontext()


def operators(teacher, student, tmp_path, monkeypatch):
    """教师与学生各这么多层，损失只有一块：第二步发出的算子。"""
    ids = torch.arange(9)
    data = [{"input_ids": ids, "labels": torch.cat([ids[1:], torch.tensor([-100])])}]
    trainer = DistillationTrainer(
        model(student), LocalTeacher(model(teacher)), data, data,
        TrainingConfig(batch_size=1, warmup_steps=0, max_steps=9), tmp_path / f"{teacher}",
    )  # fmt: skip
    prepared, counted = Prepared([collate_text(data)]), Operators()
    trainer._step(prepared)
    monkeypatch.setattr(profiling, "_active", counted)
    with counted:
        trainer._step(prepared)
    monkeypatch.undo()
    return counted.counts


def test_outside_the_compiled_blocks_a_step_dispatches_a_tenth(tmp_path, monkeypatch):
    whole = operators(24, 12, tmp_path, monkeypatch)
    half = operators(12, 6, tmp_path, monkeypatch)
    # 层里的与层数成正比，剩下的就在层外；编译之后每层的前向、反向各是一个
    regions = {"teacher forward": 24, "student forward": 12, "backward": 12}
    outside = {name: 2 * half[name] - whole[name] + regions.get(name, 0) for name in whole}
    print(f"operators a step: {sum(whole.values())} {dict(whole)}")
    print(f"blocks compiled: {sum(outside.values())} {outside}")
    assert sum(whole.values()) <= 2400
    assert sum(outside.values()) <= 260
