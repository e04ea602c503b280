"""各种结构的 LoRA：adapter 装在起作用的线性层上，导出的就是基座加 adapter；别的一行拒绝。"""

import logging

import pytest
import torch
from model_types import VOCAB, model_of
from peft.tuners.lora import LoraLayer
from torch import nn

from distillab.config.model_sections import LoraConfig
from distillab.errors import DistillabError
from distillab.models.interface import PretrainedLM
from distillab.models.lora import (
    adapter_parameters,
    adapters_off,
    add_lora,
    base_parameters,
    merged_copy,
)

FUSED = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text", "qwen3_next"]
MIXERS = ["mamba", "mamba2", "jamba", "falcon_h1", "nemotron_h", "recurrent_gemma"]
PLAIN = ["llama", "gpt2", "opt", "phi3"]


def adapted(model):
    """装了 adapter 的层的末段名字。"""
    return {
        name.rpartition(".")[2]
        for name, part in model.named_modules()
        if isinstance(part, LoraLayer)
    }


def trained(name, **options):
    """装上 adapter，各个都不是 0，并算出梯度。"""
    model = add_lora(PretrainedLM(model_of(name)), LoraConfig(rank=2, **options))
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.copy_(0.05 * torch.randn(parameter.shape))
    ids = torch.randint(3, VOCAB, (2, 20))
    model.logits(model(ids)).logsumexp(-1).sum().backward()
    return model, ids


@pytest.mark.parametrize("name", [*FUSED, *MIXERS, *PLAIN])
def test_the_export_is_base_and_adapters_and_every_adapter_is_trained(name):
    model, ids = trained(name)
    assert all(parameter.grad is not None for parameter in adapter_parameters(model))
    assert all(parameter.grad is None for parameter in base_parameters(model))
    merged = merged_copy(model)
    assert merged.state_dict().keys() == model_of(name).state_dict().keys()
    with torch.no_grad():
        expected = model.logits(model(ids))
        found = merged(input_ids=ids).logits
        with adapters_off(model):
            base = model.logits(model(ids))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - base).abs().max() > 0.1
    torch.testing.assert_close(base, model_of(name)(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FUSED)
def test_fused_experts_stay_as_they_are_and_the_log_says_so(name, caplog):
    with caplog.at_level(logging.INFO, "distillab"):
        model = add_lora(PretrainedLM(model_of(name)), LoraConfig(rank=2))
    assert "no adapters on 'experts.down_proj', 'experts.gate_up_proj'" in caplog.text
    assert "o_proj" in adapted(model)
    for part in model.modules():
        if isinstance(part, LoraLayer):
            assert type(part.get_base_layer()) is nn.Linear


def test_dense_layers_beside_fused_experts_keep_their_adapters():
    for name in ("deepseek_v3", "qwen3_next"):  # 第一层没有专家；共享专家
        model = add_lora(PretrainedLM(model_of(name)), LoraConfig(rank=2))
        assert {"gate_proj", "up_proj", "down_proj"} <= adapted(model)


@pytest.mark.parametrize(("name", "left_out"), [("mamba", "dt_proj"), ("jamba", "out_proj")])
def test_layers_whose_weight_is_read_directly_get_none(name, left_out):
    model = PretrainedLM(model_of(name))
    with pytest.raises(DistillabError, match=f"an adapter on '{left_out}' has no effect"):
        add_lora(model, LoraConfig(rank=2, target_modules=[left_out]))
    assert left_out not in adapted(add_lora(model, LoraConfig(rank=2)))


@pytest.mark.parametrize("target", ["gate_up_proj", "experts", "gate"])
def test_fused_experts_named_outright_are_refused_in_one_line(target):
    model = PretrainedLM(model_of("qwen3_moe"))
    with pytest.raises(DistillabError, match=f"no linear layer is named '{target}'") as caught:
        add_lora(model, LoraConfig(rank=2, target_modules=[target]))
    assert "\n" not in str(caught.value)


def test_adapters_with_dropout_in_half_precision_beside_fused_experts():
    model = PretrainedLM(model_of("mixtral").bfloat16())
    add_lora(model, LoraConfig(rank=2, dropout=0.1))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randint(3, VOCAB, (1, 9))).isfinite().all()
