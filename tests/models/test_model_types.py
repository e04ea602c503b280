"""各种结构的模型：hidden state 与 head 拼出的就是 transformers 自己的 logits，否则拒绝。"""

import re

import pytest
import torch
from model_types import SHAPES, VOCAB, model_of
from torch import nn

from distillab.errors import DistillabError
from distillab.models.interface import PretrainedLM

REFUSED = {
    "bert": "its logits differ from those of its last hidden states and its output layer by up to",
    "modernbert-decoder": "there is a step between that is not a scale or a softcap",
    "xlnet": "a later token changes its earlier hidden states",
}


@pytest.mark.parametrize("name", [name for name in SHAPES if name not in REFUSED])
def test_logits_are_those_of_transformers(name):
    model = model_of(name)
    wrapped = PretrainedLM(model)
    ids = torch.randint(3, VOCAB, (2, 20))
    with torch.no_grad():
        own = model(input_ids=ids).logits
        found = wrapped.logits(wrapped(ids))
    torch.testing.assert_close(found, own, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_logits_that_cannot_be_rebuilt_are_refused_in_one_line(name):
    with pytest.raises(DistillabError, match=re.escape(REFUSED[name])) as caught:
        PretrainedLM(model_of(name))
    assert str(caught.value).startswith(f"model_type '{name}' cannot be used here: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape", "scale", "softcap"),
    [
        ("granite", {}, 1 / 8, None),
        ("hyperclovax", {}, 0.25, None),  # 同一个名字，这一家是乘
        ("cohere", {}, 0.0625, None),
        ("falcon_h1", {}, 0.25, None),
        ("recurrent_gemma", {}, 1.0, 3.0),
        ("gemma2", {}, 1.0, 3.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_are_exactly_those_of_the_config(name, shape, scale, softcap, dtype):
    head = PretrainedLM(model_of(name, **shape).to(dtype)).head
    assert (head.scale, head.softcap) == (scale, softcap)


def test_numbers_that_the_model_never_reads_change_nothing():
    model = model_of("llama")
    model.config.logit_scale = model.config.final_logit_softcapping = 0.5
    head = PretrainedLM(model).head
    assert (head.scale, head.softcap) == (1.0, None)


def test_a_scale_that_no_key_names_is_found():
    model = model_of("llama")
    model.lm_head.register_forward_hook(lambda _, __, logits: logits / 3.7)
    assert PretrainedLM(model).head.scale == pytest.approx(1 / 3.7, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_step_before_the_output_layer_is_noticed(dtype):
    model = model_of("qwen2").to(dtype)
    shift = nn.Parameter(0.1 * torch.randn(32, dtype=dtype))
    model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0] + shift,))
    with pytest.raises(DistillabError, match="model_type 'qwen2' cannot be used here"):
        PretrainedLM(model)


def test_weights_that_are_not_finite_are_refused_in_one_line():
    model = model_of("qwen2")
    model.model.embed_tokens.weight.data.fill_(float("nan"))
    with pytest.raises(DistillabError, match="its logits are not finite in float32"):
        PretrainedLM(model)
