"""教师经本项目的层来算：与 transformers 的相同，权重只有一份，不合适的仍由 transformers 来算。"""

import copy

import pytest
import torch
from dispatched import dispatched
from model_types import VOCAB, model_of

from distillab.assembly.parts import build_models
from distillab.batch import Example, Tokens, View, collate_examples, collate_packed
from distillab.config.schema import Recipe
from distillab.data.packing import keeps_documents_apart
from distillab.generate.generator import TextGenerator, padded
from distillab.models.interface import PretrainedLM
from distillab.models.own_blocks import SharedDecoder, through_own_blocks
from distillab.vocabulary import Vocabulary

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 64}  # fmt: skip
LAYOUTS = {
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {"head_dim": 12, "num_attention_heads": 4}),
    "qwen3-bias": ("qwen3", {"attention_bias": True}),
    "smollm2": ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-multi-head": ("llama", {"num_key_value_heads": 4}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral-window": ("mistral", {"sliding_window": 8}),
    "qwen2-windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    "gemma2": ("gemma2", {"attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 24}),
    "gemma3": ("gemma3_text", {}),
    "gemma3-all-sliding": ("gemma3_text", {"layer_types": ["sliding_attention"] * 4}),
}
OTHERS = {
    "a softcap that transformers ignores": ("gemma3_text", {"attn_logit_softcapping": 5.0}),
    "another activation": ("llama", {"hidden_act": "gelu"}),
    "frequencies that change with length": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "another family": ("olmo2", {}),
    "experts": ("qwen3_moe", {}),
}
LENGTHS = (3, 1, 13, 7, 7)


def storage_bytes(*models):
    """几个模型的参数一共占多少内存，共用的只算一次。"""
    found = [p.untyped_storage() for model in models for p in model.parameters()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in found}.values())


def pair(name, layouts=LAYOUTS):
    """``(transformers 的, 经本项目的层的)``。"""
    family, shape = layouts[name]
    model = model_of(family, **shape)
    return PretrainedLM(model), through_own_blocks(PretrainedLM(copy.deepcopy(model)))


def rows():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


def examples():
    tokens = [Tokens(ids, list(range(1, len(ids)))) for ids in rows()]
    return [Example(each, each) for each in tokens]


@torch.no_grad()
@pytest.mark.parametrize("name", LAYOUTS)
def test_hidden_states_are_those_of_transformers(name):
    theirs, ours = pair(name)
    assert isinstance(ours, SharedDecoder)
    parts = examples()
    packed = collate_packed([parts[:3], parts[3:]], pad_id=0).student
    ids = torch.randint(3, VOCAB, (2, 200), generator=torch.Generator().manual_seed(2))
    whole = View(ids, None, torch.arange(400))
    for view in (whole, collate_examples(parts, pad_id=0).student, packed):
        torch.testing.assert_close(ours.read(view), theirs.read(view), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.head.weight, theirs.head.weight, atol=0, rtol=0)
    assert (ours.max_seq_len, ours.eos_token_ids) == (theirs.max_seq_len, theirs.eos_token_ids)
    assert keeps_documents_apart(ours)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama3", "mistral-window", "gemma2", "gemma3"])
def test_greedy_replies_are_those_of_transformers(name, tiny_tokenizer):
    replies = []
    for model in pair(name):
        generator = TextGenerator(model, tiny_tokenizer)
        generator.stop_ids = frozenset()
        batch = padded(rows(), 0, torch.device("cpu"))
        replies.append(generator.generate_ids(*batch, max_new_tokens=16).tolist())
    assert replies[0] == replies[1]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama3", "gemma3"])
def test_half_precision_rounds_where_transformers_does(name, dtype):
    family, shape = LAYOUTS[name]
    model = model_of(family, **shape).to(dtype)
    theirs = PretrainedLM(model)
    ids = torch.randint(3, VOCAB, (2, 200), generator=torch.Generator().manual_seed(2))
    expected = theirs(ids)
    ours = through_own_blocks(theirs)
    assert isinstance(ours, SharedDecoder)
    assert torch.equal(ours(ids), expected)


@torch.no_grad()
def test_positions_stay_exact_when_the_weights_are_cast():
    ours = pair("llama3")[1]
    positions = torch.arange(200)[None]
    expected = [table.to(torch.bfloat16) for table in ours.rotary(positions)]
    found = ours.to(torch.bfloat16).rotary(positions)
    assert all(torch.equal(*tables) for tables in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["qwen2", "qwen2-untied", "qwen3", "gemma2"])
def test_weights_are_taken_over_not_copied(name):
    theirs = PretrainedLM(model_of(LAYOUTS[name][0], **LAYOUTS[name][1]))
    count, size, blocks = theirs.num_parameters(), storage_bytes(theirs), len(theirs.blocks)
    ours = through_own_blocks(theirs)
    assert (ours.num_parameters(), len(ours.blocks)) == (count, blocks)
    assert storage_bytes(ours) == storage_bytes(ours, theirs) == size
    assert (ours.head.weight is ours.embedding.weight) == (name in ("qwen2", "gemma2"))


@pytest.mark.parametrize("name", OTHERS)
def test_other_layouts_stay_with_transformers(name):
    family, shape = OTHERS[name]
    model = PretrainedLM(model_of(family, **shape))
    assert through_own_blocks(model) is model


@torch.no_grad()
def test_attention_is_capped_whatever_was_asked_for():
    """SDPA 没有 softcap，旧的 transformers 选它时便不做。"""
    family, shape = LAYOUTS["gemma2"]
    model = model_of(family, **shape)
    ids = torch.arange(3, 40)[None]
    capped = model_of(family, **shape, attn_implementation="eager").model(ids).last_hidden_state
    model.config._attn_implementation = "sdpa"
    torch.testing.assert_close(PretrainedLM(model)(ids), capped, atol=1e-5, rtol=0)


def test_a_difference_that_no_setting_tells_of_is_noticed(monkeypatch):
    model = PretrainedLM(model_of("llama"))
    forward = type(model.model.model.norm).forward
    monkeypatch.setattr(
        type(model.model.model.norm), "forward", lambda self, hidden: 1.01 * forward(self, hidden)
    )
    assert through_own_blocks(model) is model


def test_weights_of_another_name_are_noticed():
    hf = model_of("llama")
    hf.model.layers[1].self_attn.sinks = torch.nn.Parameter(torch.ones(4))
    model = PretrainedLM(hf)
    assert through_own_blocks(model) is model


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma2", "gemma3"])
def test_the_device_is_asked_nothing(name):
    ours, parts = pair(name)[1], examples()
    packed = collate_packed([parts[:3], parts[3:]], pad_id=0).student
    for view in (collate_examples(parts, pad_id=0).student, packed):
        assert not dispatched(ours.read, view).keys() & {"_local_scalar_dense", "nonzero"}


def test_a_forward_of_24_layers_dispatches_fewer_operators():
    shape = {"num_hidden_layers": 24, "hidden_size": 28, "num_attention_heads": 14,
             "num_key_value_heads": 2, "tie_word_embeddings": True}  # fmt: skip
    theirs = PretrainedLM(model_of("qwen2", **shape))
    ids = torch.randint(3, VOCAB, (8, 16))
    before = dispatched(theirs, ids).total()
    after = dispatched(through_own_blocks(theirs), ids).total()
    in_norms = 49 * 5  # GPU 上一个 RMSNorm 是一个内核，这里是六个
    assert after - in_norms <= 0.45 * before


@torch.no_grad()
@pytest.mark.parametrize(
    "student", [{"init": {"from": "teacher", "choose": [0, 2]}}, {"path": "other"}]
)
def test_a_gpu_has_its_teacher_read_through_own_blocks(student, tiny_teacher_dir, monkeypatch):
    if "path" in student:
        student = {"path": str(tiny_teacher_dir)}
    recipe = Recipe.model_validate(
        {
            "name": "own",
            "teacher": {"path": str(tiny_teacher_dir)},
            "student": student,
            "data": {"source": "none.jsonl"},
            "train": {"precision": "fp32"},
        }
    )
    theirs = build_models(recipe.student, recipe.teacher, recipe.train)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        ours = build_models(recipe.student, recipe.teacher, recipe.train)
    assert isinstance(ours.teacher, SharedDecoder)
    assert isinstance(theirs.teacher, PretrainedLM)
    assert ours.parameters == theirs.parameters
    view = collate_examples(examples(), pad_id=0).student
    found, expected = (
        [parts.student.read(view), parts.local_teacher().targets(view, Vocabulary(VOCAB)).hidden]
        for parts in (ours, theirs)
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
