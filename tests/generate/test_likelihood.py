"""后文的似然：与 transformers 逐条独立算出的相同，不取决于与谁同批、有没有共同的上文。"""

import pytest
import torch

from distillab.config.model_sections import ModelConfig
from distillab.export.convert import from_hf
from distillab.generate.likelihood import likelihoods
from distillab.models.interface import PretrainedLM
from distillab.models.student import StudentModel
from distillab.vocabulary import Vocabulary

CONTEXTS = [[5, 6, 7, 8, 9], [11], [300, 20, 21], list(range(40, 70)), [5, 6, 7, 8, 9, 10]]
CHOICES = [[1], [2, 3], [4, 5, 6, 7], [2, 3]]
REQUESTS = [(context, choice) for context in CONTEXTS for choice in CHOICES]


@torch.no_grad()
def by_hand(model, context, continuation, limit=400):
    """整句一次前向，全部 logits，逐个 token 取。"""
    logits = model(torch.tensor([context + continuation])).logits[0, :, :limit]
    log_p = logits.double().log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(continuation) - 1)
    total = sum(float(log_p[i, token]) for i, token in zip(places, continuation, strict=True))
    greedy = all(
        int(log_p[i].argmax()) == token for i, token in zip(places, continuation, strict=True)
    )
    return total, greedy


def found(model, requests, **options):
    scored = likelihoods(
        model, requests, **{"vocabulary": Vocabulary(400), "batch_size": 6} | options
    )
    return [one.total for one in scored]


@pytest.mark.parametrize("family", ["qwen2", "llama", "student"])
def test_likelihoods_are_those_of_transformers(family, request):
    hf = request.getfixturevalue("tiny_llama" if family == "llama" else "tiny_qwen2")
    model = from_hf(hf) if family == "student" else PretrainedLM(hf)
    scored = likelihoods(model, REQUESTS, vocabulary=Vocabulary(400), batch_size=6)
    for one, (context, continuation) in zip(scored, REQUESTS, strict=True):
        total, greedy = by_hand(hf, context, continuation)
        assert one.total == pytest.approx(total, rel=1e-4)
        assert (one.tokens, one.greedy) == (len(continuation), greedy)


def test_what_greedy_decoding_writes_is_called_greedy(tiny_qwen2):
    ids = tiny_qwen2.generate(
        torch.tensor([CONTEXTS[0]]), max_new_tokens=4, min_new_tokens=4, do_sample=False,
        pad_token_id=0,
    )[0, 5:].tolist()  # fmt: skip
    requests = [(CONTEXTS[0], ids), (CONTEXTS[0], [*ids[:3], (ids[3] + 1) % 400]), ([3], ids)]
    scored = likelihoods(
        PretrainedLM(tiny_qwen2), requests, vocabulary=Vocabulary(400), batch_size=4
    )
    assert [one.greedy for one in scored] == [True, False, by_hand(tiny_qwen2, [3], ids)[1]]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
def test_a_likelihood_does_not_depend_on_its_batch(tiny_qwen2, batch_size):
    model = PretrainedLM(tiny_qwen2.double())
    together = found(model, REQUESTS)
    assert found(model, REQUESTS, batch_size=batch_size) == pytest.approx(together, rel=1e-5)
    alone = [found(model, [request])[0] for request in REQUESTS[:5]]
    assert alone == pytest.approx(together[:5], rel=1e-5)


def test_layers_that_cannot_continue_a_cache_give_the_same(tiny_qwen2, monkeypatch):
    model = PretrainedLM(tiny_qwen2)
    expected = found(model, REQUESTS)
    used = []
    monkeypatch.setattr(
        "distillab.generate.likelihood._can_share", lambda _: used.append(1) or False
    )
    assert found(model, REQUESTS) == pytest.approx(expected, rel=1e-5)
    assert used


def test_sequences_as_long_as_the_model_are_scored_next_to_shorter_ones(tiny_config):
    torch.manual_seed(0)
    model = StudentModel(tiny_config).eval()  # max_seq_len 64，多一个 token 就报错
    requests = [
        (list(range(60)), [1, 2, 3, 4, 5]), (list(range(60)), [9]),
        ([1, 2], list(range(30, 70))), ([1, 2], [7, 8]),
    ]  # fmt: skip
    together = found(model, requests, batch_size=16)
    assert together == pytest.approx([found(model, [one])[0] for one in requests], rel=1e-5)


def test_rows_beyond_the_vocabulary_have_no_probability():
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1,
                         intermediate_size=48, vocab_size=50, max_seq_len=16)  # fmt: skip
    model = StudentModel(config).eval()
    totals = found(model, [([1], [token]) for token in range(40)], vocabulary=Vocabulary(40))
    assert sum(torch.tensor(totals, dtype=torch.float64).exp()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "request_", [([], [1]), ([1], []), (list(range(60)), list(range(6)))]
)  # fmt: skip
def test_a_request_that_cannot_be_scored_is_refused(tiny_qwen2, request_):
    with pytest.raises(ValueError, match="expected at least 1 each, and 64 at most"):
        found(PretrainedLM(tiny_qwen2), [request_])
