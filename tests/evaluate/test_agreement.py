"""逐个 token 的一致程度：与稠密的参考相同，分段不多也不少。"""

import numpy as np
import pytest
import torch

from distillab.evaluate import agreement
from distillab.evaluate.agreement import AGREEMENT, by_frequency, by_position, score_rows
from distillab.targets import Head, HiddenTargets
from distillab.vocabulary import Vocabulary

VOCAB, ROWS = 40, 23


def model(seed, width=8, dtype=torch.float32, **head):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, width, generator=generator).to(dtype)
    weight = torch.randn(VOCAB, width, generator=generator).to(dtype)
    bias = torch.randn(VOCAB, generator=generator)
    return HiddenTargets(hidden, Head(weight, bias, **head))


@pytest.fixture
def labels():
    return torch.randint(VOCAB, (ROWS,), generator=torch.Generator().manual_seed(9))


def dense(student, labels, teacher):
    """float64，整个 ``[P, V]``，不用本项目的数学。"""
    q, p = (
        torch.distributions.Categorical(logits=part.head.logits(part.hidden).double())
        for part in (student, teacher)
    )
    top_p, top_q = ([set(row.topk(5).indices.tolist()) for row in d.logits] for d in (p, q))
    return {
        "nats": -q.log_prob(labels),
        "forward_kl": torch.distributions.kl_divergence(p, q),
        "reverse_kl": torch.distributions.kl_divergence(q, p),
        "top1": (p.probs.argmax(-1) == q.probs.argmax(-1)).double(),
        "top5": torch.tensor([len(a & b) / 5 for a, b in zip(top_p, top_q, strict=True)]),
    }


@pytest.mark.parametrize("rows_together", [1, 7, ROWS, 1000])
def test_rows_equal_the_dense_reference_however_they_are_cut(monkeypatch, labels, rows_together):
    monkeypatch.setattr(agreement, "CHUNK_BYTES", 4 * VOCAB * rows_together)
    student, teacher = model(1), model(2, width=12, scale=0.5, softcap=5.0)
    found = score_rows(student, labels, teacher)
    expected = dense(student, labels, teacher)
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values.numpy(), rtol=2e-5, atol=2e-6, err_msg=name)
    assert 0 < found["top1"].sum() + found["top5"].sum() < 2 * ROWS


def test_half_precision_weights_are_multiplied_without_rounding_the_logits(labels):
    student, teacher = model(1, dtype=torch.bfloat16), model(2, dtype=torch.bfloat16)
    found, expected = score_rows(student, labels, teacher), dense(student, labels, teacher)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values.numpy(), rtol=2e-5, atol=2e-6, err_msg=name)


def test_a_model_agrees_with_itself_entirely(labels):
    found = score_rows(model(1), labels, model(1))
    assert not found["forward_kl"].any()
    assert not found["reverse_kl"].any()
    assert found["top1"].all()
    assert (found["top5"] == 1).all()


def test_a_vocabulary_of_fewer_than_five_tokens_has_a_top_five_too(labels):
    def small(seed):
        part = model(seed)
        return HiddenTargets(part.hidden, part.head.cut(Vocabulary(3)))

    assert (score_rows(small(1), labels % 3, small(2))["top5"] == 1).all()


def test_without_a_teacher_only_nats_are_known(labels):
    assert set(score_rows(model(1), labels)) == {"nats"}


def test_heads_of_different_vocabularies_are_refused(labels):
    other = model(2)
    with pytest.raises(ValueError, match="vocabulary"):
        score_rows(
            model(1), labels, HiddenTargets(other.hidden, other.head.cut(Vocabulary(VOCAB - 1)))
        )


def random_rows(count):
    random = np.random.default_rng(0)
    return {name: random.random(count) for name in AGREEMENT}


def recovered(bands, rows):
    """各段的平均乘以 token 数，加起来要等于全体的总和：不重不漏。"""
    for name in AGREEMENT:
        total = sum(band["tokens"] * band[name] for band in bands)
        assert total == pytest.approx(rows[name].sum(), rel=1e-12)


def test_position_buckets_partition_the_tokens():
    positions = np.concatenate([np.arange(1, 21), np.arange(1, 8)])
    rows = random_rows(len(positions))
    bands = by_position(rows, positions)
    assert [(band["from"], band["to"], band["tokens"]) for band in bands] == [
        (1, 1, 2), (2, 3, 4), (4, 7, 8), (8, 15, 8), (16, 20, 5),
    ]  # fmt: skip
    recovered(bands, rows)
    third = (positions >= 4) & (positions <= 7)
    assert bands[2]["forward_kl"] == pytest.approx(rows["forward_kl"][third].mean())


def test_frequency_bands_partition_the_tokens_by_the_rank_of_the_label():
    # token i 出现 2000 - i 次（i < 1200），打乱；排名就是 i + 1。
    counts = 2000 - np.arange(1200)
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(1200), counts))
    rows = random_rows(len(labels))
    bands = by_frequency(rows, labels)
    assert [(band["band"], band["tokens"]) for band in bands] == [
        ("top 10", counts[:10].sum()),
        ("11-100", counts[10:100].sum()),
        ("101-1000", counts[100:1000].sum()),
        ("rest", counts[1000:].sum()),
    ]
    recovered(bands, rows)
    assert bands[0]["top1"] == pytest.approx(rows["top1"][labels < 10].mean())


def test_bands_without_a_token_do_not_appear():
    labels = np.array([5, 5, 7])
    bands = by_frequency(random_rows(3), labels)
    assert [(band["band"], band["tokens"]) for band in bands] == [("top 10", 3)]
