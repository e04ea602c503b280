"""各家的结构：导入、导出、缓存、填充与梯度都与 transformers 的相同，权重是随机的小模型。"""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from distillab.export.convert import export_student, from_hf
from distillab.models.student import StudentModel

TOLERANCE = 1e-4
"""最大的差，相对于最大的 logit。"""

SHAPE: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 397,
    "pad_token_id": None,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 16}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
LOCAL = {"rope_type": "default", "rope_theta": 1e4}
WINDOWS = {"sliding_window": 5}
TYPES = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2-untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen2-windows": ("qwen2", {"use_sliding_window": True, "layer_types": TYPES, **WINDOWS}),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "qwen3-biases": ("qwen3", {"head_dim": 8, "attention_bias": True}),
    "llama": ("llama", {}),
    "llama-untied-biases": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "num_key_value_heads": 4}),
    "llama-wide-heads": ("llama", {"head_dim": 16, "num_key_value_heads": 1}),
    "mistral": ("mistral", {"head_dim": 16, **WINDOWS}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            **WINDOWS,
        },
    ),
    "gemma2-whole": ("gemma2", {"head_dim": 16, "layer_types": ["full_attention"] * 4}),
    "gemma3-whole": ("gemma3_text", {"head_dim": 16, "layer_types": ["full_attention"] * 4}),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "layer_types": TYPES,
            "rope_parameters": {"full_attention": LINEAR, "sliding_attention": LOCAL},
            **WINDOWS,
        },
    ),
}

EXPORTED = {"llama": "qwen2", "llama3": "qwen2"}
"""由 Llama 来的学生有 Qwen2 的偏置，tokenizer 又是 Qwen 的。"""


def random_model(name: str) -> Any:
    kind, options = LAYOUTS[name]
    config = AutoConfig.for_model(kind, **{**SHAPE, **options})
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def inputs(padded: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``[3, 20]``，比窗口长；填充在左。"""
    ids = torch.randint(0, 397, (3, 20), generator=torch.Generator().manual_seed(1))
    real = torch.arange(20) >= torch.tensor([[0], [4], [13]])
    return ids, real.long() if padded else None


def whole_rows(model: Any, ids: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Transformers 逐行、不带填充、不用缓存地算出的 logits：最没有歧义。"""
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    return [model(row[kept][None]).logits[0] for row, kept in zip(ids, real, strict=True)]


def assert_same(found: torch.Tensor, expected: list[torch.Tensor], mask: Any) -> None:
    for row, logits in enumerate(expected):
        ours = found[row] if mask is None else found[row][mask[row].bool()]
        assert float((ours - logits).abs().max() / logits.abs().max()) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_everything_kept_gives_the_teachers_logits(name: str, padded: bool) -> None:
    model = random_model(name)
    student, (ids, mask) = from_hf(model).eval(), inputs(padded)
    expected = whole_rows(model, ids, mask)
    assert_same(student.logits(student(ids, mask)), expected, mask)
    cache, pieces = student.new_cache(), []
    for start, end in ((0, 8), (8, 9), (9, 10), (10, 16), (16, 20)):
        seen = None if mask is None else mask[:, :end]
        pieces.append(student(ids[:, start:end], seen, cache))
    assert_same(student.logits(torch.cat(pieces, 1)), expected, mask)
    fixed = student.static_cache(32)
    pieces = [student(ids[:, :14], None if mask is None else mask[:, :14], fixed)]
    fixed.places.begin(14, None if mask is None else mask[:, :14], ids.device)
    for step in range(14, 20):
        pieces.append(student(ids[:, step : step + 1], None, fixed))
        fixed.places.at.add_(1)
    assert_same(student.logits(torch.cat(pieces, 1)), expected, mask)


@torch.no_grad()
@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_documents_do_not_see_each_other(name: str) -> None:
    model = random_model(name)
    student, (ids, _) = from_hf(model).eval(), inputs(False)
    expected = [model(part).logits[0] for part in (ids[:1, :13], ids[1:2, :7])]
    row = torch.cat((ids[0, :13], ids[1, :7]))[None]
    positions = torch.cat((torch.arange(13), torch.arange(7)))[None]
    found = student.logits(student(row, position_ids=positions))[0]
    for ours, theirs in zip(found.split((13, 7)), expected, strict=True):
        assert_same(ours[None], [theirs], None)


@torch.no_grad()
@pytest.mark.parametrize("name", LAYOUTS)
def test_export_loads_as_the_plain_class_with_equal_logits_and_the_same_tokenizer(
    name: str, tiny_tokenizer: Any, tmp_path: Any
) -> None:
    student = from_hf(random_model(name)).eval()
    directory = export_student(student, tiny_tokenizer, tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.model_type == EXPORTED.get(name, LAYOUTS[name][0])
    ids, _ = inputs(False)
    assert_same(student.logits(student(ids)), whole_rows(model.eval(), ids, None), None)
    again = from_hf(directory)
    assert again.config == student.config
    ours, theirs = dict(student.named_parameters()), dict(again.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[each], theirs[each]) for each in ours)
    text = "don't  stop!!!\n\n\n 3.14 中国。\n你好！ a\u0301"
    assert (
        AutoTokenizer.from_pretrained(directory)(text)["input_ids"]
        == tiny_tokenizer(text)["input_ids"]
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_padding_between_tokens_takes_no_room_in_the_window(name: str) -> None:
    student, (ids, _) = from_hf(random_model(name)).eval(), inputs(False)
    ids, gap = ids[:1, :12], torch.zeros(1, 4, dtype=torch.long)
    padded = torch.cat((ids[:, :5], gap, ids[:, 5:]), 1)
    mask = torch.cat((torch.ones(1, 5), gap, torch.ones(1, 7)), 1).long()
    plain, cache = student(ids), student.new_cache()
    torch.testing.assert_close(student(padded, mask)[mask.bool()][None], plain, atol=1e-5, rtol=0)
    student(padded[:, :9], mask[:, :9], cache)  # 右填充的提示，之后接着生成
    after = [student(padded[:, at : at + 1], mask[:, : at + 1], cache) for at in range(9, 16)]
    torch.testing.assert_close(torch.cat(after, 1), plain[:, 5:], atol=1e-5, rtol=0)


def test_frequencies_are_real_where_the_weights_are_not_yet() -> None:
    config = from_hf(random_model("llama3")).config
    expected = StudentModel(config).rotary(torch.arange(9)[None])
    with torch.device("meta"):
        student = StudentModel(config)
    assert all(map(torch.equal, student.rotary(torch.arange(9)[None]), expected))


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma2", "gemma3"])
def test_gradients_are_those_of_transformers(name: str) -> None:
    model = random_model(name)
    student, (ids, _) = from_hf(model), inputs(False)
    student.logits(student(ids)).logsumexp(-1).sum().backward()
    model(ids).logits.logsumexp(-1).sum().backward()
    theirs = sorted(p.grad.norm().item() for p in model.parameters() if p.grad.any())
    ours = sorted(
        p.grad.norm().item()
        for key, p in student.named_parameters()
        if not (name == "llama3" and key.endswith("bias"))
    )
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert student.embedding.weight.grad is not None
    torch.testing.assert_close(
        student.embedding.weight.grad,
        model.get_input_embeddings().weight.grad,
        rtol=1e-3,
        atol=1e-3 * float(student.embedding.weight.grad.abs().max()),
    )


def test_recomputed_activations_give_identical_gradients_in_every_kind_of_layer() -> None:
    def gradients(recompute: bool) -> list[torch.Tensor]:
        student, (ids, mask) = from_hf(random_model("gemma3")).train(), inputs(True)
        if recompute:
            student.enable_activation_checkpointing()
        student.logits(student(ids, mask)).logsumexp(-1).sum().backward()
        return [p.grad for p in student.parameters() if p.grad is not None]

    assert all(map(torch.equal, gradients(False), gradients(True)))
