"""存着分布的教师：键认得出是哪段文字，配方说的字节数就是存的。"""

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import given

from distillab.batch import Example, Tokens, View, collate_examples, collate_packed
from distillab.config.model_sections import CacheConfig
from distillab.teachers.stored import Rule, document_keys


def example(ids, response):
    view = Tokens(list(ids), list(response))
    return Example(view, view)


FIRST, SECOND = example([5, 6, 7, 8], [2, 3]), example([5, 6, 9], [1, 2])


def keys(*rows):
    return document_keys(collate_packed(rows, pad_id=0).teacher)


def test_a_text_has_one_key_alone_padded_or_packed():
    alone = [document_keys(collate_examples([one], 0).teacher)[0] for one in (FIRST, SECOND)]
    padded = document_keys(collate_examples([SECOND, FIRST], 0).teacher)
    assert padded == (alone[1], alone[0])
    assert keys((FIRST, SECOND), (SECOND,)) == (*alone, alone[1])
    assert [count for _, count in alone] == [2, 2]
    assert {len(key) for key, _ in alone} == {16}


def test_another_token_or_another_response_is_another_key():
    changed = [example([5, 6, 7, 4], [2, 3]), example([5, 6, 7, 8], [1, 2]),
               example([5, 6, 7, 8], [3]), example([5, 6, 7, 8, 1], [2, 3])]  # fmt: skip
    found = {document_keys(collate_examples([one], 0).teacher)[0][0] for one in [FIRST, *changed]}
    assert len(found) == 5


def test_a_row_without_responses_has_no_key():
    ids = torch.arange(6).view(2, 3)
    view = View(ids, None, torch.tensor([4]))
    assert [count for _, count in document_keys(view)] == [1]


@given(st.sampled_from(["sampled", "top_k"]), st.integers(1, 60), st.integers(2, 200_000))
def test_the_recipe_knows_the_bytes_of_a_token(keep, count, vocab):
    config = CacheConfig(samples=count) if keep == "sampled" else CacheConfig(keep=keep, k=count)
    assert config.token_bytes(vocab) == Rule(config, vocab).layout.size


def test_targets_come_from_the_bytes_alone(tiny_qwen2):
    from distillab.models.interface import PretrainedLM
    from distillab.teachers.in_process import LocalTeacher
    from distillab.vocabulary import Vocabulary

    batch = collate_examples([FIRST, SECOND], 0)
    live = LocalTeacher(PretrainedLM(tiny_qwen2)).targets(batch.teacher, Vocabulary(400))
    rule = Rule(CacheConfig(samples=8), 400)
    records = rule.records(live, batch.labels, document_keys(batch.teacher))
    again = rule.records(live, batch.labels, document_keys(batch.teacher))
    assert np.array_equal(records, again)
    found = rule.targets(records)
    logits = live.head.logits(live.hidden).log_softmax(-1)
    expected = logits.gather(1, batch.labels[:, None])[:, 0]
    torch.testing.assert_close(found.label_log_prob, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.top, logits.argmax(-1))
    assert torch.equal(found.probs.sum(1), torch.ones(len(batch)))
