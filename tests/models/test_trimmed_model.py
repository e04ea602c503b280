"""裁剪过的模型：留下的 token 的 logits 就是原来的，id 处处是新的，导出后 transformers 照样能读。"""

import numpy as np
import pytest
import torch
from families import FAMILIES, build
from transformers import AutoModelForCausalLM

from distillab.config.model_sections import LoraConfig
from distillab.errors import DistillabError
from distillab.export.convert import from_hf
from distillab.models.interface import PretrainedLM
from distillab.models.lora import adapter_parameters, add_lora
from distillab.models.pretrained import load_pretrained
from distillab.models.tokenizer import load_tokenizer
from distillab.models.trimmed_model import trim_model
from distillab.models.trimming import BpeRules

NAMES = [*FAMILIES]


@pytest.fixture(scope="module", params=NAMES)
def directory(request, tmp_path_factory):
    return build(request.param, tmp_path_factory.mktemp("models") / request.param)


def load(directory):
    return PretrainedLM(load_pretrained(str(directory), dtype=torch.float32))


def kept_of(directory):
    """留下的 id；约三分之二。"""
    tokenizer = load_tokenizer(str(directory))
    counts = np.arange(max(tokenizer.get_vocab().values()) + 1) % 3
    return BpeRules(tokenizer).kept(counts, 0.3)


def test_the_logits_of_what_is_kept_are_those_of_transformers(directory, tmp_path):
    kept, whole = kept_of(directory), AutoModelForCausalLM.from_pretrained(directory).eval()
    model = load(directory)
    count = model.num_parameters()
    dropped = [i for i in range(model.vocab_size) if i not in set(kept)][:7]
    outside = trim_model(model, kept, dropped)
    new = torch.tensor([[5, 1, len(kept) - 1, 17, 2]])
    with torch.no_grad():
        expected = whole(torch.tensor(kept)[new]).logits
        hidden = model(new)
        torch.testing.assert_close(model.logits(hidden), expected[..., kept])
        torch.testing.assert_close(outside.logits(hidden), expected[..., dropped])
        model.model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(again(new).logits, expected[..., kept])
    assert again.config.get_text_config().vocab_size == model.vocab_size == len(kept)
    assert model.num_parameters() < count
    old = PretrainedLM(whole).eos_token_ids
    assert {kept[i] for i in model.eos_token_ids} == old
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        before, after = (getattr(each.config, key, None) for each in (whole, model.model))
        assert (None if after is None else kept[after]) == before, key


def test_a_student_from_the_trimmed_teacher_is_the_trimmed_student(tiny_qwen2):
    kept = [*range(0, 300, 2), 397, 398, 399]
    model = PretrainedLM(tiny_qwen2)
    whole = from_hf(tiny_qwen2)
    trim_model(model, kept, [])
    student, new = from_hf(model), torch.tensor([[3, 9, 150, 152]])
    with torch.no_grad():
        expected = whole.logits(whole(torch.tensor(kept)[new]))[..., kept]
        torch.testing.assert_close(student.logits(student(new)), expected)
    assert student.config.vocab_size == len(kept)
    assert {kept[i] for i in student.eos_token_ids} == whole.eos_token_ids


def test_adapters_go_on_a_trimmed_base(tiny_llama):
    model = PretrainedLM(tiny_llama)
    trim_model(model, [*range(0, 400, 2), 397], [])
    add_lora(model, LoraConfig(rank=2))
    assert model.vocab_size == 201
    model.logits(model(torch.tensor([[1, 200]]))).sum().backward()
    assert all(p.grad is not None for p in adapter_parameters(model))


def test_an_embedding_too_short_is_refused(tiny_llama):
    with pytest.raises(DistillabError, match="id 400, but the model's embedding has 400 rows"):
        trim_model(PretrainedLM(tiny_llama), [0, 1, 400], [])


def test_a_model_that_looks_at_ids_elsewhere_is_refused(tiny_llama):
    model = PretrainedLM(tiny_llama)
    table = torch.nn.Embedding(400, 32)

    def add(module, arguments, keywords, output):
        output.last_hidden_state = output.last_hidden_state + table(keywords["input_ids"])
        return output

    tiny_llama.model.register_forward_hook(add, with_kwargs=True)
    with pytest.raises(DistillabError, match="cannot trim model_type 'llama': its logits change"):
        trim_model(model, [*range(0, 400, 2), 397], [])
