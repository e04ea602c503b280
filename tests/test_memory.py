"""由形状算出的内存与运算次数，与真的模型、真的测量相符。"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from distillab.config import LoraConfig, ModelConfig
from distillab.fused import BUDGET_BYTES
from distillab.language_model import PretrainedLM
from distillab.memory import LOSS_BUFFERS, SHAPES, Shape, Step
from distillab.model import StudentModel

TINY = ModelConfig(
    hidden_size=64, num_layers=4, num_heads=8, num_kv_heads=2, intermediate_size=320,
    vocab_size=100, max_seq_len=64,
)  # fmt: skip
RECORDS = Path(__file__).parents[1] / "benchmarks" / "results"


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


def test_parameters_are_those_of_the_student():
    model = StudentModel(TINY)
    assert Shape.of(TINY).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_autograd_keeps(precision):
    model = StudentModel(TINY)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # 留住它，地址才不会再用
        return tensor

    batch, length = 4, 48
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"),
    ):
        model(torch.randint(0, 100, (batch, length)))
    step = Step(Shape.of(TINY), None, batch * length, precision=precision)
    parts = step.memory()
    expected = parts["student activations"] + parts.get("autocast weights", 0)
    assert sum(size for size, _ in kept.values()) == pytest.approx(expected, rel=0.03)


def test_trained_parameters_of_lora_are_the_adapters():
    pytest.importorskip("peft")
    from distillab.lora import add_lora

    shape = Shape(64, 2, 4, 2, 16, 96, 100)
    options = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
               "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 100}  # fmt: skip
    model = AutoModelForCausalLM.from_config(LlamaConfig(**options))
    adapted = add_lora(PretrainedLM(model), LoraConfig(rank=4))
    found = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert Step(shape, None, 8, lora_rank=4).trained == found


def test_shares_shrink_what_is_sharded_and_nothing_else():
    alone = Step(SHAPES["Qwen3-8B"], SHAPES["Qwen3-8B"], 8192, precision="bf16").memory()
    eight = Step(SHAPES["Qwen3-8B"], SHAPES["Qwen3-8B"], 8192, precision="bf16", shards=8).memory()
    for part in ("student weights", "gradients", "optimizer"):
        assert eight[part] == alone[part] // 8
    assert eight["teacher weights"] == alone["teacher weights"]


def test_the_budget_of_the_loss_is_the_one_that_the_loss_uses():
    assert dict(LOSS_BUFFERS) == BUDGET_BYTES


def test_a_step_of_the_chinese_student_has_the_known_number_of_operations():
    step = Step(Shape.of(ModelConfig()), SHAPES["Qwen2.5-0.5B"], 8 * 512, precision="fp16")
    operations = step.operations(512)
    assert sum(operations.values()) == pytest.approx(7.25e12, rel=0.001)
    assert operations["heads"] / sum(operations.values()) == pytest.approx(0.42, abs=0.003)


@pytest.mark.parametrize(
    ("case", "student", "teacher", "tokens"),
    [
        ("a", Shape(576, 15, 9, 3, 64, 1536, 49152), "SmolLM2-135M", 4 * 256),
        ("b", Shape.of(ModelConfig()), "Qwen2.5-0.5B", 512),
    ],
)
def test_a_recorded_step_took_about_what_is_computed(case, student, teacher, tokens):
    records = json.loads((RECORDS / "train_step-cpu.json").read_text())
    (record,) = (r for r in records if (r["case"], r["implementation"]) == (case, "distillab"))
    parts = Step(student, SHAPES[teacher], tokens).memory("cpu")
    extra = sum(size for name, size in parts.items() if "weights" not in name)
    assert record["extra_bytes"] == pytest.approx(extra - parts["optimizer"], rel=0.25)
