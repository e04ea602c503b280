"""分片模型的完整拷贝：用时装满，用完放掉；半精度的与 autocast 逐位相同。"""

import pytest
import torch

from distillab.config.model_sections import LoraConfig
from distillab.distributed.sharding import WholeCopy
from distillab.export.convert import from_hf
from distillab.models.interface import PretrainedLM
from distillab.models.lora import add_lora
from distillab.models.own_blocks import through_own_blocks

IDS = torch.arange(24).view(4, 6) * 7 % 400
CPU = torch.device("cpu")


@pytest.fixture(params=["own", "pretrained", "lora", "own blocks"])
def model(request, tiny_qwen2):
    if request.param == "own":
        return from_hf(tiny_qwen2).eval()
    model = PretrainedLM(tiny_qwen2).eval()
    if request.param == "own blocks":
        return through_own_blocks(model)
    return add_lora(model, LoraConfig(rank=4)) if request.param == "lora" else model


def held(model):
    return sum(parameter.nbytes for parameter in model.parameters())


@torch.no_grad()
def test_a_copy_is_the_model_while_it_is_used_and_nothing_afterwards(model):
    copy, expected = WholeCopy(model, CPU), model.logits(model(IDS))
    for _ in range(2):
        with copy.filled(model) as whole:
            assert torch.equal(whole.logits(whole(IDS)), expected)
        assert held(whole) == 0
    with copy.filled(model, keep=False) as whole:
        assert held(whole) == 0


@torch.no_grad()
def test_a_copy_for_autocast_holds_half_the_layers_and_gives_the_same_bits(model):
    copy = WholeCopy(model, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.logits(model(IDS))
        with copy.filled(model, compute=torch.bfloat16) as whole:
            assert torch.equal(whole.logits(whole(IDS)), expected)
            assert held(whole) < held(model)
            halves = {name for name, p in whole.named_parameters() if p.dtype == torch.bfloat16}
            products = {name for name, p in whole.named_parameters() if "_proj" in name}
            assert halves == products
    with copy.filled(model) as whole:  # 评测与导出的仍是全部精度
        assert held(whole) == held(model)
