"""与 transformers 逐数对照：同样的权重，同样的 logits。"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2MLP,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
    apply_rotary_pos_emb,
)

from distillab.config.model_sections import ModelConfig
from distillab.export.convert import export_student, from_hf
from distillab.models.blocks import RMSNorm, SwiGLUFFN, apply_rotary, rotary_tables
from distillab.models.interface import PretrainedLM
from distillab.models.student import StudentModel

LOGIT_TOLERANCE = 1e-4
LAYOUTS = ["tiny_qwen2", "tiny_llama"]


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 397, shape, generator=torch.Generator().manual_seed(1))


def batch(side: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``[3, 12]`` 的输入与 mask，三行分别有 12、7、1 个真实 token。"""
    ids = tokens(3, 12)
    if side == "none":
        return ids, None
    mask = (torch.arange(12) < torch.tensor([[12], [7], [1]])).long()
    return ids, mask.flip(1) if side == "left" else mask


def hf_logits(
    model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None, cached: bool
) -> torch.Tensor:
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    if not cached:
        return model(ids, attention_mask=mask, position_ids=positions).logits
    first = model(
        ids[:, :8],
        attention_mask=None if mask is None else mask[:, :8],
        position_ids=None if positions is None else positions[:, :8],
        use_cache=True,
    )
    second = model(
        ids[:, 8:],
        attention_mask=mask,
        position_ids=None if positions is None else positions[:, 8:],
        past_key_values=first.past_key_values,
    )
    return torch.cat((first.logits, second.logits), 1)


def our_logits(
    model: StudentModel | PretrainedLM, ids: torch.Tensor, mask: torch.Tensor | None, cached: bool
) -> torch.Tensor:
    if not cached:
        return model.logits(model(ids, mask))
    cache = model.new_cache()
    first = model(ids[:, :8], None if mask is None else mask[:, :8], cache)
    return model.logits(torch.cat((first, model(ids[:, 8:], mask, cache)), 1))


def difference(ours: torch.Tensor, theirs: torch.Tensor, mask: torch.Tensor | None) -> float:
    gap = (ours - theirs).abs().amax(-1)
    return float((gap if mask is None else gap[mask.bool()]).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_equals_transformers_bit_for_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours, theirs = RMSNorm(64, 1e-6), Qwen2RMSNorm(64, 1e-6)
    nn.init.normal_(ours.weight)
    theirs.weight = ours.weight
    hidden = (10 * torch.randn(4, 9, 64)).to(dtype)
    assert torch.equal(ours.to(dtype)(hidden), theirs.to(dtype)(hidden))


def test_rotary_equals_transformers_up_to_the_last_position(tiny_qwen2: nn.Module) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 64, 8), torch.randn(2, 2, 64, 8)
    positions = torch.arange(64).expand(2, 64)
    cos, sin = rotary_tables(positions, 8, 1e6)
    theirs = Qwen2RotaryEmbedding(tiny_qwen2.config)(query, positions)
    for ours, expected in zip(
        (apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)),
        apply_rotary_pos_emb(query, key, *theirs),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_swiglu_equals_transformers(tiny_qwen2: nn.Module) -> None:
    torch.manual_seed(0)
    theirs, ours = Qwen2MLP(tiny_qwen2.config), SwiGLUFFN(32, 48)
    ours.load_state_dict(theirs.state_dict())
    hidden = torch.randn(2, 5, 32)
    torch.testing.assert_close(ours(hidden), theirs(hidden), atol=1e-6, rtol=0)


@torch.no_grad()
def test_attention_equals_transformers(tiny_qwen2: nn.Module) -> None:
    torch.manual_seed(0)
    theirs = tiny_qwen2.model.layers[1].self_attn
    ours = from_hf(tiny_qwen2).layers[1].attention
    hidden, positions = torch.randn(2, 9, 32), torch.arange(9)[None]
    expected, _ = theirs(
        hidden,
        position_embeddings=tiny_qwen2.model.rotary_emb(hidden, positions),
        attention_mask=None,
    )
    torch.testing.assert_close(
        ours(hidden, *rotary_tables(positions, 8, 1e6)), expected, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("cached", [False, True])
@torch.no_grad()
def test_imported_model_gives_the_same_logits(
    layout: str, side: str, cached: bool, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(layout)
    ids, mask = batch(side)
    expected = hf_logits(model, ids, mask, cached)
    assert expected.std() > 0.1
    found = our_logits(from_hf(model).eval(), ids, mask, cached)
    assert difference(found, expected, mask) <= LOGIT_TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_directory_of_safetensors_imports_like_the_loaded_model(
    layout: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = request.getfixturevalue(layout)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = tokens(2, 9)
    found = our_logits(from_hf(tmp_path).eval(), ids, None, False)
    assert difference(found, model(ids).logits, None) <= LOGIT_TOLERANCE


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("cached", [False, True])
@torch.no_grad()
def test_exported_model_gives_the_same_logits_in_transformers(
    side: str, cached: bool, tiny_config: ModelConfig, tiny_tokenizer: object, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    student = StudentModel(tiny_config).eval()
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.2)
    export_student(student, tiny_tokenizer, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids, mask = batch(side)
    found = our_logits(student, ids, mask, cached)
    assert difference(found, hf_logits(model, ids, mask, cached), mask) <= LOGIT_TOLERANCE


def test_exported_directory_loads_without_this_package(
    tiny_config: ModelConfig, tiny_tokenizer: object, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    student = StudentModel(tiny_config).eval()
    directory = export_student(student, tiny_tokenizer, tmp_path / "out")
    text = "知识蒸馏 trains a small student."
    script = f"""
import importlib.abc, sys, torch
class Blocked(importlib.abc.MetaPathFinder):  # 即使装进了环境也导入不了
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "distillab":
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(directory)!r})
model = AutoModelForCausalLM.from_pretrained({str(directory)!r})
ids = tokenizer({text!r}, return_tensors="pt").input_ids
torch.save((ids, model(ids).logits.detach()), {str(tmp_path / "logits.pt")!r})
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    subprocess.run([sys.executable, "-I", "-c", script], check=True, env=environment, cwd=tmp_path)
    ids, logits = torch.load(tmp_path / "logits.pt")
    assert ids.tolist()[0] == tiny_tokenizer(text)["input_ids"]
    with torch.no_grad():
        assert difference(our_logits(student, ids, None, False), logits, None) <= LOGIT_TOLERANCE


_COMMON = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "Qwen2": _COMMON,
    "Qwen3": _COMMON,
    "Llama": {**_COMMON, "tie_word_embeddings": False},
    "Gemma2": {**_COMMON, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "Granite": {**_COMMON, "logits_scaling": 4.0},
    "Cohere": {**_COMMON, "logit_scale": 0.25},
    "Phi": {**_COMMON, "num_key_value_heads": 4},
    "GPT2": {
        "vocab_size": 400,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "Bloom": {"vocab_size": 400, "hidden_size": 32, "n_layer": 2, "n_head": 4},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("cached", [False, True])
@torch.no_grad()
def test_any_causal_lm_gives_its_own_logits_through_the_wrapper(
    family: str, side: str, cached: bool
) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    ids, mask = batch(side)
    wrapped = PretrainedLM(model)
    assert (wrapped.vocab_size, wrapped.hidden_size) == (400, 32)
    assert wrapped.max_seq_len >= 64
    # 不用填充、不用缓存时 transformers 自己的 logits 最没有歧义，逐行去掉填充来比。
    found = our_logits(wrapped, ids, mask, cached)
    for row in range(3):
        real = slice(None) if mask is None else mask[row].bool()
        expected = model(ids[row][real][None]).logits
        assert difference(found[row][real][None], expected, None) <= LOGIT_TOLERANCE


def test_wrapped_model_recomputes_activations_with_the_same_gradients(
    tiny_qwen2: nn.Module,
) -> None:
    wrapped, ids = PretrainedLM(tiny_qwen2.train()), tokens(2, 9)

    def gradients() -> list[torch.Tensor]:
        wrapped.zero_grad()
        wrapped.logits(wrapped(ids)).logsumexp(-1).sum().backward()
        return [p.grad.clone() for p in wrapped.parameters() if p.grad is not None]

    plain = gradients()
    wrapped.enable_activation_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))
