"""五种 divergence 与总损失，对照用概率（而非 log 概率）写成的 float64 参考。"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from objectives import DIVERGENCES, LOSSES, relative

from distillab.config.schema import LossConfig
from distillab.loss.losses import distillation_loss, divergence
from distillab.targets import DenseTargets, SparseTargets


def oracle(student, teacher, labels, loss):
    """design 里公式的直译：float64，概率空间。"""

    def kl(a, b):
        return (a * (a / b).log()).sum()

    student, teacher = student.double(), teacher.double()
    q = (student / loss.temperature).softmax(-1)
    p = (teacher / loss.temperature).softmax(-1)
    match loss.divergence:
        case "forward_kl":
            d = kl(p, q)
        case "reverse_kl":
            d = kl(q, p)
        case "jsd":
            m = loss.beta * p + (1 - loss.beta) * q
            d = loss.beta * kl(p, m) + (1 - loss.beta) * kl(q, m)
        case "skew_forward_kl":
            d = kl(p, loss.skew * p + (1 - loss.skew) * q)
        case "skew_reverse_kl":
            d = kl(q, (1 - loss.skew) * p + loss.skew * q)
    ce = -student.softmax(-1)[torch.arange(len(labels)), labels].log().sum()
    return loss.alpha * loss.temperature**2 * d + (1 - loss.alpha) * ce


def rows(near: bool, vocab: int = 50, count: int = 7):
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(count, vocab, generator=generator)
    noise = torch.randn(count, vocab, generator=generator)
    student = teacher + 0.05 * noise if near else 3 * noise
    return student, teacher, torch.randint(vocab, (count,), generator=generator)


@pytest.mark.parametrize("near", [False, True], ids=["random rows", "rows that nearly agree"])
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_loss_and_gradient_equal_the_float64_oracle(loss, near):
    student, teacher, labels = rows(near)
    expected_input = student.double().requires_grad_()
    expected = oracle(expected_input, teacher, labels, loss)
    expected.backward()
    student.requires_grad_()
    found = distillation_loss(student, DenseTargets(teacher), labels, loss).total
    found.backward()
    # log 概率自身的舍入约 1e-7：近似相等的两行之间 KL 很小，只能要求绝对误差
    rounding = 1e-7 * loss.temperature**2 * len(labels)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6, abs=rounding)
    assert relative(student.grad, expected_input.grad) < (1e-4 if near else 1e-5)


@pytest.mark.parametrize(("name", "parameters"), DIVERGENCES.items())
def test_divergence_of_a_distribution_from_itself_is_zero(name, parameters):
    log_p = rows(near=False)[0].log_softmax(-1)
    value = divergence(log_p, log_p, LossConfig(divergence=name, **parameters))
    torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-6, rtol=0)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(sorted(DIVERGENCES)),
    st.integers(0, 2**31),
    st.floats(0.1, 30),
    st.floats(-1e3, 1e3),
)
def test_divergences_are_not_negative_and_ignore_a_constant_added_to_logits(
    name, seed, spread, constant
):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = spread * torch.randn(2, 3, 20, generator=generator, dtype=torch.float64)
    loss = LossConfig(divergence=name, alpha=1.0, temperature=1.0, **DIVERGENCES[name])
    labels = torch.zeros(3, dtype=torch.long)
    # 这里要 float64：直接走 divergence，distillation_loss 会转成 float32
    value = divergence(teacher.log_softmax(-1), student.log_softmax(-1), loss)
    assert (value > -1e-9).all()
    moved = divergence(
        (teacher + constant).log_softmax(-1), (student - constant).log_softmax(-1), loss
    )
    torch.testing.assert_close(moved, value, atol=1e-8, rtol=1e-8)
    assert distillation_loss(student, DenseTargets(teacher), labels, loss).total.isfinite()


@pytest.mark.parametrize(("name", "parameters"), DIVERGENCES.items())
def test_extreme_logits_give_finite_losses_and_gradients(name, parameters):
    student = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-200.0, 200.0, 0.0]])
    loss = LossConfig(divergence=name, alpha=0.5, temperature=1.0, **parameters)
    total = distillation_loss(student, DenseTargets(teacher), torch.tensor([2]), loss).total
    total.backward()
    assert total.isfinite()
    assert student.grad.isfinite().all()


def test_forward_kl_is_the_formula_that_the_seed_computes():
    student, teacher, _ = rows(near=False)
    loss = LossConfig(divergence="forward_kl", alpha=1.0, temperature=2.0)
    expected = 4 * F.kl_div(
        (student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="sum"
    )
    torch.testing.assert_close(
        distillation_loss(student, DenseTargets(teacher), None, loss).total, expected
    )


def test_alpha_zero_needs_no_teacher_and_equals_cross_entropy():
    student, _, labels = rows(near=False)
    sums = distillation_loss(student, None, labels, LossConfig(alpha=0.0))
    torch.testing.assert_close(sums.total, F.cross_entropy(student, labels, reduction="sum"))
    assert sums.divergence == 0


def test_alpha_above_zero_without_a_teacher_is_refused():
    student, _, labels = rows(near=False)
    with pytest.raises(ValueError, match=r"loss\.alpha=0\.5 needs teacher"):
        distillation_loss(student, None, labels, LossConfig())


def test_label_smoothing_spreads_part_of_the_label_over_the_vocabulary():
    student, _, labels = rows(near=False)
    loss = LossConfig(alpha=0.0, label_smoothing=0.3)
    log_q = student.double().log_softmax(-1)
    target = torch.full_like(log_q, 0.3 / 50)
    target[range(7), labels] += 0.7
    found = distillation_loss(student, None, labels, loss).total
    assert found.item() == pytest.approx(-(target * log_q).sum().item(), rel=1e-6)


def test_metrics_are_the_teachers_entropy_and_the_share_of_equal_top_tokens():
    student, teacher, labels = rows(near=False)
    teacher[0] = student[0]
    loss = LossConfig(alpha=0.5, temperature=2.0)
    sums = distillation_loss(student, DenseTargets(teacher), labels, loss)
    entropy = torch.distributions.Categorical(logits=teacher / 2).entropy().sum()
    torch.testing.assert_close(sums.teacher_entropy, entropy)
    assert sums.top1_agreement == (student.argmax(-1) == teacher.argmax(-1)).sum() >= 1
    expected = F.cross_entropy(teacher, labels, reduction="sum")
    torch.testing.assert_close(sums.teacher_cross_entropy, expected)


# ---------------------------------------------------------------- 稀疏的教师


def sparse(tail, keep=8):
    student, teacher, labels = rows(near=False)
    probs, ids = teacher.softmax(-1).topk(keep)
    return student, SparseTargets(ids, probs, tail), labels


def test_renormalised_tail_is_the_teacher_cut_to_its_tokens():
    student, targets, labels = sparse("renormalise")
    for name, parameters in DIVERGENCES.items():
        if name == "reverse_kl":
            continue
        loss = LossConfig(divergence=name, alpha=0.5, temperature=2.0, **parameters)
        cut = torch.full_like(student, -80.0).scatter(1, targets.ids, targets.probs.log())
        found = distillation_loss(student, targets, labels, loss).total
        expected = distillation_loss(student, DenseTargets(cut), labels, loss).total
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_bucket_is_a_distribution_over_the_tokens_and_one_more_outcome():
    student, targets, labels = sparse("bucket")
    for name, parameters in DIVERGENCES.items():
        loss = LossConfig(divergence=name, alpha=1.0, temperature=1.0, **parameters)
        q = student.double().softmax(-1).gather(1, targets.ids)
        p = targets.probs.double()
        p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
        expected = oracle(q.log(), p.log(), labels[:0], loss)
        found = distillation_loss(student, targets, None, loss).total
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_samples_give_the_full_divergence_and_gradient_on_average():
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 1, 12, generator=generator).double()
    p = teacher.softmax(-1)
    ids = torch.multinomial(p, 200_000, replacement=True, generator=generator)
    targets = SparseTargets(
        ids, torch.full(ids.shape, 1 / ids.shape[1]).double(), "sampled", -(p * p.log()).sum(-1)
    )
    loss = LossConfig(alpha=1.0, temperature=1.0)
    results = []
    for teacher_targets in (targets, DenseTargets(teacher)):
        logits = student.clone().requires_grad_()
        total = distillation_loss(logits, teacher_targets, None, loss).total
        total.backward()
        results.append((total.detach(), logits.grad))
    torch.testing.assert_close(results[0], results[1], atol=0.01, rtol=0)


@pytest.mark.parametrize("tail", ["renormalise", "bucket", "sampled"])
def test_what_only_the_full_distribution_knows_comes_with_the_sparse_targets(tail):
    student, teacher, labels = rows(near=False)
    teacher[:3] = student[:3]
    loss = LossConfig(temperature=1.0)
    dense = distillation_loss(student, DenseTargets(teacher), labels, loss)
    log_p = teacher.log_softmax(-1)
    entropy, at_label = -(log_p.exp() * log_p).sum(-1), log_p[range(7), labels]
    probs, ids = log_p.exp().sort(-1)  # 最不可能的 8 个
    targets = SparseTargets(ids[:, :8], probs[:, :8], tail, entropy)
    bare = distillation_loss(student, targets, labels, loss)
    assert bare.teacher_cross_entropy.isnan()
    assert bare.top1_agreement.isnan() == (tail == "sampled")
    targets = SparseTargets(ids[:, :8], probs[:, :8], tail, entropy, at_label, log_p.argmax(-1))
    found = distillation_loss(student, targets, labels, loss)
    torch.testing.assert_close(found.teacher_cross_entropy, dense.teacher_cross_entropy)
    assert found.top1_agreement == dense.top1_agreement
    assert found.total == bare.total
    alone = distillation_loss(student, targets, None, LossConfig(alpha=1.0, temperature=1.0))
    assert alone.teacher_cross_entropy == 0


@pytest.mark.parametrize(
    ("tail", "values", "named"),
    [
        ("renormalise", {"divergence": "reverse_kl"}, ["renormalise", "reverse_kl"]),
        ("bucket", {"temperature": 2.0}, ["bucket", "temperature 2"]),
        ("sampled", {"divergence": "jsd"}, ["sampled", "jsd"]),
        ("sampled", {"temperature": 0.5}, ["sampled", "temperature 0.5"]),
    ],
)
def test_a_tail_that_cannot_serve_an_objective_is_refused_naming_both(tail, values, named):
    student, targets, labels = sparse("renormalise")
    targets = SparseTargets(targets.ids, targets.probs, tail, torch.zeros(7))
    loss = LossConfig(**({"temperature": 1.0} | values))
    with pytest.raises(ValueError, match=".*".join(named)):
        distillation_loss(student, targets, labels, loss)


def test_sparse_targets_of_the_wrong_shape_are_refused():
    ids, probs = torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"ids \[3, 2\] and probs \[3, 1\]"):
        SparseTargets(ids, probs[:, :1], "bucket")
    with pytest.raises(ValueError, match="sampled targets need entropy"):
        SparseTargets(ids, probs, "sampled")
    with pytest.raises(ValueError, match=r"entropy \[2\] must be \[P\] with P=3"):
        SparseTargets(ids, probs, "sampled", torch.zeros(2))
    with pytest.raises(ValueError, match=r"label_log_prob \[1\] must be \[P\] with P=3"):
        SparseTargets(ids, probs, "bucket", label_log_prob=torch.zeros(1))
    with pytest.raises(ValueError, match=r"top \[3, 1\] must be \[P\] with P=3"):
        SparseTargets(ids, probs, "bucket", top=ids[:, :1])
