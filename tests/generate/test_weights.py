"""采样用的权重：前后一个比特也不变，结果与原来的相同。"""

import psutil
import pytest
import torch
from torch import nn

from distillab.config.model_sections import LoraConfig
from distillab.generate import weights as module
from distillab.generate.generator import TextGenerator
from distillab.generate.weights import sampling_weights
from distillab.models.interface import PretrainedLM
from distillab.models.lora import adapter_parameters, add_lora
from distillab.targets import Head

IDS = torch.arange(24).view(4, 6) * 7 % 400


@pytest.fixture(params=["plain", "lora"])
def model(request, tiny_llama):
    model = PretrainedLM(tiny_llama)
    if request.param == "plain":
        return model
    generator = torch.Generator().manual_seed(3)
    add_lora(model, LoraConfig(rank=4))
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def snapshot(model):
    """每个参数在哪里、怎么放、存了什么。"""
    return {
        name: (p.data_ptr(), p.stride(), p.requires_grad, p.detach().clone())
        for name, p in model.named_parameters()
    }


def assert_untouched(model, before):
    for name, parameter in model.named_parameters():
        where, stride, trained, data = before[name]
        assert (parameter.data_ptr(), parameter.stride(), parameter.requires_grad) == (
            where, stride, trained,
        )  # fmt: skip
        assert torch.equal(parameter, data)


@pytest.mark.parametrize("rows", [1, 4])
@torch.no_grad()
def test_logits_are_those_of_the_model_and_nothing_is_left_behind(model, rows):
    before, expected = snapshot(model), model.logits(model(IDS))
    with sampling_weights(model, rows, 16):
        torch.testing.assert_close(model.logits(model(IDS)), expected, atol=1e-4, rtol=1e-5)
    assert_untouched(model, before)
    assert torch.equal(model.logits(model(IDS)), expected)


@pytest.mark.parametrize(("rows", "steps"), [(4, 16), (4, 15), (3, 16)])
def test_weights_are_stored_by_column_for_many_rows_and_steps_only(tiny_llama, rows, steps):
    model = PretrainedLM(tiny_llama)
    weight = tiny_llama.model.layers[0].mlp.up_proj.weight
    with sampling_weights(model, rows, steps):
        assert weight.is_contiguous() is not (rows >= 4 and steps >= 16)
        assert model.head.weight.is_contiguous() is weight.is_contiguous()
    assert weight.is_contiguous()


def test_a_failure_while_sampling_restores_the_weights(model, tiny_tokenizer, monkeypatch):
    before = snapshot(model)

    def fail(*_):
        raise RuntimeError("stop here")

    monkeypatch.setattr(Head, "logits", fail)
    with pytest.raises(RuntimeError, match="stop here"):
        TextGenerator(model, tiny_tokenizer).generate_ids(IDS, max_new_tokens=20)
    assert_untouched(model, before)


def test_training_goes_on_as_if_nothing_had_been_sampled(model, tiny_tokenizer):
    def gradients():
        model.zero_grad()
        model.logits(model(IDS)).logsumexp(-1).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    TextGenerator(model, tiny_tokenizer).generate_ids(IDS, strategy="sample", max_new_tokens=20)
    for found, wanted in zip(gradients(), expected, strict=True):
        assert torch.equal(found, wanted)


@torch.no_grad()
def test_adapters_run_no_products_of_their_own_while_merged(tiny_qwen2):
    model = add_lora(PretrainedLM(tiny_qwen2), LoraConfig(rank=4))
    calls = []
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear) and ".lora_" in name:
            part.register_forward_hook(lambda *_: calls.append(1))
    with sampling_weights(model, 2, 16):
        model(IDS)
    assert not calls
    model(IDS)
    assert calls


@torch.no_grad()
def test_adapters_of_a_half_precision_base_are_not_merged(tiny_qwen2):
    model = add_lora(PretrainedLM(tiny_qwen2.to(torch.bfloat16)), LoraConfig(rank=4))
    before = snapshot(model)
    with sampling_weights(model, 8, 64):
        base = {name: p for name, p in model.named_parameters() if ".lora_" not in name}
        assert all(p.data_ptr() == before[name][0] for name, p in base.items())
        assert all(not part.disable_adapters for part in model.modules() if hasattr(part, "lora_A"))


@pytest.mark.parametrize("rows", [2, 8])
@torch.no_grad()
def test_in_autocast_nothing_changes_and_frozen_weights_are_cast_once(model, rows):
    before, head = snapshot(model), model.head.weight
    block = model.blocks[0].mlp.up_proj
    frozen = not block.weight.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.logits(model(IDS))
        with sampling_weights(model, rows, 16):
            assert block.weight.dtype == (torch.bfloat16 if frozen else torch.float32)
            assert head.dtype == torch.float32
            assert torch.equal(model.logits(model(IDS)), expected)
        assert torch.equal(model.logits(model(IDS)), expected)
    assert_untouched(model, before)


def test_in_autocast_the_hooks_on_gradients_still_fire(model, tiny_tokenizer):
    """DDP 靠它们归约：挂在 ``AccumulateGrad`` 上，换了它就不再触发。"""
    trained = [p for p in model.parameters() if p.requires_grad and p.ndim == 2]
    nodes = [p.expand_as(p).grad_fn.next_functions[0][0] for p in trained]
    fired = []
    for node in nodes:
        node.register_hook(lambda *_: fired.append(1))
    with torch.autocast("cpu", torch.bfloat16):
        TextGenerator(model, tiny_tokenizer).generate_ids(IDS, max_new_tokens=20)
    with torch.autocast("cpu", torch.bfloat16):  # 2.11 之前的 autocast 也记下没有梯度的拷贝
        model.logits(model(IDS)).logsumexp(-1).sum().backward()
    assert len(fired) == len(trained)


def test_without_memory_for_a_copy_the_weights_stay(tiny_llama, monkeypatch):
    full = type("Memory", (), {"available": 1000})
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: full)
    assert psutil.virtual_memory().available == 1000
    with sampling_weights(PretrainedLM(tiny_llama), 8, 64):
        assert all(p.is_contiguous() for p in tiny_llama.parameters())
