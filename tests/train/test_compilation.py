# ruff: noqa: F401, F811 - test_trainer 的 fixture
"""``train.compile``：数与逐个算子执行的相同，检查点可以互换，只有训练步编译，没有编译器也能训练。"""

import copy
import functools
import logging
from dataclasses import replace

import pytest
import torch
from test_trainer import FAST, SMALL, Chunks, losses, make, teacher, weights
from torch._dynamo.testing import CompileCounterWithBackend

from distillab.batch import collate_text
from distillab.config.model_sections import LoraConfig, ModelConfig
from distillab.config.schema import TrainingConfig
from distillab.export.convert import export_student
from distillab.generate.generator import TextGenerator
from distillab.models.interface import PretrainedLM
from distillab.models.lora import add_lora
from distillab.models.student import StudentModel
from distillab.teachers.in_process import AdapterOffTeacher
from distillab.train import compilation
from distillab.train import trainer as trainer_module
from distillab.train.compilation import prepare_bodies, training_step
from distillab.train.trainer import DistillationTrainer

# 警告当作错误时，Dynamo 查看非叶子的输入会触发它；平时它自己就压下了。
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture
def counter(monkeypatch):
    """不必等 C 编译器：图照样捕获、照样分出反向，由 PyTorch 自己的算子执行。"""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    monkeypatch.setattr(compilation.COMPILER, "failed", False)
    yield counter
    torch.compiler.reset()


def grad_norms(trainer):
    from distillab.run_file_shapes import read_metrics

    rows = read_metrics(trainer.run_dir / "metrics.jsonl")
    return [row["grad_norm"] for row in rows if row["kind"] == "train"]


def assert_same(found, expected):
    assert len(losses(found)) == len(losses(expected))
    for (step, loss), (other, reference) in zip(losses(found), losses(expected), strict=True):
        assert step == other
        assert loss == pytest.approx(reference, rel=1e-5)
    assert grad_norms(found) == pytest.approx(grad_norms(expected), rel=1e-5)
    torch.testing.assert_close(weights(found), weights(expected), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_training_gives_the_numbers_of_eager_training(make, counter, checkpointing):
    runs = [
        make(name, compile=compiled, activation_checkpointing=checkpointing)
        for name, compiled in (("eager", False), ("compiled", True))
    ]
    for trainer in runs:
        trainer.train()
    assert counter.frame_count == 2  # 学生与教师，各层合用一份
    assert_same(runs[1], runs[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_lora_student_that_is_its_own_teacher_compiles(
    tiny_qwen2, tmp_path, counter, checkpointing
):
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        student = add_lora(PretrainedLM(copy.deepcopy(tiny_qwen2)), LoraConfig(rank=2))
        config = TrainingConfig(
            **FAST | {"max_steps": 3}, compile=compiled, activation_checkpointing=checkpointing
        )
        trainer = DistillationTrainer(
            student, AdapterOffTeacher(student), Chunks(), Chunks(6, seed=1), config,
            tmp_path / str(compiled),
        )  # fmt: skip
        names = set(student.state_dict())
        trainer.train()
        assert set(student.state_dict()) == names
        runs.append(trainer)
    assert counter.frame_count >= 2
    assert_same(runs[1], runs[0])


def test_checkpoints_of_compiled_and_eager_runs_are_interchangeable(make, counter):
    whole = make("whole")
    whole.train()
    for first, second in ((False, True), (True, False)):
        name = f"from-{first}"
        make(name, max_steps=6, compile=first, save_interval=3).train()
        for newest in (whole.run_dir.parent / name / "checkpoints").glob("step-00000006"):
            newest.rename(newest.with_name("later"))
        resumed = make(name, compile=second)
        assert resumed.train(resume=True).current_step == 6
        assert_same(resumed, whole)


def test_sequences_of_many_lengths_compile_twice(counter):
    student = StudentModel(ModelConfig(**SMALL)).train()
    prepare_bodies(student, None, TrainingConfig(compile=True), steps=6)
    for length in (8, 12, 16, 23, 31, 40):
        with training_step():
            student(torch.randint(400, (2, length))).sum().backward()
    assert counter.frame_count == 2  # 第一种长度，此后任意的长度


def test_validation_and_sampling_do_not_compile(make, counter, tiny_tokenizer):
    trainer = make(compile=True, max_steps=2)
    trainer.evaluate()
    generator = TextGenerator(trainer.student, tiny_tokenizer)
    before = generator.generate(["the teacher"], max_new_tokens=4)
    assert counter.frame_count == 0
    plain = StudentModel(trainer.student.config)
    plain.load_state_dict(trainer.student.state_dict())
    assert (
        TextGenerator(plain, tiny_tokenizer).generate(["the teacher"], max_new_tokens=4) == before
    )


def test_a_compiled_student_is_exported_under_the_same_names(
    make, counter, tiny_tokenizer, tmp_path
):
    from safetensors.torch import load_file

    for compiled in (False, True):
        trainer = make(str(compiled), compile=compiled)
        trainer.train()
        export_student(trainer.student, tiny_tokenizer, tmp_path / f"export-{compiled}")
    eager, found = (
        load_file(tmp_path / f"export-{name}" / "model.safetensors") for name in (False, True)
    )
    assert set(found) == set(eager)
    for name, value in eager.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-5)


def test_without_a_compiler_training_runs_uncompiled_and_says_so_once(
    make, counter, monkeypatch, caplog
):  # fmt: skip
    def broken(function):
        def fail(*args, **kwargs):
            raise torch._inductor.exc.InductorError(RuntimeError("no compiler"), None)

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    eager = make("eager")
    eager.train()
    with caplog.at_level(logging.WARNING, "distillab"):
        compiled = make("compiled", compile=True)
        compiled.train()
    assert caplog.text.count("the models run uncompiled") == 1
    assert "no compiler" in caplog.text
    assert losses(compiled) == losses(eager)


def test_the_blocks_are_those_of_the_body(tiny_qwen2, tiny_llama):
    assert PretrainedLM(tiny_qwen2).blocks == list(tiny_qwen2.model.layers)
    assert PretrainedLM(tiny_llama).blocks == list(tiny_llama.model.layers)


@pytest.mark.slow
def test_the_c_compiler_gives_the_same_numbers(make, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(compilation.COMPILER, "failed", False)
    eager, compiled = make("eager", max_steps=3), make("compiled", max_steps=3, compile=True)
    eager.train()
    compiled.train()
    assert not compilation.COMPILER.failed
    assert_same(compiled, eager)


# ---------------------------------------------------------------- CUDA graph：录制换成同样规矩的替身


class StaticReplay(torch.nn.Module):
    """像 ``make_graphed_callables``：输出与梯度总在同一块内存里，下一次重放就盖掉。"""

    def __init__(self, body, factor=1.0):
        super().__init__()
        self.replays = 0
        parameters = [each for each in body.parameters() if each.requires_grad]
        static = {"gradients": [torch.empty_like(each) for each in parameters]}

        class Replay(torch.autograd.Function):
            @staticmethod
            def forward(ctx, input_ids, *_):
                with torch.set_grad_enabled(body.training):
                    ctx.hidden = body(input_ids)
                output = static.setdefault("output", torch.empty_like(ctx.hidden))
                output.copy_(ctx.hidden.detach() * factor)
                return output.detach()

            @staticmethod
            def backward(ctx, upstream):
                found = torch.autograd.grad(ctx.hidden, parameters, upstream)
                for buffer, gradient in zip(static["gradients"], found, strict=True):
                    buffer.copy_(gradient)
                return None, *(buffer.detach() for buffer in static["gradients"])

        self.run = lambda ids: Replay.apply(ids, *(parameters if body.training else ()))

    def forward(self, input_ids):
        self.replays += 1
        return self.run(input_ids)


@pytest.fixture
def graphs(monkeypatch):
    """在 CPU 上也当作有 GPU；给出录下的各段。"""
    found = []
    prepare = trainer_module.prepare_bodies

    def recorded(body, input_ids):
        found.append(StaticReplay(body))
        return found[-1]

    monkeypatch.setattr(compilation, "recorded", recorded)
    monkeypatch.setattr(PretrainedLM, "capturable", True)
    monkeypatch.setattr(
        trainer_module,
        "prepare_bodies",
        lambda *args, **options: prepare(*args, **options | {"cuda": True}),
    )
    return found


@pytest.mark.parametrize("accumulation", [1, 2])
def test_graphs_train_exactly_as_eager_steps_do(make, graphs, accumulation):
    options = {"gradient_accumulation_steps": accumulation, "max_steps": 5, "num_epochs": 9}
    eager = make("eager", compile=False, **options)
    eager.train()
    assert not graphs
    graphed = make("graphed", compile="auto", **options)
    graphed.train()
    assert len(graphs) == 2  # 学生与教师
    assert [graph.replays for graph in graphs] == [1 + 5 * accumulation] * 2  # 核对一次
    assert losses(graphed) == losses(eager)
    torch.testing.assert_close(weights(graphed), weights(eager), rtol=0, atol=0)


@pytest.mark.parametrize("wrong", ["values", "capture"])
def test_graphs_that_fail_or_differ_step_aside_and_say_so(
    make, graphs, monkeypatch, caplog, wrong
):  # fmt: skip
    def recorded(body, input_ids):
        if wrong == "capture":
            raise RuntimeError("operation not permitted when stream is capturing")
        return StaticReplay(body, factor=1.1)

    monkeypatch.setattr(compilation, "recorded", recorded)
    eager = make("eager", compile=False)
    eager.train()
    graphed = make("graphed")
    with caplog.at_level(logging.WARNING, "distillab"):
        graphed.train()
    assert caplog.text.count("CUDA graphs cannot be used here") == 2  # 学生与教师各一次
    assert ("differ by 1.0e-01" if wrong == "values" else "stream is capturing") in caplog.text
    assert losses(graphed) == losses(eager)


def test_only_batches_of_the_recorded_shape_are_replayed(graphs):
    student = StudentModel(ModelConfig(**SMALL)).train()
    body = compilation.GraphedBody(student, trains=True)
    student._compiled_call_impl = body
    batch = collate_text([Chunks(length=12)[0]] * 2)
    examples = replace(batch, examples=())  # 对话：长短不一
    compilation.record_bodies(student, None, lambda: examples, torch.float32)
    assert not graphs
    compilation.record_bodies(student, None, lambda: batch, torch.float32)
    ids = batch.student.input_ids
    student(ids)  # 不在训练步里
    with training_step():
        student(ids[:1])
        student(ids, torch.ones_like(ids))
        with torch.no_grad():
            student(ids)
    assert [graph.replays for graph in graphs] == [1]  # 只有核对的那次
    with training_step():
        student(ids)
    assert [graph.replays for graph in graphs] == [2]


def test_dropout_and_recomputation_are_not_recorded():
    assert StudentModel(ModelConfig(**SMALL)).capturable
    assert not StudentModel(ModelConfig(**SMALL, dropout=0.1)).capturable
    student = StudentModel(ModelConfig(**SMALL))
    student.enable_activation_checkpointing()
    assert not student.capturable


@pytest.mark.parametrize(
    ("compile", "cuda", "steps", "compiled"),
    [("auto", True, 500, True), ("auto", True, 499, False), ("auto", False, 500, False),
     (True, False, 1, True), (False, True, 500, False)],
)  # fmt: skip
def test_auto_compiles_where_it_pays(compile, cuda, steps, compiled):
    student = StudentModel(ModelConfig(**SMALL))
    prepare_bodies(student, None, TrainingConfig(compile=compile), steps=steps, cuda=cuda)
    assert all(bool(block._compiled_call_impl) == compiled for block in student.blocks)
    assert bool(student._compiled_call_impl) == (cuda and bool(compile))
    several = StudentModel(ModelConfig(**SMALL))
    prepare_bodies(several, None, TrainingConfig(), steps=steps, cuda=cuda, engine="ddp")
    assert several._compiled_call_impl is None
