"""抽样与最可能的 K 个：权重与梯度的平均就是完整分布的，各样指标完整，与同批的别的行无关。"""

import math

import pytest
import torch
from objectives import relative

from distillab.config.schema import LossConfig
from distillab.errors import DistillabError
from distillab.loss.fused import fused_distillation_loss
from distillab.loss.losses import distillation_loss
from distillab.targets import DenseTargets, Head, HiddenTargets
from distillab.teachers import sampling_targets as module
from distillab.teachers.sampling_targets import sampled_targets, top_k_targets, uniforms
from distillab.vocabulary import Vocabulary

P, H, V = 37, 16, 300
FORWARD_KL = LossConfig(divergence="forward_kl", alpha=1.0, temperature=1.0)
VOCABULARY = Vocabulary(290, (0, 7, 8, 289))
"""head 的最后十行与中间几行没有概率。"""


@pytest.fixture
def teacher(monkeypatch):
    """head 带 bias、scale、softcap 与没有概率的 id；一块只有几行。"""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    head = Head(draw(V, H), draw(V), 0.9, 20.0).cut(VOCABULARY)
    monkeypatch.setattr(module, "default_budget", lambda _: 4 * 290 * 16)
    return HiddenTargets(1.5 * draw(P, H), head)


@pytest.fixture
def labels():
    allowed = torch.tensor([token for token in range(V) if token in VOCABULARY])
    return allowed[torch.randint(len(allowed), (P,), generator=torch.Generator().manual_seed(1))]


def log_probs(teacher):
    """``[P, V]``，float64。"""
    return teacher.head.logits(teacher.hidden).double().log_softmax(-1)


def weights(targets, vocab=290):
    """稀疏的权重铺成 ``[P, V]``，float64。"""
    return torch.zeros(len(targets.ids), vocab, dtype=torch.float64).scatter_add_(
        1, targets.ids, targets.probs.double()
    )


def drawn(teacher, labels, samples, seed=0):
    return sampled_targets(teacher, labels, uniforms(seed, b"document", len(labels)), samples)


# ---------------------------------------------------------------- 均匀数


def test_a_position_has_one_number_however_many_follow_it():
    first = uniforms(3, b"key", 50)
    assert first.dtype == torch.float64
    assert ((first >= 0) & (first < 1)).all()
    torch.testing.assert_close(uniforms(3, b"key", 7), first[:7], rtol=0, atol=0)
    assert len(uniforms(3, b"key", 0)) == 0
    others = [uniforms(4, b"key", 50), uniforms(3, b"kez", 50), uniforms(34, b"ey", 50)]
    assert all((other != first).all() for other in others)


def test_the_numbers_are_these_on_every_machine():
    assert uniforms(0, b"document", 3).tolist() == pytest.approx(
        [0.07008756867209054, 0.5181626334718441, 0.627580720361335], rel=0, abs=0
    )


def test_the_numbers_are_uniform():
    values = torch.cat([uniforms(0, b"%d" % index, 100) for index in range(100)])
    counts = torch.histc(values, 20, 0, 1)
    assert ((counts - 500).abs() < 5 * math.sqrt(500)).all()


# ---------------------------------------------------------------- 抽样


@pytest.mark.parametrize("samples", [1, 12, 64])
def test_every_count_is_floor_or_ceil_and_the_mean_is_the_distribution(teacher, labels, samples):
    p, mean = log_probs(teacher).exp(), 0
    for seed in range(256):
        targets = drawn(teacher, labels, samples, seed)
        found = weights(targets)
        count = found * samples
        assert (count - count.round()).abs().max() < 1e-4
        assert (count.round() >= (samples * p - 1e-5).floor()).all()
        assert (count.round() <= (samples * p + 1e-5).ceil()).all()
        mean += found / 256
    part = (samples * p) % 1
    deviation = (part * (1 - part) / 256).sqrt() / samples
    common = torch.minimum(part, 1 - part) > 0.04  # 256 次里至少十次，近似正态
    z = (mean - p)[common] / deviation[common]
    assert z.abs().max() < 5
    assert 0.7 < z.square().mean() < 1.3
    assert (targets.ids.diff() >= 0).all()


def test_a_token_without_probability_is_never_drawn(labels):
    logits = torch.full((P, 290), -torch.inf)
    logits[:, 5:250:7] = torch.randn(P, 35)
    logits[:, 12] = -150.0  # exp 下溢
    rows = torch.arange(P)
    targets = DenseTargets(logits)
    allowed = torch.arange(5, 250, 7)
    for edge in (0.0, 1 - 2**-53, 0.5):
        found = sampled_targets(targets, 0 * rows + 5, torch.full((P,), edge).double(), 9)
        assert torch.isin(found.ids, allowed[allowed != 12]).all()
        assert found.entropy.isfinite().all()
    last = sampled_targets(targets, 0 * rows + 5, torch.full((P,), 1 - 2**-53).double(), 1)
    assert (last.ids == 243).all()


def test_systematic_draws_vary_less_than_independent_ones(teacher, labels):
    p = log_probs(teacher).exp()
    generator = torch.Generator().manual_seed(0)
    errors = torch.zeros(2, dtype=torch.float64)
    for seed in range(50):
        targets = drawn(teacher, labels, 12, seed)
        ids = torch.multinomial(p, 12, replacement=True, generator=generator)
        for index, each in enumerate((targets.ids, ids)):
            found = torch.zeros_like(p).scatter_add_(1, each, targets.probs.double())
            errors[index] += (found - p).square().sum()
    assert errors[0] < 0.7 * errors[1]


class Student:
    """读同样隐状态的另一个 head，与它的梯度。"""

    def __init__(self, teacher, labels):
        self.teacher, self.labels = teacher, labels
        self.weight = 2 * torch.randn(V, H, generator=torch.Generator().manual_seed(5))

    def gradient(self, targets, loss=FORWARD_KL):
        weight = self.weight.clone().requires_grad_()
        sums = fused_distillation_loss(
            self.teacher.hidden, weight, self.labels, targets, loss, vocab_limit=290,
            excluded=self.teacher.head.excluded, label_metrics=True,
        )  # fmt: skip
        sums.total.backward()
        return weight.grad.double(), sums


@pytest.mark.parametrize("samples", [12, 32, 64])
def test_the_mean_gradient_of_256_stores_is_the_dense_one(teacher, labels, samples):
    student = Student(teacher, labels)
    dense, _ = student.gradient(teacher)
    mean, single = 0, []
    for seed in range(256):
        gradient, _ = student.gradient(drawn(teacher, labels, samples, seed))
        mean += gradient / 256
        single.append(relative(gradient, dense))
    assert relative(mean, dense) < min(0.01, 1.2 * sum(single) / 256 / 16)


def test_all_metrics_are_those_of_the_full_distribution(teacher, labels):
    student = Student(teacher, labels)
    loss = LossConfig(divergence="forward_kl", alpha=0.5, temperature=1.0)
    _, expected = student.gradient(teacher, loss)
    for targets in (
        drawn(teacher, labels, 12),
        top_k_targets(teacher, labels, 20, "renormalise"),
        top_k_targets(teacher, labels, 20, "bucket"),
    ):
        _, found = student.gradient(targets, loss)
        for name in ("cross_entropy", "teacher_cross_entropy", "teacher_entropy"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name))
        assert found.top1_agreement == expected.top1_agreement


@pytest.mark.parametrize("form", ["hidden", "dense"])
def test_draws_do_not_depend_on_the_other_rows_of_the_batch(teacher, labels, form, monkeypatch):
    points = uniforms(0, b"document", P)

    def targets(rows):
        hidden = HiddenTargets(teacher.hidden[rows], teacher.head)
        if form == "hidden":
            return hidden
        return DenseTargets(teacher.head.logits(hidden.hidden))

    whole = sampled_targets(targets(slice(None)), labels, points, 12)
    monkeypatch.setattr(module, "default_budget", lambda _: 1)  # 一行一块
    for rows in (torch.tensor([3]), torch.tensor([30, 2, 2, 36, 11]), torch.arange(P)):
        found = sampled_targets(targets(rows), labels[rows], points[rows], 12)
        for name in ("ids", "probs", "top"):
            assert getattr(found, name).equal(getattr(whole, name)[rows])
        for name in ("entropy", "label_log_prob"):
            torch.testing.assert_close(getattr(found, name), getattr(whole, name)[rows])


def test_entropy_label_log_prob_and_top_are_the_distributions(teacher, labels):
    log_p = log_probs(teacher)
    entropy = torch.distributions.Categorical(logits=log_p).entropy()
    at_label = log_p.gather(1, labels[:, None])[:, 0]
    for targets in (drawn(teacher, labels, 12), top_k_targets(teacher, labels, 5, "bucket")):
        torch.testing.assert_close(targets.entropy.double(), entropy, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(targets.label_log_prob.double(), at_label, rtol=1e-5, atol=1e-5)
        assert targets.top.equal(log_p.argmax(-1))


# ---------------------------------------------------------------- 最可能的 K 个


def test_top_k_is_the_likeliest_tokens_with_probabilities_that_float16_holds(teacher, labels):
    targets = top_k_targets(teacher, labels, 20, "renormalise")
    probs, ids = log_probs(teacher).exp().topk(20)
    assert targets.ids.equal(ids)
    assert targets.tail == "renormalise"
    assert targets.probs.equal(targets.probs.half().float())
    torch.testing.assert_close(targets.probs.double(), probs, rtol=2**-11, atol=2**-25)


def test_top_k_of_a_certain_teacher_takes_no_token_without_probability(labels):
    head = Head(torch.randn(V, H)).cut(VOCABULARY)
    targets = HiddenTargets(300 * torch.randn(P, H), head)
    found = top_k_targets(targets, labels, 286, "bucket")
    assert not torch.isin(found.ids, head.excluded).any()
    assert found.probs.sum(-1).allclose(torch.ones(P), atol=1e-3)


def test_every_token_kept_is_the_dense_loss(teacher, labels):
    student = Student(teacher, labels)
    dense, _ = student.gradient(teacher)
    for tail in ("renormalise", "bucket"):
        whole = top_k_targets(teacher, labels, 286, tail)
        assert relative(student.gradient(whole)[0], dense) < 1e-3


def test_more_tokens_than_the_teacher_has_are_refused(teacher, labels):
    with pytest.raises(
        DistillabError, match=r"cache\.k is 287, .* 286 tokens: expected at most 286"
    ):
        top_k_targets(teacher, labels, 287, "bucket")
    with pytest.raises(DistillabError, match=r"k is 9, the vocabulary has 8"):
        top_k_targets(DenseTargets(torch.zeros(1, 8)), labels[:1], 9, "bucket")


# ---------------------------------------------------------------- 各种情形


def test_no_response_token_gives_targets_without_rows(teacher, labels):
    none = HiddenTargets(teacher.hidden[:0], teacher.head)
    for targets in (drawn(none, labels[:0], 12), top_k_targets(none, labels[:0], 12, "bucket")):
        assert targets.ids.shape == targets.probs.shape == (0, 12)
        shapes = {part.shape for part in (targets.entropy, targets.label_log_prob, targets.top)}
        assert shapes == {(0,)}
        logits = torch.zeros(0, 290, requires_grad=True)
        assert distillation_loss(logits, targets, labels[:0], FORWARD_KL).total == 0


def test_a_half_precision_teacher_under_autocast_is_read_in_float32(teacher, labels):
    head = Head(teacher.head.weight.bfloat16(), excluded=teacher.head.excluded)
    half = HiddenTargets(teacher.hidden.bfloat16(), head)
    exact = DenseTargets(head.logits(half.hidden))
    with torch.autocast("cpu", torch.bfloat16):
        found = drawn(half, labels, 12)
    expected = drawn(exact, labels, 12)
    torch.testing.assert_close(found.entropy, expected.entropy)
    torch.testing.assert_close(found.label_log_prob, expected.label_log_prob)
    assert found.entropy.dtype == torch.float32
    assert found.ids.equal(expected.ids)


def test_a_teacher_that_is_not_a_number_still_gives_ids(labels):
    logits = torch.full((P, 290), torch.nan)
    targets = drawn(DenseTargets(logits), labels, 12)
    assert ((targets.ids >= 0) & (targets.ids < 290)).all()
    assert targets.entropy.isnan().all()


def test_a_chunk_of_the_vocabulary_is_all_that_exists(teacher, labels, monkeypatch):
    sizes = []
    original = module.total
    monkeypatch.setattr(module, "total", lambda part: sizes.append(len(part)) or original(part))
    drawn(teacher, labels, 12)
    assert max(sizes) == 8
