"""哪些层要紧：与 transformers 的隐状态、与逐层拿掉的老实算法比。"""

import copy
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distillab.config.model_sections import ModelConfig
from distillab.export.convert import from_hf
from distillab.models.importance import block_influence, greedy_removal, most_influential
from distillab.models.interface import PretrainedLM
from distillab.models.student import StudentModel


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 400, (length,), generator=generator) for length in (16, 9, 24)]


@torch.no_grad()
def test_block_influence_is_that_of_the_hidden_states_of_transformers(tiny_llama, rows):
    own, wrapped = from_hf(tiny_llama), PretrainedLM(copy.deepcopy(tiny_llama))
    tiny_llama.model.norm = nn.Identity()  # 不然最后一份隐状态是归一化过的
    cosines = []
    for row in rows:
        states = tiny_llama(row[None], output_hidden_states=True).hidden_states
        pairs = pairwise(states)
        cosines.append(torch.stack([F.cosine_similarity(a, b, dim=-1)[0] for a, b in pairs]))
    expected = (1 - torch.cat(cosines, dim=1)).mean(1).tolist()
    assert len(expected) == 3
    for model in (own, wrapped):
        assert block_influence(model, rows) == pytest.approx(expected, abs=1e-5)
        assert not any(block._forward_hooks for block in model.blocks)


def test_the_highest_scores_are_kept_in_the_order_of_the_layers():
    assert most_influential([0.1, 0.9, 0.3, 0.9, 0.2], 3) == [1, 2, 3]
    assert most_influential([0.5, 0.5, 0.5], 2) == [0, 1]


@torch.no_grad()
def test_greedy_removal_is_that_of_trying_every_layer_with_transformers(tiny_qwen2, rows):
    blocks, left = list(tiny_qwen2.model.layers), [0, 1, 2]
    expected = []

    def loss(kept):
        tiny_qwen2.model.layers = nn.ModuleList(blocks[layer] for layer in kept)
        tiny_qwen2.config.num_hidden_layers = len(kept)
        sums = (
            tiny_qwen2(row[None], labels=row[None], use_cache=False).loss * (len(row) - 1)
            for row in rows
        )
        return float(sum(sums)) / sum(len(row) - 1 for row in rows)

    full = from_hf(tiny_qwen2)
    while len(left) > 1:
        tried = {layer: loss([other for other in left if other != layer]) for layer in left}
        best = min(tried, key=tried.get)
        left.remove(best)
        expected.append((best, tried[best]))
    removed, losses = greedy_removal(full, rows, 1)
    assert removed == [layer for layer, _ in expected]
    assert losses == pytest.approx([loss for _, loss in expected], abs=1e-5)


@torch.no_grad()
def test_a_layer_keeps_its_own_window_when_others_are_removed(rows):
    torch.manual_seed(0)
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = ModelConfig(
        hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, intermediate_size=48,
        vocab_size=400, max_seq_len=64, sliding_window=4, layer_types=types,
    )  # fmt: skip
    model = StudentModel(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    removed, losses = greedy_removal(model, rows, 2)
    left = [layer for layer in range(4) if layer not in removed]
    cut = StudentModel(config.keeping(left)).eval()
    for place, layer in enumerate(left):
        cut.layers[place].load_state_dict(model.layers[layer].state_dict())
    cut.embedding.load_state_dict(model.embedding.state_dict())
    cut.norm.load_state_dict(model.norm.state_dict())
    total = sum(
        F.cross_entropy(cut.logits(cut(row[None]))[0, :-1], row[1:], reduction="sum")
        for row in rows
    )
    assert losses[-1] == pytest.approx(float(total) / sum(len(row) - 1 for row in rows), abs=1e-5)
    assert math.isfinite(losses[0])
