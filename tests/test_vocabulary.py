"""``Vocabulary``：有空洞的词表里哪些 id 有概率，以及它们从采样到导出都不出现。"""

import logging

import pytest
import torch
from placed import placed
from torch import nn

from distillab.batch import Example, Tokens
from distillab.data.left_out import LeftOut, check_left_out, count_left_out
from distillab.errors import DistillabError
from distillab.export.convert import export_student, to_hf_state_dict
from distillab.generate.generator import TextGenerator
from distillab.generate.likelihood import likelihoods
from distillab.models.student import StudentModel
from distillab.models.tokenizer import own_vocabulary, shared_vocabulary
from distillab.targets import Head
from distillab.vocabulary import Vocabulary


def test_a_vocabulary_knows_its_gaps():
    assert Vocabulary.of(range(5)) == Vocabulary(5)
    gaps = Vocabulary.of([0, 1, 4, 6])
    assert gaps == Vocabulary(7, (2, 3, 5))
    assert len(gaps) == 4
    assert [token in gaps for token in (-1, 0, 2, 6, 7)] == [False, True, False, True, False]
    assert gaps.kept([6, 5, 7]) == [True, False, False]
    assert gaps.mask(torch.tensor([[6, 5], [7, 0]])).tolist() == [[True, False], [False, True]]
    assert gaps.within(4) == Vocabulary(4, (2, 3))
    assert gaps.within(7) is gaps
    assert Vocabulary(5).excluded(torch.device("cpu")) is None
    with pytest.raises(DistillabError, match="limit is 0, expected at least 1"):
        Vocabulary(0)


@pytest.mark.parametrize(
    ("whole", "part", "covers"),
    [
        (Vocabulary(5), Vocabulary(5), True),
        (Vocabulary(7), Vocabulary(7, (2,)), True),
        (Vocabulary(7, (2,)), Vocabulary(7), False),
        (Vocabulary(7, (2, 6)), Vocabulary(5, (2,)), True),
        (Vocabulary(4), Vocabulary(5), False),
    ],
)
def test_one_vocabulary_covers_another_when_it_has_each_of_its_ids(whole, part, covers):
    assert whole.covers(part) == covers


def test_a_cut_head_gives_gaps_no_probability_whatever_its_softcap():
    head = Head(torch.randn(10, 4), torch.randn(10), scale=2.0, softcap=5.0)
    logits = head.cut(Vocabulary(8, (0, 5))).logits(torch.randn(3, 4))
    assert (logits[:, [0, 5]] == -torch.inf).all()
    assert logits[:, [1, 2, 3, 4, 6, 7]].isfinite().all()


@pytest.fixture
def gapped(tiny_tokenizer):
    return placed(tiny_tokenizer, im_end=410)


@pytest.fixture
def student(tiny_config):
    torch.manual_seed(0)
    return StudentModel(tiny_config.model_copy(update={"vocab_size": 416})).eval()


def favour(model: nn.Module, rows) -> None:
    """这些行的 logit 总是最大的，或最小的。"""
    with torch.no_grad():
        weight = model.embedding.weight
        weight[rows[::2]], weight[rows[1::2]] = 9 * weight[0], -9 * weight[0]


@pytest.mark.parametrize("strategy", ["greedy", "top_k", "top_p", "sample"])
def test_gaps_are_never_sampled_and_what_lies_beyond_them_is(gapped, student, strategy):
    favour(student, [*range(400, 410), *range(411, 416)])
    generator = TextGenerator(student, gapped)
    prompts = torch.randint(0, 397, (64, 3), generator=torch.Generator().manual_seed(0))
    ids = generator.generate_ids(prompts, strategy=strategy, max_new_tokens=4, seeds=range(64))
    assert set(ids.flatten().tolist()) <= {*range(399), 410}
    favour(student, [410])
    ids = generator.generate_ids(prompts, strategy="greedy", max_new_tokens=1)
    assert 410 in ids.flatten().tolist()


def test_gaps_have_no_likelihood(gapped, student):
    favour(student, range(400, 410))
    vocabulary = own_vocabulary(gapped)
    requests = [([1, 2], [token]) for token in range(416) if token in vocabulary]
    found = likelihoods(student, requests, vocabulary=vocabulary, batch_size=64)
    total = sum(torch.tensor(one.total).exp().item() for one in found)
    assert total == pytest.approx(1, abs=1e-5)


def test_an_exported_gap_is_the_mean_row(gapped, student, tmp_path):
    vocabulary = own_vocabulary(gapped)
    weight = student.embedding.weight.detach()
    rows = [token for token in range(416) if token in vocabulary]
    found = to_hf_state_dict(student, vocabulary)["model.embed_tokens.weight"]
    assert torch.equal(found[rows], weight[rows])
    others = [token for token in range(416) if token not in vocabulary]
    torch.testing.assert_close(found[others], weight[rows].mean(0).expand(len(others), -1))
    export_student(student, gapped, tmp_path / "out", vocabulary=vocabulary)


# ---------------------------------------------------------------- 两个分词器不一样


def test_a_stop_token_that_is_not_shared_is_refused(tiny_tokenizer, gapped):
    shared = shared_vocabulary(gapped, tiny_tokenizer)
    with pytest.raises(
        DistillabError, match=r"'<\|im_end\|>' \(id 410\) ends the student's responses, but the te"
    ):
        check_left_out(shared, [("student", gapped, {397, 410})])
    with pytest.raises(
        DistillabError, match=r"\(id 399\) ends the teacher's responses, but the student's"
    ):
        check_left_out(shared, [("student", gapped, {397}), ("teacher", tiny_tokenizer, {399})])


def test_what_is_not_shared_is_said_once(tiny_tokenizer, caplog):
    caplog.set_level(logging.INFO, "distillab")
    larger = placed(tiny_tokenizer, think=400, other=403)
    shared = shared_vocabulary(tiny_tokenizer, larger)
    sides = [("student", tiny_tokenizer, {399}), ("teacher", larger, {399})]
    check_left_out(shared, sides)
    assert caplog.messages == [
        "student and teacher share 400 token ids; without probability and not trained on: "
        "2 of the teacher's ('<|think|>', '<|other|>')"
    ]
    caplog.clear()
    check_left_out(shared, sides[:1])
    assert not caplog.messages


def test_response_tokens_that_only_the_student_knows_are_counted(tiny_tokenizer, caplog):
    larger = placed(tiny_tokenizer, think=401)
    left = LeftOut.of("student", larger, shared_vocabulary(larger, tiny_tokenizer))
    view = Tokens([5, 401, 6, 401, 7], [2, 3, 4])
    block = {"input_ids": torch.tensor([1, 401, 2]), "labels": torch.tensor([401, 2, -100])}
    count_left_out("data", [Example(view, view), block], left, 416)
    assert caplog.messages == [
        "data: 2 of 5 response tokens are not trained on: only the student's tokenizer has "
        "'<|think|>'",
        "data: 3 tokens mean nothing to the teacher that reads them: only the student's tokenizer "
        "has '<|think|>'",
    ]
    with pytest.raises(DistillabError, match=r"cannot read .*401.* embedding has 400 rows"):
        count_left_out("data", [Example(view, view)], left, 400)
    with pytest.raises(DistillabError, match=r"embedding has 400 rows"):
        count_left_out("a stream", None, left, 400)
    only = Tokens([5, 401], [1])
    with pytest.raises(DistillabError, match="not one of the 1 response tokens"):
        count_left_out("data", [Example(only, only)], left, 416)
