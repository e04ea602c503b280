"""右边的填充不用 mask：真实的 token 的隐状态与一步的梯度都不变；离不开 mask 的模型仍有 mask。"""

from dataclasses import replace

import pytest
import torch
from dispatched import dispatched
from model_types import SHAPES, VOCAB, model_of
from torch import nn

from distillab.batch import Example, Tokens, collate_examples
from distillab.config.model_sections import ModelConfig
from distillab.config.schema import LossConfig
from distillab.models.head_fit import relative_error
from distillab.models.interface import PretrainedLM
from distillab.models.student import StudentModel
from distillab.teachers.in_process import LocalTeacher
from distillab.train.module import DistillationModule
from distillab.vocabulary import Vocabulary

REFUSED = ("bert", "modernbert-decoder", "xlnet")
SMALL = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
         "intermediate_size": 48, "vocab_size": VOCAB, "max_seq_len": 64}  # fmt: skip


def batch(padded=True):
    generator = torch.Generator().manual_seed(1)
    lengths = (3, 13, 7, 9) if padded else (13,)
    rows = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    tokens = [Tokens(ids, list(range(2, len(ids)))) for ids in rows]
    return collate_examples([Example(each, each) for each in tokens], pad_id=0)


def masked(model, view):
    return view.rows(model(view.input_ids, view.attention_mask))


@pytest.fixture
def attention_masks(monkeypatch):
    """每次注意力收到的 mask。"""
    found, attend = [], nn.functional.scaled_dot_product_attention

    def spy(*args, **kwargs):
        found.append(kwargs.get("attn_mask"))
        return attend(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in SHAPES if name not in REFUSED])
def test_every_causal_family_reads_a_padded_batch_as_it_would_with_a_mask(name):
    model, view = PretrainedLM(model_of(name)), batch().student
    assert model.pads_right
    torch.testing.assert_close(model.read(view), masked(model, view), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["own", "transformers"])
def test_a_padded_batch_takes_the_causal_fast_path(kind, attention_masks):
    torch.manual_seed(0)
    own = StudentModel(ModelConfig(**SMALL)).eval()
    model = own if kind == "own" else PretrainedLM(model_of("qwen2"))
    attention_masks.clear()
    model.read(batch().student)
    assert attention_masks
    assert all(mask is None for mask in attention_masks)


@pytest.mark.parametrize("kind", ["own", "transformers"])
def test_a_step_has_the_gradients_it_has_with_a_mask(kind, monkeypatch):
    torch.manual_seed(0)
    student = StudentModel(ModelConfig(**SMALL))
    if kind == "transformers":
        student = PretrainedLM(model_of("llama"))
    teacher = LocalTeacher(PretrainedLM(model_of("qwen2")))
    loss = LossConfig(alpha=0.5, temperature=2.0)
    module = DistillationModule(student, loss, Vocabulary(VOCAB)).train()
    found = []
    for unmasked in (True, False):
        for model in (student, teacher.model):
            monkeypatch.setattr(type(model), "pads_right", unmasked)
        module.zero_grad()
        targets = teacher.targets(batch().teacher, Vocabulary(VOCAB))
        sums = module(batch(), targets)
        sums.total.backward()
        found.append([sums.total.detach(), *(p.grad for p in student.parameters())])
    for ours, expected in zip(*found, strict=True):
        assert relative_error(ours, expected) <= 1e-6


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text", "gpt_oss"])
def test_a_forward_of_transformers_asks_the_device_nothing(name):
    model = PretrainedLM(model_of(name))
    assert "_local_scalar_dense" not in dispatched(model.read, batch().student)


class PaddingCounts(nn.Module):
    """在 mask 里数真实的 token，再乘进隐状态：没有 mask 就数错了。"""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden, *args, attention_mask=None, **kwargs):
        scale = 1.0 if attention_mask is None else 1.5
        return scale * self.inner(hidden, *args, attention_mask=attention_mask, **kwargs)


def test_a_model_that_makes_other_use_of_its_mask_keeps_it(attention_masks):
    hf = model_of("llama")
    hf.model.layers[2] = PaddingCounts(hf.model.layers[2])
    model, view = PretrainedLM(hf), batch().student
    assert not model.pads_right
    attention_masks.clear()
    torch.testing.assert_close(model.read(view), masked(model, view))
    assert all(mask is not None for mask in attention_masks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba2"])
def test_rounding_is_not_mistaken_for_a_use_of_the_mask(name, dtype):
    assert PretrainedLM(model_of(name).to(dtype)).pads_right


def test_documents_in_a_row_are_still_kept_apart():
    model, view = PretrainedLM(model_of("qwen2")), batch(padded=False).student
    positions = torch.arange(13)[None] % 6
    apart = model.read(replace(view, position_ids=positions))
    assert not torch.allclose(apart, model.read(view), atol=1e-3)
