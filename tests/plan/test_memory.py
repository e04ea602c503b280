"""由形状算出的内存与运算次数，与真的模型、真的测量相符。"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_types import model_of
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from distillab.config.model_sections import LoraConfig, ModelConfig
from distillab.config.recipes import load_recipe
from distillab.config.schema import LossConfig
from distillab.export.convert import from_hf
from distillab.loss.buffers import Chunks
from distillab.loss.chunking import budget_bytes
from distillab.loss.products import HeadProducts, MixedProducts
from distillab.loss.rows import RowSpec
from distillab.models.interface import PretrainedLM
from distillab.models.student import StudentModel
from distillab.plan.hardware import find_device
from distillab.plan.memory import Step
from distillab.plan.plan import plan
from distillab.plan.shapes import SHAPES, Shape, from_config
from distillab.targets import Head, HiddenTargets

TINY = ModelConfig(
    hidden_size=64, num_layers=4, num_heads=8, num_kv_heads=2, intermediate_size=320,
    vocab_size=100, max_seq_len=64,
)  # fmt: skip
RECORDS = Path(__file__).parents[2] / "benchmarks" / "results"


def transformers_model(shape):
    kind = Qwen3Config if shape.qk_norm else Qwen2Config if shape.qkv_bias else LlamaConfig
    options = {} if kind is Qwen2Config else {"head_dim": shape.head_dim}
    config = kind(
        hidden_size=shape.hidden_size, num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads, num_key_value_heads=shape.num_kv_heads,
        intermediate_size=shape.intermediate_size, vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.tied, **options,
    )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_transformers_model(name):
    model = transformers_model(SHAPES[name])
    assert SHAPES[name].parameters == sum(p.numel() for p in model.parameters())


GEMMA = {"norm_unit_offset": True, "post_norms": True, "scaled_embeddings": True}
OPTIONS = {
    "qwen2": {},
    "llama": {"o_bias": True, "ffn_bias": True, "tie_embeddings": False},
    "qwen3": {"qk_norm": True, "head_dim": 12, "qkv_bias": False},
    "gemma2": {**GEMMA, "qkv_bias": False, "attention_softcap": 50.0},
    "gemma3": {**GEMMA, "qkv_bias": False, "qk_norm": True, "sliding_window": 16},
}


@pytest.mark.parametrize("layout", OPTIONS)
def test_parameters_are_those_of_the_student(layout):
    config = ModelConfig(**{**dict(TINY), **OPTIONS[layout]})
    model = StudentModel(config)
    assert Shape.of(config).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("qwen3", {"attention_bias": True}),
        ("gemma2", {}),
        ("gemma3_text", {}),
    ],
)
def test_a_config_file_gives_the_parameters_of_its_model(kind, options):
    model = model_of(kind, **options)
    shape = from_config(model.config.to_dict(), kind).shape
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.softcapped == (kind == "gemma2")
    assert shape.sliding_window == getattr(from_hf(model).config, "sliding_window", None)
    assert shape.copied().parameters == from_hf(model).num_parameters()


def kept_bytes(model, *inputs):
    """autograd 为反向留下的，权重之外，字节。"""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # 留住它，地址才不会再用
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*inputs)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("layout", OPTIONS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_autograd_keeps(precision, layout):
    batch, length = 4, 48
    config = ModelConfig(**{**dict(TINY), **OPTIONS[layout]})
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        found = kept_bytes(StudentModel(config), torch.randint(0, 100, (batch, length)))
    parts = Step(Shape.of(config), None, batch, length, precision=precision).moments()["loss"]
    expected = parts["student activations"] + parts.get("autocast weights", 0)
    assert found == pytest.approx(expected, rel=0.03)


def test_trained_parameters_of_lora_are_the_adapters():
    pytest.importorskip("peft")
    from distillab.models.lora import add_lora

    shape = Shape(64, 2, 4, 2, 16, 96, 100)
    options = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
               "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 100}  # fmt: skip
    model = AutoModelForCausalLM.from_config(LlamaConfig(**options))
    adapted = add_lora(PretrainedLM(model), LoraConfig(rank=4))
    found = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert Step(shape, None, 1, 8, lora_rank=4).trained == found


def test_shares_shrink_what_is_sharded_and_nothing_else():
    alone = Step(SHAPES["Qwen3-8B"], SHAPES["Qwen3-8B"], 2, 4096, precision="bf16")
    eight = replace(alone, engine="fsdp2", processes=8)
    one, other = alone.memory(), eight.memory()
    for part in ("student weights", "optimizer"):
        assert other[part] == one[part] // 8
    assert other["teacher weights"] == one["teacher weights"]
    assert replace(eight, shard_teacher=True).memory()["teacher weights"] == (
        one["teacher weights"] // 8
    )


def test_the_peak_is_one_moment_and_below_the_sum_of_all_peaks():
    step = Step(SHAPES["Qwen3-0.6B"], SHAPES["Qwen3-4B"], 4, 256, precision="bf16")
    name, parts = step.peak()
    moments = {moment: sum(found.values()) for moment, found in step.moments().items()}
    assert moments[name] == max(moments.values()) == sum(parts.values())
    assert sum(parts.values()) < sum(step.memory().values())


def test_the_parts_that_gradients_of_one_step_need_at_its_end():
    tied = Step(SHAPES["SmolLM2-135M"], None, 1, 8)
    head = SHAPES["SmolLM2-135M"].head_parameters * 4
    assert tied.moments()["embedding"]["gradients"] == tied.trained * 4 + head
    untied = replace(tied, student=replace(tied.student, tied=False))
    assert untied.moments()["embedding"]["gradients"] == untied.trained * 4
    window = replace(tied, accumulation=2).moments()
    assert window["loss"]["gradients"] == tied.trained * 4 + head
    assert window["embedding"]["gradients"] == tied.trained * 4 + 2 * head


@pytest.mark.parametrize("rows", [1, 7, 100, 1000])
@pytest.mark.parametrize("vocab", [400, 49152, 151936])
@pytest.mark.parametrize("teacher", [True, False])
def test_loss_buffers_are_those_of_the_loss(rows, vocab, teacher):
    shape = Shape(8, 1, 2, 1, 4, 16, vocab)
    step = Step(shape, shape if teacher else None, 1, rows)
    hidden = torch.empty(rows, 8, device="meta")
    targets = HiddenTargets(hidden, Head(torch.empty(vocab, 8, device="meta"))) if teacher else None
    spec = RowSpec.of(LossConfig(), vocab)
    chunks = Chunks(torch.empty(rows, 8), HeadProducts(torch.float32), targets, spec,
                    budget_bytes("cpu", 2**33, False))  # fmt: skip
    assert step.loss_buffers("cpu") == chunks.student.nbytes + chunks.teacher.nbytes


@pytest.mark.parametrize("device", ["t4", "h100"])
@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize(("rows", "vocab"), [(7, 400), (4096, 151665), (4096, 151936)])
def test_loss_buffers_on_a_gpu_are_those_of_its_kernels(rows, vocab, teacher, device):
    memory = find_device(device).memory
    shape = Shape(8, 1, 2, 1, 4, 16, vocab)
    step = Step(shape, shape if teacher else None, 1, rows, precision="fp16", device_memory=memory)
    hidden = torch.empty(rows, 8, device="meta")
    targets = HiddenTargets(hidden, Head(torch.empty(vocab, 8, device="meta"))) if teacher else None
    chunks = Chunks(hidden, MixedProducts(torch.float16), targets, RowSpec.of(LossConfig(), vocab),
                    budget_bytes("cuda", memory, True))  # fmt: skip
    found = step.loss_buffers("cuda") - 2 * shape.head_parameters
    assert found == sum(
        part.untyped_storage().nbytes()
        for part in (chunks.student, chunks.teacher, chunks.gradient)
    )
    assert found <= budget_bytes("cuda", memory, True)


@pytest.mark.parametrize("kind", ["lora", "qwen3", "padded"])
def test_activations_of_transformers_models_are_what_autograd_keeps(kind):
    if kind == "lora":
        pytest.importorskip("peft")
    from distillab.models.lora import add_lora

    shape = Shape(64, 4, 8, 2, 16, 320, 100, qk_norm=kind == "qwen3")
    name = Qwen3Config if kind == "qwen3" else LlamaConfig
    config = name(hidden_size=64, num_hidden_layers=4, num_attention_heads=8,
                  num_key_value_heads=2, head_dim=16, intermediate_size=320, vocab_size=100,
                  tie_word_embeddings=True)  # fmt: skip
    model = PretrainedLM(AutoModelForCausalLM.from_config(config))
    if kind == "lora":
        model = add_lora(model, LoraConfig(rank=4))
    batch, length = 4, 48
    mask = None
    if kind == "padded":
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[1, -1] = 0
    rank = 4 if kind == "lora" else None
    step = Step(shape, None, batch, length, lora_rank=rank, padded=kind == "padded")
    expected = step.moments()["loss"]["student activations"]
    ids = torch.randint(0, 100, (batch, length))
    assert kept_bytes(model.train(), ids, mask) == pytest.approx(expected, rel=0.03)


def test_a_step_of_the_chinese_student_has_the_known_number_of_operations():
    step = Step(Shape.of(ModelConfig()), SHAPES["Qwen2.5-0.5B"], 8, 512, precision="fp16")
    operations = step.operations()
    assert sum(operations.values()) == pytest.approx(7.25e12, rel=0.001)
    assert operations["heads"] / sum(operations.values()) == pytest.approx(0.42, abs=0.003)


@pytest.mark.parametrize(
    ("case", "student", "teacher", "sizes"),
    [
        ("a", Shape(576, 15, 9, 3, 64, 1536, 49152), "SmolLM2-135M", (4, 256)),
        ("b", Shape.of(ModelConfig()), "Qwen2.5-0.5B", (1, 512)),
    ],
)
def test_a_recorded_step_took_what_is_computed_and_what_malloc_keeps(case, student, teacher, sizes):
    records = json.loads((RECORDS / "train_step-cpu.json").read_text())
    (record,) = (r for r in records if (r["case"], r["implementation"]) == (case, "distillab"))
    _, parts = Step(student, SHAPES[teacher], *sizes).peak("cpu")
    extra = sum(size for name, size in parts.items() if "weights" not in name)
    assert 1 <= record["extra_bytes"] / (extra - parts["optimizer"]) <= 1.4


@pytest.mark.parametrize("record", json.loads((RECORDS / "plan-cpu.json").read_text()),
                         ids=lambda record: record["planned"])  # fmt: skip
def test_the_recorded_plans_are_what_is_computed(record):
    found = plan(load_recipe(record["recipe"], record["overrides"]), find_device("cpu"))
    parts = {name: size for name, size in found.parts.items() if name != "overhead"}
    assert (found.moment, parts) == (record["moment"], record["parts"])
    assert record["planned_bytes"] == sum(parts.values())
    assert record["ratio"] == record["planned_bytes"] / record["peak_bytes"]
    assert 1.05 < 1 / record["ratio"] < 1.5


def test_two_vocabularies_go_through_the_loss_one_after_the_other():
    """``alm`` 的缓冲区只有一份，宽的那个词表的；``uld`` 一行要得多，仍不超过块的上限。"""
    narrow, wide = (Shape(8, 1, 2, 1, 4, 16, vocab) for vocab in (400, 49152))
    budget = budget_bytes("cpu", 2**33, False)
    for student, teacher in ((narrow, wide), (wide, narrow)):
        step = Step(student, teacher, 1, 100, divergence="alm")
        spec = RowSpec.of(LossConfig(), 49152)
        chunks = Chunks(torch.empty(100, 8), HeadProducts(torch.float32), None, spec, budget)
        assert step.loss_buffers("cpu") == chunks.student.nbytes
        pairs = replace(step, divergence="uld").loss_buffers("cpu")
        assert chunks.student.nbytes < pairs <= budget
