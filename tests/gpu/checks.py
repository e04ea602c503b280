"""一块 GPU 上必须成立的事：每项一个函数，收下设备，返回一句话。

不成立是 ``AssertionError``，这台机器做不了是 ``Skip``。不用 pytest：``test_on_a_gpu.py`` 走它们，
``benchmarks/gpu.py`` 在只有 PyTorch 的机器上也走它们，各在自己的进程里。
"""

import copy
import math
import os
import tempfile
from functools import partial
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from transformers import Qwen2Config, Qwen2ForCausalLM

from distillab.batch import Example, Tokens, collate_examples, collate_text
from distillab.config.schema import LoraConfig, LossConfig, ModelConfig, TrainingConfig
from distillab.export.convert import to_hf_state_dict
from distillab.generate.cuda_graph import recordable
from distillab.generate.generator import TextGenerator, padded
from distillab.generate.sampling import sample_tokens
from distillab.generate.stops import until_stop
from distillab.generate.weights import sampling_logits
from distillab.loss.fused import fused_distillation_loss
from distillab.loss.losses import distillation_loss
from distillab.models.interface import PretrainedLM
from distillab.models.lora import add_lora
from distillab.models.student import StudentModel
from distillab.run_file_shapes import read_metrics
from distillab.targets import DenseTargets, Head, HiddenTargets
from distillab.teachers.in_process import AdapterOffTeacher, LocalTeacher
from distillab.train.trainer import DistillationTrainer

DIVERGENCES = {
    "forward_kl": {}, "reverse_kl": {}, "jsd": {"beta": 0.3}, "skew_forward_kl": {"skew": 0.2},
    "skew_reverse_kl": {"skew": 0.2},
}  # fmt: skip
GRADIENT = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 1e-2}
"""对 float64 的相对误差至多这么多。"""

VALUE = 1e-5
VOCAB, LENGTH = 1000, 24


class Skip(Exception):
    """这台机器上做不了。"""


# ---------------------------------------------------------------- 损失


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def loss_matches_float64(device, divergence, dtype, rows=96, budget=None):
    """值与两个梯度；独立的与几乎相同的两个模型。"""
    half = getattr(torch, dtype)
    worst = worst_value = 0.0
    for near in (False, True):
        inputs = [x.to(device, half) for x in loss_inputs(rows, near)]
        labels = torch.arange(rows, device=device) * 7 % VOCAB
        for alpha, temperature in ((0.5, 2.0), (1.0, 1.0)):
            loss = LossConfig(
                divergence=divergence, alpha=alpha, temperature=temperature,
                **DIVERGENCES[divergence],
            )  # fmt: skip
            hidden, weight = (x.detach().clone().requires_grad_() for x in inputs[:2])
            targets = HiddenTargets(inputs[2], Head(inputs[3]))
            found = fused_distillation_loss(
                hidden, weight, labels, targets, loss, memory_budget=budget
            )
            found.total.backward()
            exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in inputs[:2])
            logits = inputs[2].double() @ inputs[3].double().T
            expected = distillation_loss(
                exact_hidden @ exact_weight.T, DenseTargets(logits), labels, loss
            )
            expected.total.backward()
            pairs = ((hidden.grad, exact_hidden.grad), (weight.grad, exact_weight.grad))
            worst = max(worst, *(relative(*pair) for pair in pairs))
            error = abs(found.total.item() / expected.total.item() - 1)
            worst_value = max(worst_value, error)
    said = f"gradient error {worst:.1e}, value error {worst_value:.1e}"
    assert worst <= GRADIENT[dtype], said
    assert worst_value <= VALUE, said
    return said


def loss_inputs(rows, near):
    """``(hidden, weight, 教师的 hidden, 教师的 weight)``，CPU 上的 float32；logits 的标准差约 4。"""
    generator = torch.Generator().manual_seed(0)
    width, wider = 64, 80

    def normal(*shape, std=1.0):
        return torch.randn(*shape, generator=generator) * std

    hidden, weight = normal(rows, width), normal(VOCAB, width, std=4 / math.sqrt(width))
    if not near:
        return hidden, weight, normal(rows, wider), normal(VOCAB, wider, std=4 / math.sqrt(wider))
    more = normal(rows, wider - width, std=0.05), normal(VOCAB, wider - width, std=0.5)
    return hidden, weight, torch.cat([hidden, more[0]], 1), torch.cat([weight, more[1]], 1)


def loss_in_chunks(device):
    """一块 64 行，最后一块不满；与整块的同样准。"""
    return loss_matches_float64(device, "jsd", "float32", rows=150, budget=64 * VOCAB * 8)


# ---------------------------------------------------------------- 训练


def student():
    torch.manual_seed(0)
    return StudentModel(
        ModelConfig(
            hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=96,
            vocab_size=VOCAB, max_seq_len=128,
        )
    )  # fmt: skip


def pretrained(std=0.1):
    """transformers 的 Qwen2，随机权重，分布不平。"""
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=96, vocab_size=VOCAB, max_position_embeddings=128,
            tie_word_embeddings=True,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += std * torch.randn_like(parameter)
    return model


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
    """一个训练循环；``kind`` 是 ``text`` 或 ``pairs``。"""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_CPU"] = "true" if device == "cpu" else "false"
    data, collate = (text(), collate_text) if kind == "text" else (
        pairs(), partial(collate_examples, pad_id=0)
    )  # fmt: skip
    settings = {
        "batch_size": 4, "max_steps": 4, "warmup_steps": 1, "learning_rate": 3e-3,
        "log_interval": 1, "eval_interval": 1000, "save_interval": 1000, "precision": "fp32",
        "compile": False,
    }  # fmt: skip
    teacher = teacher or LocalTeacher(PretrainedLM(pretrained()))
    return DistillationTrainer(
        own or student(), teacher, data, data[:4], TrainingConfig(**settings | config), directory,
        loss=LossConfig(alpha=0.5 if kind == "text" else 1.0), collate=collate,
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
    with tempfile.TemporaryDirectory() as directory:
        trainer = make(device, directory, **options)
        before = weights(trainer)
        trainer.train()
        return losses(directory), weights(trainer) - before


def step_equals_cpu(device, **options):
    """几步之后，损失与权重的变化同 CPU 上逐个算子执行的一样。"""
    if device == "cpu" and options.get("compile"):
        raise Skip("compiled bodies on a CPU: tests/train/test_compilation.py")
    plain = {key: value for key, value in options.items() if key in ("kind", "own", "teacher")}
    own = options.pop("own", None)
    if own is not None:
        plain["own"], options["own"] = copy.deepcopy(own), own
    expected, expected_change = trained("cpu", **plain)
    found, change = trained(device, **options)
    assert found.keys() == expected.keys(), f"steps {sorted(found)}"
    worst = max(abs(found[step] / expected[step] - 1) for step in expected)
    moved = relative(change, expected_change.double())
    said = f"losses within {worst:.1e}, weights within {moved:.1e} of their change"
    assert worst <= 1e-5, said
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


def resume_is_exact(device):
    """被打断再接上，与一气走完的逐位相同；同样的两次若本就不同，说出差多少。"""

    def kill(path):
        if read_metrics(path)[-1]["step"] > 4:
            raise Killed

    torch.use_deterministic_algorithms(True, warn_only=True)
    with tempfile.TemporaryDirectory() as directory:
        runs = []
        for name in ("whole", "again"):
            trainer = make(device, Path(directory, name), max_steps=7)
            trainer.train()
            runs.append(weights(trainer))
        options = {"max_steps": 7, "save_interval": 4}
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
    assert torch.equal(whole, again), (
        f"two runs of the same recipe differ by {relative(again, whole.double()):.1e}"
    )
    assert torch.equal(resumed, whole), f"differs by {relative(resumed, whole.double()):.1e}"
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


def no_wait_before_the_optimizer(device, kind="text", precision="bf16", **config):
    """从数据到 ``optimizer.step``，主机一次也不等设备；头几步（编译、录制）不看。"""
    if device == "cpu":
        raise Skip("only a GPU is waited for")
    if precision == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        precision = "fp16"
    with tempfile.TemporaryDirectory() as directory:
        trainer = make(
            device, directory, kind, precision=precision, max_steps=12, log_interval=100, **config
        )
        step, update, done = trainer._step, trainer.optimizer.step, []

        def watched(prepared):
            if len(done) >= 6:
                torch.cuda.set_sync_debug_mode("error")
            try:
                return step(prepared)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        def updated(*arguments, **options):
            torch.cuda.set_sync_debug_mode("default")
            done.append(1)
            return update(*arguments, **options)

        trainer._step, trainer.optimizer.step = watched, updated
        trainer.train()
    assert len(done) == 12, f"{len(done)} updates"
    return "6 steps without a wait"


# ---------------------------------------------------------------- 生成


class Plain:
    """只有 ``TextGenerator`` 看的几样：没有停止 token。"""

    added_tokens_decoder = {}  # noqa: RUF012 - 从不改
    eos_token_id = bos_token_id = None
    pad_token_id = 0
    name_or_path = "plain"

    def __len__(self):
        return VOCAB

    def get_vocab(self):
        return {str(index): index for index in range(VOCAB)}

    def get_added_vocab(self):
        return {}

    def get_chat_template(self, **_):
        raise ValueError("no chat template")


def generation_equals_cpu(device, strategy):
    """float32：逐个 token 相同；有填充的与没有的，``StudentModel`` 与 transformers 的模型。"""
    count = 0
    own, theirs = student(), pretrained(0.2)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    own.eval()
    theirs.eval()
    for model in (own, PretrainedLM(theirs)):
        expected = []
        for place in ("cpu", device):
            generator = TextGenerator(model.to(place), Plain())
            for lengths in ((5, 5), (3, 9, 6)):
                rows = [[(31 * n + 7 * i) % VOCAB for i in range(n)] for n in lengths]
                ids, mask = padded(rows, 0, torch.device(place))
                found = generator.generate_ids(
                    ids, mask, strategy=strategy, max_new_tokens=40, seeds=list(lengths)
                ).tolist()
                expected.append(found)
        half = len(expected) // 2
        for left, right in zip(expected[:half], expected[half:], strict=True):
            assert left == right, first_difference(left, right)
            count += sum(map(len, left))
    return f"{count} tokens equal"


def sampling_is_recorded(device):
    """一步录得下来；停下的行丢掉、重录之后，其余的行仍与 CPU 的相同。"""
    own, theirs = student().eval(), PretrainedLM(pretrained(0.2).eval())
    with torch.no_grad():
        for parameter in own.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    rows = [[(31 * n + 7 * i) % VOCAB for i in range(2 + n)] for n in range(16)]
    count = 0
    for model in (own, theirs):
        found = []
        for place in ("cpu", device):
            generator = TextGenerator(model.to(place), Plain())
            generator.stop_ids = frozenset(range(0, VOCAB, 24))
            ids, mask = padded(rows, 0, torch.device(place))
            new_ids = generator.generate_ids(
                ids, mask, strategy="sample", max_new_tokens=110, seeds=range(16)
            )
            found.append(new_ids.tolist())
        assert found[0] == found[1], first_difference(*found)
        assert device == "cpu" or recordable(model), "the step was not recorded"
        count += sum(len(until_stop(row, generator.stop_ids)) for row in found[0])
    return f"{count} tokens equal"


def tokens_are_drawn_as_on_the_cpu(device):
    """同样的 logits 与随机数，选同一个 token；离边界 1e-7 之内的不算。"""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2000, 20_011, generator=generator)
    uniform = torch.rand(2000, dtype=torch.float64, generator=generator)
    expected = sample_tokens(logits, uniform)
    found = sample_tokens(logits.to(device), uniform.to(device)).cpu()
    other = (found != expected).nonzero()[:, 0].tolist()
    for row in other:
        boundaries = logits[row].double().softmax(-1).cumsum(-1)
        assert (boundaries - uniform[row]).abs().min() < 1e-7, f"row {row}"
    return f"{2000 - len(other)} of 2000 rows equal, {len(other)} at a boundary"


def half_head_has_float32_logits(device):
    """半精度的 head 原样相乘，与先转成 float32 的相同到求和的次序。"""
    worst = 0.0
    for dtype in (torch.bfloat16, torch.float16):
        head = Head(torch.randn(VOCAB, 512, device=device, dtype=dtype))
        hidden = torch.randn(8, 512, device=device, dtype=dtype)
        found, expected = sampling_logits(head)(hidden), head.logits(hidden)
        assert found.dtype == torch.float32
        worst = max(worst, relative(found, expected.double()))
    assert worst <= 1e-5, f"error {worst:.1e}"
    return f"error {worst:.1e}"


def first_difference(left, right):
    for row, (one, other) in enumerate(zip(left, right, strict=True)):
        for step, pair in enumerate(zip(one, other, strict=True)):
            if pair[0] != pair[1]:
                return f"row {row}, token {step}: {pair[0]} on the CPU, {pair[1]} here"
    return "lengths differ"


def converted_equals_own(device):
    """导出成 transformers 的 Qwen2 之后，隐状态不变。"""
    own = student().eval().to(device)
    c = own.config
    theirs = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=c.hidden_size, num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
            intermediate_size=c.intermediate_size, vocab_size=c.vocab_size,
            rms_norm_eps=c.norm_eps, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        )
    )  # fmt: skip
    theirs.load_state_dict(to_hf_state_dict(own), strict=False)
    theirs.eval().to(device)
    ids = torch.arange(40, device=device).view(2, 20) * 17 % VOCAB
    with torch.no_grad():
        error = relative(own(ids), theirs.model(ids).last_hidden_state.double())
    assert error <= 1e-5, f"hidden states differ by {error:.1e}"
    return f"hidden states within {error:.1e}"


CHECKS = {
    **{
        f"loss {divergence}, {dtype}": partial(
            loss_matches_float64, divergence=divergence, dtype=dtype
        )
        for divergence in DIVERGENCES
        for dtype in GRADIENT
    },
    "loss in chunks": loss_in_chunks,
    "step = CPU": step_equals_cpu,
    "step = CPU, two views": partial(step_equals_cpu, kind="pairs"),
    "step = CPU, accumulation": partial(
        step_equals_cpu, batch_size=2, gradient_accumulation_steps=2
    ),
    "step = CPU, LoRA": lora_equals_cpu,
    "step = CPU, compiled": partial(step_equals_cpu, compile=True),
    "bf16 near float32": partial(half_is_close, precision="bf16"),
    "fp16 near float32": partial(half_is_close, precision="fp16"),
    "fp16 loss scale": fp16_skips_and_goes_on,
    "resume": resume_is_exact,
    "generation = CPU": partial(generation_equals_cpu, strategy="greedy"),
    "generation = CPU, sampled": partial(generation_equals_cpu, strategy="sample"),
    "sampling recorded": sampling_is_recorded,
    "tokens drawn = CPU": tokens_are_drawn_as_on_the_cpu,
    "half head": half_head_has_float32_logits,
    "conversion": converted_equals_own,
    "no host wait": no_wait_before_the_optimizer,
    "no host wait, two views": partial(no_wait_before_the_optimizer, kind="pairs"),
    "no host wait, accumulation": partial(
        no_wait_before_the_optimizer, batch_size=2, gradient_accumulation_steps=2
    ),
    "no host wait, fp16": partial(no_wait_before_the_optimizer, precision="fp16"),
}
"""名字 -> 检查，要紧的在前。"""
