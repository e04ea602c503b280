"""LoRA：只训练 adapter；关掉它们就是教师；检查点不存基座；导出与训练时的学生相同。"""

import copy
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM

from distillab.assembly.parts import build_models
from distillab.batch import Batch, Example, Tokens, View, collate_examples
from distillab.config.model_sections import LoraConfig
from distillab.config.schema import EvaluateConfig, LossConfig, Recipe, TrainingConfig
from distillab.errors import DistillabError
from distillab.export.convert import export_student
from distillab.models.interface import PretrainedLM, evaluating
from distillab.models.lora import (
    adapter_parameters,
    adapters_off,
    add_lora,
    base_parameters,
    has_lora,
    merged_copy,
)
from distillab.run import train
from distillab.run_file_shapes import read_metrics
from distillab.teachers.in_process import AdapterOffTeacher, LocalTeacher
from distillab.train.checkpoint import load_checkpoint, load_student
from distillab.train.checkpoint_files import checkpoints
from distillab.train.module import DistillationModule
from distillab.train.trainer import DistillationTrainer
from distillab.vocabulary import Vocabulary

IDS = torch.arange(24).view(2, 12) * 7 % 400
RANK_4 = {"rank": 4}
VOCABULARY = Vocabulary(400)
VIEW = View(IDS, None, torch.arange(0, 24, 3))


def shake(student, scale=0.05):
    """让 adapter 不再是零，像训练过一样。"""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter_parameters(student):
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return student


@pytest.fixture(params=["tiny_qwen2", "tiny_llama"])
def base(request):
    return PretrainedLM(request.getfixturevalue(request.param))


@pytest.fixture
def student(tiny_qwen2):
    return shake(add_lora(PretrainedLM(tiny_qwen2), LoraConfig(rank=4)))


class Privileged(Dataset):
    """学生只看到问题，教师还看到一段经验；答案相同。"""

    def __init__(self, count=24):
        generator = torch.Generator().manual_seed(count)
        self.rows = torch.randint(397, (count, 14), generator=generator).tolist()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        experience, question, answer = self.rows[i][:4], self.rows[i][4:9], self.rows[i][9:]

        def view(prompt):
            return Tokens(prompt + answer, list(range(len(prompt), len(prompt) + len(answer))))

        return Example(view(question), view(experience + question))


def collate(examples):
    return collate_examples(examples, pad_id=0)


@pytest.fixture
def make(tmp_path, tiny_qwen2):
    """造一个以自己的基座为教师的训练循环；初始的权重总是相同。"""

    def make(name="run", lora=None, self_teacher=True, dtype=torch.float32, **config):
        torch.manual_seed(0)
        model = copy.deepcopy(tiny_qwen2).to(dtype)
        student = add_lora(PretrainedLM(model), lora or LoraConfig(rank=4, dropout=0.1))
        separate = LocalTeacher(PretrainedLM(copy.deepcopy(tiny_qwen2).to(dtype)))
        fast = {"batch_size": 4, "max_steps": 6, "warmup_steps": 1, "learning_rate": 1e-2,
                "log_interval": 1, "eval_interval": 3, "save_interval": 3}  # fmt: skip
        return DistillationTrainer(
            student,
            AdapterOffTeacher(student) if self_teacher else separate,
            Privileged(),
            Privileged(6),
            TrainingConfig(**fast | config),
            tmp_path / name,
            loss=LossConfig(alpha=1.0, temperature=1.0),
            evaluate=EvaluateConfig(batch_size=4),
            collate=collate,
        )

    return make


def losses(trainer):
    rows = read_metrics(trainer.run_dir / "metrics.jsonl")
    return [(row["kind"], row["step"], row.get("loss"), row.get("kl")) for row in rows]


def storage_bytes(*models):
    """几个模型一共占多少内存，共用的只算一次。"""
    storages = {
        parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes()
        for model in models
        for parameter in model.parameters()
    }
    return sum(storages.values())


# ---------------------------------------------------------------- 装上与关掉


def test_new_adapters_change_nothing_and_shaken_ones_do(base):
    before = base(IDS)
    add_lora(base, LoraConfig(rank=4))
    assert torch.equal(base(IDS), before)
    shake(base)
    assert (base(IDS) - before).abs().max() > 0.1


def test_adapters_off_is_exactly_the_base_model(base):
    original = copy.deepcopy(base)
    shake(add_lora(base, LoraConfig(rank=4)))
    with adapters_off(base):
        assert torch.equal(base(IDS), original(IDS))
        assert torch.equal(base.head.weight, original.head.weight)
        assert all(parameter.requires_grad for parameter in adapter_parameters(base))
    assert not torch.equal(base(IDS), original(IDS))


def test_only_adapters_are_trained_and_the_output_layer_has_none(base):
    parameters = base.num_parameters()
    add_lora(base, LoraConfig(rank=4))
    trained = {name for name, p in base.named_parameters() if p.requires_grad}
    adapters = set(map(id, adapter_parameters(base)))
    assert trained == {name for name, p in base.named_parameters() if id(p) in adapters}
    assert len(trained) == 3 * 7 * 2  # 三层，每层七个矩阵，各有 A 与 B
    assert not any("lm_head" in name or "embed" in name for name in trained)
    assert sum(p.numel() for p in base_parameters(base)) == parameters
    assert not base.head.weight.requires_grad


def test_rank_alpha_dropout_and_targets_are_the_ones_asked_for(tiny_qwen2):
    config = LoraConfig(rank=3, alpha=9.0, dropout=0.25, target_modules=["q_proj", "1.mlp.up_proj"])
    model = add_lora(PretrainedLM(tiny_qwen2), config)
    layer = tiny_qwen2.model.layers[1].mlp.up_proj
    assert layer.lora_A["default"].weight.shape == (3, 32)
    assert (layer.scaling["default"], layer.lora_dropout["default"].p) == (3.0, 0.25)
    assert len(adapter_parameters(model)) == (3 + 1) * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_of_a_half_precision_base_are_float32(tiny_qwen2, dtype):
    model = add_lora(PretrainedLM(tiny_qwen2.to(dtype)), LoraConfig(rank=4))
    assert {p.dtype for p in adapter_parameters(model)} == {torch.float32}
    assert {p.dtype for p in base_parameters(model)} == {dtype}
    shake(model)(IDS).sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in adapter_parameters(model))


def test_the_whole_model_is_in_eval_after_the_adapters_are_added(tiny_qwen2):
    model = add_lora(PretrainedLM(tiny_qwen2), LoraConfig(dropout=0.5))
    assert not any(part.training for part in model.modules())


def test_a_model_without_adapters_is_all_base(base):
    assert not has_lora(base)
    assert adapter_parameters(base) == []
    assert len(base_parameters(base)) == len(list(base.parameters()))
    with adapters_off(base):
        base(IDS)


# ---------------------------------------------------------------- 拒绝


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["lm_head"], "'lm_head' is the output layer, which cannot be adapted"),
        (["q_proj", "q_porj"], "no linear layer is named 'q_porj', did you mean 'q_proj'"),
        (["mlp"], "no linear layer is named 'mlp', choose from down_proj, gate_proj"),
        (["embed_tokens"], "no linear layer is named 'embed_tokens', choose from"),
        (["proj"], "no linear layer is named 'proj'"),
    ],
)
def test_a_target_that_cannot_be_adapted_is_named_in_one_line(tiny_qwen2, targets, message):
    names = set(tiny_qwen2.state_dict())
    with pytest.raises(DistillabError, match=message) as caught:
        add_lora(PretrainedLM(tiny_qwen2), LoraConfig(target_modules=targets))
    assert str(caught.value).startswith("student.lora.target_modules: ")
    assert "\n" not in str(caught.value)
    assert set(tiny_qwen2.state_dict()) == names


def test_without_peft_the_extra_is_named_in_one_line(tiny_qwen2, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert not has_lora(tiny_qwen2)
    with pytest.raises(
        DistillabError, match=r"student\.lora needs peft .*distillab\[peft\]"
    ) as caught:
        add_lora(PretrainedLM(tiny_qwen2), LoraConfig())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"lora": {}}, "lora needs student.path"),
        ({"lora": {}, "init": {"from": "teacher", "layers": 1}}, "lora needs student.path"),
        ({"path": "a", "lora": {"target_modules": []}}, "target_modules names no layer"),
        ({"path": "a", "lora": {"target_modules": [""]}}, "target_modules names no layer"),
        ({"path": "a", "lora": {"rank": 0}}, "greater than 0"),
        ({"path": "a", "lora": {"dropout": 1.0}}, "less than 1"),
        ({"path": "a", "lora": {"target_modules": "q_proj"}}, "all-linear"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(student, message):
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate(
            {"name": "x", "teacher": {"path": "t"}, "data": {"source": "d"}, "student": student}
        )


# ---------------------------------------------------------------- 自己的基座当教师


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_targets_are_those_of_a_separate_copy(tiny_qwen2, dtype, autocast):
    tiny_qwen2.to(dtype)
    for layer in tiny_qwen2.model.layers:
        layer.self_attn.attention_dropout = 0.5  # 教师从不 dropout，学生在 train 也一样
    separate = LocalTeacher(PretrainedLM(copy.deepcopy(tiny_qwen2)))
    student = shake(add_lora(PretrainedLM(tiny_qwen2), LoraConfig(rank=4, dropout=0.5)))
    student.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = AdapterOffTeacher(student).targets(VIEW, Vocabulary(390))
        expected = separate.targets(VIEW, Vocabulary(390))
    assert torch.equal(found.hidden, expected.hidden)
    assert found.hidden.dtype == dtype
    assert torch.equal(found.head.weight, expected.head.weight)
    assert len(found.head.weight) == 390
    assert not found.hidden.requires_grad


@pytest.mark.parametrize("fails", [False, True])
def test_it_leaves_the_student_as_it_was(student, fails, monkeypatch):
    student.train()
    student.model.model.layers[0].eval()  # 混着的状态也要原样还回来
    layer = student.model.model.layers[2].mlp.up_proj
    layer.enable_adapters(False)  # 本来就关着的，不该被打开

    def state():
        return (
            [part.training for part in student.modules()],
            [getattr(part, "disable_adapters", None) for part in student.modules()],
            [(p.requires_grad, p._version, p.data_ptr()) for p in student.parameters()],
            torch.is_grad_enabled(),
        )

    before = state()
    teacher = AdapterOffTeacher(student)
    if fails:
        inner = teacher.model.model.model.norm
        monkeypatch.setattr(inner, "forward", lambda hidden: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            teacher.targets(VIEW, VOCABULARY)
    else:
        teacher.targets(VIEW, VOCABULARY)
    assert state() == before
    assert teacher.model is student


def test_it_takes_no_second_copy_of_the_weights(tiny_qwen2):
    size = storage_bytes(tiny_qwen2)
    separate = LocalTeacher(PretrainedLM(copy.deepcopy(tiny_qwen2)))
    student = add_lora(PretrainedLM(tiny_qwen2), LoraConfig(rank=4))
    adapters = 4 * sum(p.numel() for p in adapter_parameters(student))
    assert storage_bytes(student, AdapterOffTeacher(student).model) == size + adapters
    assert storage_bytes(student, separate.model) == 2 * size + adapters


def test_evaluating_restores_every_module_by_itself(student):
    student.train()
    student.model.model.norm.eval()
    before = [part.training for part in student.modules()]
    with evaluating(student):
        assert not any(part.training for part in student.modules())
    assert [part.training for part in student.modules()] == before


# ---------------------------------------------------------------- 梯度与训练


def gradients(student, batch, checkpointing=False):
    student.zero_grad()
    if checkpointing:
        student.enable_activation_checkpointing()
    module = DistillationModule(student, LossConfig(alpha=1.0, temperature=1.0), VOCABULARY).train()
    targets = AdapterOffTeacher(student).targets(batch.teacher, VOCABULARY)
    module(batch, targets).total.backward()
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def privileged_batch() -> Batch:
    data = Privileged()
    return collate([data[i] for i in range(4)])


def test_gradients_reach_every_adapter_and_nothing_else(student):
    found = gradients(student, privileged_batch())
    adapters = set(map(id, adapter_parameters(student)))
    assert set(found) == {n for n, p in student.named_parameters() if id(p) in adapters}
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    assert student.head.weight.grad is None


def test_gradients_are_those_of_a_separate_teacher(student, tiny_qwen2):
    batch = privileged_batch()
    found = gradients(student, batch)
    with adapters_off(student):
        plain = student(batch.teacher.input_ids, batch.teacher.attention_mask)
    base = LocalTeacher(PretrainedLM(merged_base(student)))
    assert torch.equal(base.targets(batch.teacher, VOCABULARY).hidden, batch.teacher.rows(plain))
    student.zero_grad()
    module = DistillationModule(student, LossConfig(alpha=1.0, temperature=1.0), VOCABULARY).train()
    module(batch, base.targets(batch.teacher, VOCABULARY)).total.backward()
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(found[name], parameter.grad)


def merged_base(student):
    """没有 adapter 的基座的拷贝。"""
    plain = PretrainedLM(copy.deepcopy(student.model))
    with torch.no_grad():
        for parameter in adapter_parameters(plain):
            parameter.zero_()
    return merged_copy(plain)


def test_activation_checkpointing_trains_the_adapters_alike(student):
    batch = privileged_batch()
    plain = gradients(student, batch)
    calls = []
    student.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    recomputed = gradients(student, batch, checkpointing=True)
    assert len(calls) == 3  # 教师、学生，再加反向时重算
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_on_a_privileged_view_moves_only_the_adapters(make, dtype, precision):
    trainer = make(max_steps=20, precision=precision, dtype=dtype)
    base = [p.clone() for p in base_parameters(trainer.student)]
    adapters = [p.clone() for p in adapter_parameters(trainer.student)]
    before = trainer.evaluate()[0]["kl"]
    trainer.train()
    for parameter, old in zip(base_parameters(trainer.student), base, strict=True):
        assert torch.equal(parameter, old)
    for parameter, old in zip(adapter_parameters(trainer.student), adapters, strict=True):
        assert not torch.equal(parameter, old)
    rows = [loss for kind, _, loss, _ in losses(trainer) if kind == "train"]
    assert sum(rows[-6:]) < 0.8 * sum(rows[:6])  # 数据共 6 批
    assert before > 0.1  # 经验让教师与学生一开始就不同


def test_a_run_with_its_own_base_equals_one_with_a_copy_of_it(make):
    one = make("self")
    one.train()
    other = make("copy", self_teacher=False)
    other.train()
    assert losses(one) == losses(other)


def test_the_teacher_is_still_the_base_after_training(make):
    trainer = make()
    before = trainer.evaluate()[1]
    trainer.train()
    assert trainer.evaluate()[1] == before


# ---------------------------------------------------------------- 检查点


def test_checkpoints_hold_the_adapters_and_not_the_base(make):
    trainer = make()
    trainer.train()
    adapters = sum(p.numel() for p in adapter_parameters(trainer.student))
    names = {n for n, p in trainer.module.named_parameters() if p.requires_grad}
    for path in (checkpoints(trainer.checkpoint_dir)[-1], trainer.checkpoint_dir / "best"):
        file = path / "model.safetensors"
        assert set(load_file(file)) == names
        assert 4 * adapters < file.stat().st_size < 4 * adapters + 8192
    optimizer = checkpoints(trainer.checkpoint_dir)[-1] / "optimizer.bin"
    assert optimizer.stat().st_size < 2 * 4 * adapters + 40_000  # 两个矩，外加每个张量的账目


def test_resumed_run_equals_an_uninterrupted_one(make):
    whole = make("whole")
    whole.train()
    part = make("part")
    part._validate_and_save, real = lambda *_: None, part._validate_and_save

    def stop(*arguments):
        real(*arguments)
        if part.state.current_step == 3:
            raise KeyboardInterrupt

    part._validate_and_save = stop
    with pytest.raises(KeyboardInterrupt):
        part.train()
    again = make("part")
    again.train(resume=True)
    assert losses(again) == losses(whole)
    for left, right in zip(again.student.parameters(), whole.student.parameters(), strict=True):
        assert torch.equal(left, right)


def test_best_is_read_into_a_fresh_student(make):
    trainer = make()
    trainer.train()
    fresh = make("fresh")
    load_student(fresh.student, trainer.checkpoint_dir / "best")
    state = trainer.state
    expected = next(r[3] for r in losses(trainer) if r[:2] == ("validation", state.best_step))
    assert fresh.evaluate()[0]["kl"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoraConfig(rank=8), "holds another model: size mismatch"),
        (LoraConfig(rank=4, target_modules=["q_proj"]), "holds another model: .* has no place"),
        (LoraConfig(rank=4, target_modules=["q_proj", "v_proj"]), "has no place in it"),
    ],
)
def test_checkpoint_of_other_adapters_is_refused(make, lora, message):
    trainer = make()
    trainer.train()
    path = checkpoints(trainer.checkpoint_dir)[-1]
    other = make("other", lora=lora)
    for load in (lambda: load_student(other.student, path),
                 lambda: load_checkpoint(other.accelerator, path)):  # fmt: skip
        with pytest.raises(DistillabError, match=message) as caught:
            load()
        assert "\n" not in str(caught.value)


def test_checkpoint_that_lacks_an_adapter_is_refused(make):
    trainer = make("small", lora=LoraConfig(rank=4, target_modules=["q_proj"]))
    trainer.train()
    path = checkpoints(trainer.checkpoint_dir)[-1]
    other = make("other")
    with pytest.raises(DistillabError, match=r"holds another model: .*lora_A.* is missing"):
        load_student(other.student, path)


def test_checkpoint_of_several_processes_is_read_by_one(make, monkeypatch):
    trainer = make()
    collect = trainer.accelerator.get_state_dict

    def wrapped(model, unwrap=True):  # DDP 的名字都带 module.
        state = collect(model, unwrap)
        return state if unwrap else {f"module.{name}": value for name, value in state.items()}

    monkeypatch.setattr(trainer.accelerator, "get_state_dict", wrapped)
    trainer.train()
    path = checkpoints(trainer.checkpoint_dir)[-1]
    fresh = make("fresh")
    load_student(fresh.student, path)
    for left, right in zip(fresh.student.parameters(), trainer.student.parameters(), strict=True):
        assert torch.equal(left, right)
    load_checkpoint(make("again").accelerator, path)


# ---------------------------------------------------------------- 导出


def test_export_is_a_plain_model_with_the_same_logits(base, tiny_tokenizer, tmp_path):
    shake(add_lora(base, LoraConfig(rank=4)), scale=0.02)
    expected = base.logits(base(IDS))
    before = copy.deepcopy(base.state_dict())
    target = export_student(base, tiny_tokenizer, tmp_path / "export")
    for name, value in base.state_dict().items():
        assert torch.equal(value, before[name])
    assert has_lora(base)
    assert not (target / "adapter_config.json").exists()
    weights = target / "model.safetensors"
    assert weights.stat().st_mode == (target / "config.json").stat().st_mode
    names = set(load_file(weights))
    assert not any("lora" in name or "base_layer" in name for name in names)
    loaded, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(loaded) is type(base.model)
    assert (loaded(IDS).logits - expected).abs().max() < 1e-5
    with adapters_off(base):
        assert (base.logits(base(IDS)) - expected).abs().max() > 0.1


def test_export_of_a_half_precision_base_keeps_small_updates(tiny_qwen2, tiny_tokenizer, tmp_path):
    student = add_lora(PretrainedLM(tiny_qwen2.bfloat16()), LoraConfig(rank=4))
    shake(student, scale=1e-4)  # 比 bf16 的半格小得多
    layer = student.model.model.layers[0].self_attn.q_proj
    update = layer.get_delta_weight("default").detach()
    assert update.abs().max() > 0
    target = export_student(student, tiny_tokenizer, tmp_path / "export")
    loaded = AutoModelForCausalLM.from_pretrained(target)
    assert loaded.dtype == torch.float32
    found = loaded.model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(
        found - layer.get_base_layer().weight.float(), update, rtol=0.05, atol=1e-8
    )
    assert {p.dtype for p in base_parameters(student)} == {torch.bfloat16}


def test_the_merged_copy_shares_nothing_with_the_student(student):
    own = {p.data_ptr() for p in student.parameters()}
    plain = merged_copy(student)
    assert not own & {p.data_ptr() for p in plain.parameters()}
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert not has_lora(plain)
    assert not hasattr(plain, "peft_config")


# ---------------------------------------------------------------- 配方


@pytest.fixture
def recipe(tmp_path, monkeypatch, tiny_qwen2, tiny_tokenizer):
    """以磁盘上同一个小模型为教师与学生的配方。"""
    monkeypatch.chdir(tmp_path)
    tiny_qwen2.save_pretrained("model")
    tiny_tokenizer.save_pretrained("model")
    words = ["the", "teacher", "gives", "a", "student", "soft", "targets"]
    texts = [4 * " ".join(words[i % 7 :] + words[: i % 5]) for i in range(60)]
    Path("text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    Path("link").symlink_to("model")

    def recipe(teacher=None, lora=RANK_4):
        return Recipe.model_validate(
            {
                "name": "lora",
                "teacher": {"path": "model"} | (teacher or {}),
                "student": {"path": "model", "lora": lora and RANK_4 | lora},
                "data": {"source": "text.jsonl", "max_seq_len": 16},
                "loss": {"alpha": 0.5},
                "train": {"batch_size": 4, "max_steps": 4, "warmup_steps": 1, "eval_interval": 2,
                          "log_interval": 1, "precision": "fp32", "learning_rate": 1e-2},
            }
        )  # fmt: skip

    return recipe


def built(recipe):
    return build_models(recipe.student, recipe.teacher, recipe.train)


@pytest.mark.parametrize(
    ("teacher", "lora", "dtype"),
    [
        ({}, {"dropout": 0.1}, torch.float32),
        ({"path": "./model/"}, {"alpha": 8.0}, torch.float32),
        ({"path": "link"}, {"rank": 2}, torch.float32),
        ({"dtype": "auto"}, {"dtype": "auto"}, torch.float32),
        ({"dtype": "bfloat16"}, {"dtype": "bfloat16"}, torch.bfloat16),
    ],
)
def test_the_same_model_is_loaded_once_and_the_log_says_what_that_saves(
    recipe, teacher, lora, dtype, caplog, tiny_qwen2
):
    caplog.set_level(logging.INFO, "distillab")
    parts = built(recipe(teacher, lora))
    assert parts.teacher is parts.student
    assert isinstance(parts.local_teacher(), AdapterOffTeacher)
    assert {p.dtype for p in base_parameters(parts.student)} == {dtype}
    count = sum(p.numel() for p in tiny_qwen2.parameters())
    adapters = sum(p.numel() for p in adapter_parameters(parts.student))
    assert parts.parameters == {"student": count + adapters, "teacher": count}
    assert f"no second copy, {count * dtype.itemsize:,} bytes saved" in caplog.text
    assert f"LoRA: {adapters:,} trained parameters over a frozen base of {count:,}" in caplog.text
    assert all(p.requires_grad for p in adapter_parameters(parts.student))


def test_in_two_types_it_is_loaded_twice_and_the_log_says_why(recipe, caplog):
    parts = built(recipe({"dtype": "bfloat16"}))
    assert parts.teacher is not parts.student
    assert type(parts.local_teacher()) is LocalTeacher
    assert parts.teacher.head.weight.dtype == torch.bfloat16
    assert "in bfloat16 and float32: two copies" in caplog.text


def test_code_of_its_own_makes_it_another_model(recipe):
    parts = built(recipe({"trust_remote_code": True}))
    assert type(parts.local_teacher()) is LocalTeacher


def test_another_model_is_an_ordinary_teacher(recipe, tiny_llama, tiny_tokenizer):
    tiny_llama.save_pretrained("other")
    tiny_tokenizer.save_pretrained("other")
    parts = built(recipe({"path": "other"}))
    assert type(parts.local_teacher()) is LocalTeacher
    assert has_lora(parts.student)
    assert not has_lora(parts.teacher)


def test_without_lora_the_same_model_is_loaded_twice(recipe):
    parts = built(recipe(lora=None))
    assert parts.teacher is not parts.student
    assert not has_lora(parts.student)
    assert parts.parameters["teacher"] == parts.parameters["student"]


def test_a_whole_run_exports_what_it_measured(recipe):
    run, summary = train(recipe())
    assert summary["student_before"] == summary["teacher"]
    assert summary["student_after"]["cross_entropy"] < summary["student_before"]["cross_entropy"]
    assert summary["parameters"]["teacher"] < summary["parameters"]["student"]
    loaded = PretrainedLM(AutoModelForCausalLM.from_pretrained(run.export))
    parts = built(recipe())
    load_student(parts.student, run.path / "checkpoints" / "best")
    difference = loaded.logits(loaded(IDS)) - parts.student.logits(parts.student(IDS))
    assert difference.abs().max() < 1e-5
