"""各种结构都生成对的东西：长短不一、先后停下的一批，与逐条从头算的、与 transformers 自己的相同。"""

import logging

import pytest
import torch
from model_types import VOCAB, model_of

from distillab.batch import Example, Tokens, collate_examples
from distillab.data.packing import keeps_documents_apart
from distillab.generate.generator import TextGenerator, padded
from distillab.generate.likelihood import likelihoods
from distillab.models.abilities import find_abilities
from distillab.models.interface import PretrainedLM
from distillab.models.kv_cache import dynamic_cache
from distillab.vocabulary import Vocabulary

CACHED = [
    "llama",
    "gpt2",
    "bloom",
    "opt",
    "mistral",  # 这几家的滑动窗口是 8，比 prompt 短
    "gemma3_text",
    "gpt_oss",
    "deepseek_v3",
    "mamba2",
    "jamba",
    "bamba",
    "falcon_h1",
    "nemotron_h",
    "lfm2",
    "qwen3_next",
]
ONLY_EQUAL_LENGTHS = ["mamba"]
WITHOUT_A_CACHE = ["recurrent_gemma", "rwkv", "openai-gpt"]
ALL = CACHED + ONLY_EQUAL_LENGTHS + WITHOUT_A_CACHE

LENGTHS = (3, 1, 13, 7, 7)
ENDS = (6, 14, 3, 10, 14)
"""各行在第几个新 token 停下。"""


def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


def from_the_start(model, prompt, count):
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(count):
            logits = model(input_ids=ids, use_cache=False).logits
            ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
    return ids[0, len(prompt) :].tolist()


class EndsAt:
    """让各行在 ``ENDS`` 的那一步停下。"""

    def __init__(self):
        self.steps = [0] * len(ENDS)

    def __call__(self, rows, ids):
        assert len(rows) == len(ids)
        for row in rows.tolist():
            self.steps[row] += 1
        return torch.tensor([self.steps[row] >= ENDS[row] for row in rows.tolist()])


@pytest.mark.parametrize("name", ALL)
def test_a_ragged_batch_equals_each_prompt_alone_and_transformers(name, tiny_tokenizer):
    model = model_of(name)
    generator = TextGenerator(PretrainedLM(model), tiny_tokenizer)
    generator.stop_ids = frozenset()
    found = generator.generate_ids(
        *padded(prompts(), 0, torch.device("cpu")), max_new_tokens=max(ENDS), on_token=EndsAt()
    )
    for row, prompt, end in zip(found.tolist(), prompts(), ENDS, strict=True):
        assert row[:end] == from_the_start(model, prompt, end)
    ids = torch.tensor([prompts()[2]])
    theirs = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=ENDS[2], do_sample=False
    )
    assert found[2, : ENDS[2]].tolist() == theirs[0, LENGTHS[2] :].tolist()


@pytest.mark.parametrize("name", ALL)
def test_what_can_be_relied_on_is_found_out(name, caplog):
    model = PretrainedLM(model_of(name))
    with caplog.at_level(logging.WARNING, "distillab"):
        assert (model.new_cache() is not None) == (name not in WITHOUT_A_CACHE)
        assert model.pads_left == (name in CACHED or name == "openai-gpt")
        model.new_cache()
    lines = [r.getMessage() for r in caplog.records if r.name == "distillab"]
    assert len(lines) == (name in WITHOUT_A_CACHE)
    assert all(
        f"model_type '{name}': generating without a cache, which is slower: " in line
        for line in lines
    )


@pytest.mark.parametrize("name", ALL)
def test_likelihoods_are_those_of_each_request_alone(name):
    model = PretrainedLM(model_of(name))
    short, _, long, *_ = prompts()
    requests = [(short, [5, 6, 7]), (long, [8]), (long, [9, 10]), (short, [11]), (long[:5], [12])]
    options = {"vocabulary": Vocabulary(VOCAB)}
    together = likelihoods(model, requests, batch_size=4, **options)
    for request, found in zip(requests, together, strict=True):
        (expected,) = likelihoods(model, [request], batch_size=1, **options)
        assert found.total == pytest.approx(expected.total, abs=2e-5)
        assert found[1:] == expected[1:]


@pytest.mark.parametrize("name", ALL)
def test_a_padded_batch_has_the_hidden_states_of_its_rows(name):
    model = PretrainedLM(model_of(name))
    examples = [Example(tokens, tokens) for ids in prompts() for tokens in [Tokens(ids, [])]]
    view = collate_examples(examples, pad_id=0).student
    with torch.no_grad():
        hidden = model(view.input_ids, view.attention_mask)
        for row, prompt in zip(hidden, prompts(), strict=True):
            alone = model(torch.tensor([prompt]))[0]
            torch.testing.assert_close(row[: len(prompt)], alone, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ALL)
def test_documents_kept_apart_have_the_hidden_states_of_their_own(name):
    model = PretrainedLM(model_of(name))
    recurrent = name in (*CACHED[CACHED.index("mamba2") :], "mamba", "recurrent_gemma", "rwkv")
    apart = keeps_documents_apart(model)
    assert not (recurrent and apart)
    if not apart:
        return
    first, second = prompts()[2:4]
    positions = torch.cat((torch.arange(len(first)), torch.arange(len(second))))[None]
    with torch.no_grad():
        packed = model(torch.tensor([first + second]), position_ids=positions)[0, len(first) :]
        alone = model(torch.tensor([second]))[0]
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=2e-5)


def test_a_cache_that_mixes_up_rows_is_not_trusted():
    model = PretrainedLM(model_of("llama"))

    def broken():
        cache = dynamic_cache(model.model.config)
        cache.batch_select_indices = lambda indices: cache.reorder_cache(1 - indices)
        return cache

    found = find_abilities(model, broken)
    assert (found.cached, found.why_uncached) == (False, "dropping rows changes the others")
    assert found.pads_left


def test_a_cache_that_is_not_used_is_not_trusted():
    model = PretrainedLM(model_of("mamba"))
    model._cache_name = "past_key_values"  # 叫错了名字，模型不作声
    assert "not what follows the tokens themselves" in model._abilities.why_uncached
    assert model.new_cache() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_not_mistaken_for_a_fault(dtype):
    for name in ("llama", "jamba", "qwen3_moe"):
        abilities = PretrainedLM(model_of(name).to(dtype))._abilities
        assert abilities.cached
        assert abilities.pads_left


def test_autocast_does_not_hide_a_model_that_can_be_cached():
    model = PretrainedLM(model_of("llama"))
    for block in model.blocks:  # 采样用的拷贝：层里的线性层已经是半精度的
        block.self_attn.bfloat16()
        block.mlp.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.new_cache() is not None
        assert model.pads_left
