"""五种 divergence 与总损失，对照用概率（而非 log 概率）写成的 float64 参考。"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from distillab.config import LossConfig
from distillab.fused import CHUNK_BYTES, fused_distillation_loss
from distillab.losses import distillation_loss, divergence
from distillab.targets import Head, HiddenTargets

DIVERGENCES = {
    "forward_kl": {},
    "reverse_kl": {},
    "jsd": {"beta": 0.3},
    "skew_forward_kl": {"skew": 0.2},
    "skew_reverse_kl": {"skew": 0.2},
}
LOSSES = [
    LossConfig(divergence=name, alpha=alpha, temperature=temperature, **parameters)
    for (name, parameters), alpha, temperature in itertools.product(
        DIVERGENCES.items(), (0.0, 0.5, 1.0), (0.5, 1.0, 2.0, 5.0)
    )
]


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


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("near", [False, True], ids=["random rows", "rows that nearly agree"])
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_loss_and_gradient_equal_the_float64_oracle(loss, near):
    student, teacher, labels = rows(near)
    expected_input = student.double().requires_grad_()
    expected = oracle(expected_input, teacher, labels, loss)
    expected.backward()
    student.requires_grad_()
    found = distillation_loss(student, teacher, labels, loss).total
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
    assert distillation_loss(student, teacher, labels, loss).total.isfinite()


@pytest.mark.parametrize(("name", "parameters"), DIVERGENCES.items())
def test_extreme_logits_give_finite_losses_and_gradients(name, parameters):
    student = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-200.0, 200.0, 0.0]])
    loss = LossConfig(divergence=name, alpha=0.5, temperature=1.0, **parameters)
    total = distillation_loss(student, teacher, torch.tensor([2]), loss).total
    total.backward()
    assert total.isfinite()
    assert student.grad.isfinite().all()


def test_forward_kl_is_the_formula_that_the_seed_computes():
    student, teacher, _ = rows(near=False)
    loss = LossConfig(divergence="forward_kl", alpha=1.0, temperature=2.0)
    expected = 4 * F.kl_div(
        (student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="sum"
    )
    torch.testing.assert_close(distillation_loss(student, teacher, None, loss).total, expected)


def test_alpha_zero_needs_no_teacher_and_equals_cross_entropy():
    student, _, labels = rows(near=False)
    sums = distillation_loss(student, None, labels, LossConfig(alpha=0.0))
    torch.testing.assert_close(sums.total, F.cross_entropy(student, labels, reduction="sum"))
    assert sums.divergence == 0


def test_alpha_above_zero_without_a_teacher_is_refused():
    student, _, labels = rows(near=False)
    with pytest.raises(ValueError, match=r"loss\.alpha=0\.5 needs teacher"):
        distillation_loss(student, None, labels, LossConfig())
    with pytest.raises(ValueError, match=r"loss\.alpha=0\.5 needs teacher"):
        fused_distillation_loss(student, Head(torch.zeros(3, 50)), labels, None, LossConfig())


# ---------------------------------------------------------------- 分块版本


class HeadCase:
    """学生宽 6、教师宽 9，词表 50；``bias``、``scale``、``softcap`` 都用上。"""

    def __init__(self, rows=33, dtype=torch.float32, near=False):
        generator = torch.Generator().manual_seed(1)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        self.hidden = draw(rows, 6).to(dtype)
        self.weight, self.bias = draw(50, 6), draw(50)
        self.teacher_hidden, self.teacher_weight = draw(rows, 9), draw(50, 9)
        if near:
            self.teacher_hidden = torch.cat([self.hidden.float(), draw(rows, 3) * 0.02], 1)
            self.teacher_weight = torch.cat([self.weight, draw(50, 3)], 1)
        self.labels = torch.randint(50, (rows,), generator=generator)

    def loss_and_gradients(self, function, loss, rows=slice(None)):
        inputs = [t.clone().requires_grad_() for t in (self.hidden, self.weight, self.bias)]
        hidden, weight, bias = inputs
        head = Head(weight, bias, scale=0.7, softcap=8.0)
        targets = HiddenTargets(self.teacher_hidden[rows], Head(self.teacher_weight, softcap=20.0))
        sums = function(hidden[rows], head, self.labels[rows], targets, loss)
        (2.5 * sums.total).backward()
        return [*sums, *(t.grad for t in inputs)]

    @staticmethod
    def dense(hidden, head, labels, targets, loss):
        return distillation_loss(
            head.logits(hidden), targets.head.logits(targets.hidden), labels, loss
        )


@pytest.mark.parametrize("chunk_rows", [1, 8, 1000])
@pytest.mark.parametrize("loss", [x for x in LOSSES if x.temperature == 2.0], ids=str)
def test_chunked_loss_equals_the_dense_one_in_value_and_gradient(loss, chunk_rows, monkeypatch):
    monkeypatch.setitem(CHUNK_BYTES, "cpu", chunk_rows * 50 * 4)
    case = HeadCase()
    found = case.loss_and_gradients(fused_distillation_loss, loss)
    expected = case.loss_and_gradients(HeadCase.dense, loss)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def test_losses_over_parts_of_the_rows_add_up_to_the_loss_over_all():
    case, loss = HeadCase(), LossConfig(divergence="jsd", temperature=1.0)
    whole = case.loss_and_gradients(fused_distillation_loss, loss)
    parts = [
        case.loss_and_gradients(fused_distillation_loss, loss, rows)
        for rows in (slice(0, 5), slice(5, 20), slice(20, None))
    ]
    for left, *right in zip(whole, *parts, strict=True):
        torch.testing.assert_close(left, sum(right), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("near", [False, True])
def test_bf16_hidden_states_give_gradients_within_one_percent_of_float32(near):
    case, loss = HeadCase(rows=200, near=near), LossConfig(alpha=1.0, temperature=1.0)
    case.hidden = case.hidden.bfloat16().float()  # 两边输入相同，只比较算术
    expected = case.loss_and_gradients(HeadCase.dense, loss)
    with torch.autocast("cpu", torch.bfloat16):
        found = case.loss_and_gradients(fused_distillation_loss, loss)
    for left, right in zip(found[3:], expected[3:], strict=True):
        assert relative(left, right.double()) < 0.01


def test_no_response_token_gives_zero_loss_with_a_graph():
    case = HeadCase(rows=0)
    total, *_, d_hidden, d_weight, _ = case.loss_and_gradients(
        fused_distillation_loss, LossConfig()
    )
    assert total == 0
    assert d_hidden.shape == (0, 6)
    assert not d_weight.any()


def test_frozen_head_gets_no_gradient_and_hidden_states_still_do():
    case = HeadCase()
    hidden, head = case.hidden.requires_grad_(), Head(case.weight)
    targets = HiddenTargets(case.teacher_hidden, Head(case.teacher_weight))
    fused_distillation_loss(hidden, head, case.labels, targets, LossConfig()).total.backward()
    assert hidden.grad.any()
    assert case.weight.grad is None


def test_heads_over_different_vocabularies_are_refused():
    case = HeadCase()
    targets = HiddenTargets(case.teacher_hidden, Head(case.teacher_weight[:40]))
    with pytest.raises(ValueError, match=r"40 rows.*50"):
        fused_distillation_loss(case.hidden, Head(case.weight), case.labels, targets, LossConfig())


def test_cut_head_gives_padding_rows_no_gradient():
    case = HeadCase()
    weight = case.weight.requires_grad_()
    labels = case.labels % 40
    targets = HiddenTargets(case.teacher_hidden, Head(case.teacher_weight).cut(40))
    sums = fused_distillation_loss(case.hidden, Head(weight).cut(40), labels, targets, LossConfig())
    sums.total.backward()
    assert weight.grad[:40].any()
    assert not weight.grad[40:].any()
