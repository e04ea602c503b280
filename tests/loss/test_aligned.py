"""分词器不同时的损失：分块的对照 float64 的稠密版，稠密的对照论文的极限与 TRL 的 ULD、GOLD。"""

import math
from types import SimpleNamespace

import pytest
import torch
from objectives import relative

from distillab.batch import Alignment
from distillab.config.schema import LossConfig
from distillab.loss.across import aligned_loss, alm, gold, log1mexp, projected_kl, uld
from distillab.loss.aligned import aligned_distillation_loss
from distillab.loss.losses import LossSums, forward_kl
from distillab.targets import Head, HiddenTargets
from distillab.vocabulary import SharedTokens, Vocabulary

OURS, THEIRS = 70, 90
FIRST = tuple(-1 if i % 11 == 0 else i % 60 for i in range(THEIRS))
SHARED = SharedTokens(tuple(range(10, 40)), tuple(range(30, 60)), 30 / THEIRS, FIRST)
ACROSS_NAMES = ("alm", "projected_kl", "uld", "gold")
ACROSS = [
    LossConfig(divergence=name, alpha=alpha) for name in ACROSS_NAMES for alpha in (0.0, 0.5, 1.0)
]


def name(loss):
    return f"{loss.divergence} a={loss.alpha:g}"


class Case:
    """学生 40 行、教师 50 行，一共 30 段，各有几行没有对上；词表 70 与 90，宽 16 与 24。"""

    def __init__(self, rows=(40, 50), chunks=30, dtype=torch.float32):
        generator = torch.Generator().manual_seed(3)
        draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
        self.hidden, self.weight, self.bias = draw(rows[0], 16), draw(OURS, 16), draw(OURS)
        self.head = {"scale": 0.9, "softcap": 30.0}
        self.teacher = HiddenTargets(draw(rows[1], 24), Head(0.8 * draw(THEIRS, 24), draw(THEIRS)))
        self.labels = torch.randint(60, (rows[0],), generator=generator)
        parts = []
        for count in rows:
            starts = torch.randperm(count - 2, generator=generator)[:chunks].sort().values
            chunk = torch.full((count,), chunks)
            for number, start in enumerate(starts.tolist()):
                chunk[start : count - 2] = number  # 最后两行没有对上
            parts += [chunk, starts]
        labels = torch.randint(THEIRS, (rows[1],), generator=generator)
        self.alignment = Alignment(labels, parts[0], parts[2], parts[1], parts[3])
        self.vocabulary = Vocabulary(68, (61, 65))

    def inputs(self, dtype):
        return [
            x.to(dtype, copy=True).requires_grad_() for x in (self.hidden, self.weight, self.bias)
        ]

    def run(self, loss, dtype=torch.float32, **options):
        hidden, weight, bias = inputs = self.inputs(dtype)
        teacher = HiddenTargets(self.teacher.hidden.to(dtype), self.teacher.head)
        sums = aligned_distillation_loss(
            hidden, Head(weight, bias, **self.head), self.labels, teacher, self.alignment, loss,
            self.vocabulary, shared=SHARED, **options,
        )  # fmt: skip
        (2.5 * sums.total).backward()
        return sums, [x.grad for x in inputs]

    def oracle(self, loss):
        hidden, weight, bias = inputs = self.inputs(torch.float64)
        product = (hidden @ weight.T + bias) * self.head["scale"]
        logits = self.head["softcap"] * torch.tanh(product / self.head["softcap"])
        missing = [61, 65, 68, 69]
        logits = logits.index_fill(1, torch.tensor(missing), -1e30)
        theirs = self.teacher.hidden.double() @ self.teacher.head.weight.double().T
        theirs = theirs + self.teacher.head.bias.double()
        sums = aligned_loss(logits, theirs, self.labels, self.alignment, loss, SHARED)
        (2.5 * sums.total).backward()
        return sums, [x.grad for x in inputs]


@pytest.mark.parametrize("loss", ACROSS, ids=name)
@pytest.mark.parametrize("budget", [None, 3 * 4 * OURS], ids=["one chunk", "three rows a chunk"])
def test_value_and_gradients_equal_the_dense_ones(loss, budget):
    case = Case()
    found, gradients = case.run(loss, memory_budget=budget, label_metrics=True)
    expected, exact = case.oracle(loss)
    for field, left, right in zip(LossSums._fields, found, expected, strict=True):
        if field == "teacher_cross_entropy" and loss.alpha == 0:
            continue  # 稠密的那时不看教师
        assert left.item() == pytest.approx(right.item(), rel=1e-5, abs=1e-5), field
    for left, right in zip(gradients, exact, strict=True):
        assert relative(left, right) < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", ACROSS_NAMES)
def test_half_precision_inputs(divergence, dtype):
    """输入与梯度各取整一次。"""
    loss, case = LossConfig(divergence=divergence, alpha=0.5), Case()
    for part in ("hidden", "weight", "bias"):
        setattr(case, part, getattr(case, part).to(dtype).float())
    teacher = case.teacher
    case.teacher = HiddenTargets(teacher.hidden.to(dtype).float(), teacher.head)
    found, gradients = case.run(loss, dtype)
    expected, exact = case.oracle(loss)
    assert found.total.item() == pytest.approx(expected.total.item(), rel=2e-3)
    for left, right in zip(gradients, exact, strict=True):
        assert relative(left, right) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("divergence", ACROSS_NAMES)
def test_no_row_gives_a_zero_loss_with_a_graph(divergence):
    case = Case((2, 2), chunks=0)
    case.hidden, case.labels = case.hidden[:0], case.labels[:0]
    empty = torch.zeros(0, dtype=torch.long)
    case.alignment = Alignment(*[empty] * 5)
    case.teacher = HiddenTargets(case.teacher.hidden[:0], case.teacher.head)
    sums, gradients = case.run(LossConfig(divergence=divergence, alpha=0.5))
    assert sums.total == 0
    assert all(bool((gradient == 0).all()) for gradient in gradients)


# ---------------------------------------------------------------------- 数学


def test_alm_is_zero_where_the_likelihoods_agree_and_only_there():
    log_p = -torch.logspace(-7, 3, 40, dtype=torch.float64)
    assert alm(log_p, log_p, 100.0).abs().max() < 1e-12
    assert (alm(log_p, 0.9 * log_p - 1e-3, 100.0) > 0).all()
    assert torch.isfinite(alm(torch.zeros(1), -torch.ones(1), 100.0)).all()


def test_alm_without_softening_is_the_divergence_of_two_outcomes():
    p, q = torch.tensor(0.3), torch.tensor(0.7)
    two = [torch.stack([x, 1 - x]) for x in (p, q)]
    expected = (two[0] * (two[0].log() - two[1].log())).sum()
    torch.testing.assert_close(alm(p.log(), q.log(), 1.0), expected, rtol=1e-4, atol=1e-6)


def test_alm_softened_without_end_compares_negative_log_likelihoods():
    a, b = torch.tensor(2.0, dtype=torch.float64), torch.tensor(5.0, dtype=torch.float64)
    limit = a * (a / b).log() + b - a
    torch.testing.assert_close(alm(-a, -b, 1e6), limit, rtol=1e-4, atol=0)
    b.requires_grad_()
    alm(-a, -b, 1e6).backward()
    assert b.grad.item() == pytest.approx(1 - 2 / 5, rel=1e-3)  # 与交叉熵的导数 1 同样大小


def test_log1mexp_is_accurate_at_both_ends():
    x = torch.tensor([-1e-12, -1e-3, -math.log(2), -30.0, -800.0], dtype=torch.float64)
    expected = [math.log(-math.expm1(v)) if v > -1 else math.log1p(-math.exp(v)) for v in x]
    torch.testing.assert_close(log1mexp(x), torch.tensor(expected, dtype=torch.float64))


def test_projection_onto_the_same_vocabulary_is_the_forward_kl():
    torch.manual_seed(0)
    log_p, log_q = torch.randn(2, 5, 12).log_softmax(-1)
    same = SharedTokens((), (), 1.0, tuple(range(12)))
    torch.testing.assert_close(projected_kl(log_p, log_q, same), forward_kl(log_p, log_q))


def test_projection_moves_probability_to_the_first_piece():
    log_p = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    log_q = torch.tensor([0.5, 0.5]).log()
    shared = SharedTokens((), (), 1.0, (0, 0, 1, -1))  # 最后一个没有去处
    p = torch.tensor([0.7, 0.2]) / 0.9
    expected = (p * (p.log() - log_q)).sum()
    torch.testing.assert_close(projected_kl(log_p, log_q, shared), expected)


def trl_loss(hybrid):
    gold_trainer = pytest.importorskip("trl.experimental.gold.gold_trainer")
    config = SimpleNamespace(
        uld_crossentropy_weight=0.0, uld_distillation_weight=1.0, uld_student_temperature=1.0,
        uld_teacher_temperature=1.0, uld_skip_student_eos=False, uld_skip_teacher_eos=False,
        use_extended_uld=True, uld_token_merge_strategy="observed", uld_use_hybrid_loss=hybrid,
        uld_hybrid_matched_weight=None, uld_hybrid_unmatched_weight=None, beta=0.0,
    )  # fmt: skip
    tokens = {
        "student": {f"s{i}": i for i in range(OURS)}
        | {f"both{k}": i for k, i in enumerate(SHARED.student)},
        "teacher": {f"t{i}": i for i in range(THEIRS)}
        | {f"both{k}": i for k, i in enumerate(SHARED.teacher)},
    }
    for side, ids in (("student", SHARED.student), ("teacher", SHARED.teacher)):
        for i in ids:
            del tokens[side][f"{side[0]}{i}"]
    ours, theirs = (
        SimpleNamespace(get_vocab=lambda side=side: tokens[side]) for side in ("student", "teacher")
    )
    return gold_trainer.ULDLoss(config, ours, theirs)


@pytest.mark.parametrize("hybrid", [False, True], ids=["uld", "gold"])
def test_first_tokens_agree_with_trl_where_tokens_are_one_to_one(hybrid):
    loss, rows = trl_loss(hybrid), 7
    torch.manual_seed(0)
    ours, theirs = 2 * torch.randn(rows, OURS), 2 * torch.randn(rows, THEIRS)
    offsets = torch.tensor([[i, i + 1] for i in range(rows)])[None]
    labels = torch.arange(rows)[None]
    inputs = [ours.clone().requires_grad_() for _ in range(2)]
    expected = loss(inputs[0][None], theirs[None], labels, labels, labels, labels, offsets, offsets)
    expected.backward()
    p, q = theirs.softmax(-1), inputs[1].softmax(-1)
    found = (gold(p, q, SHARED) if hybrid else uld(p, q)).sum() / rows
    found.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
