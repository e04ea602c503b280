"""Triton 的解释器里的 kernel：``test_kernels.py`` 在另一个进程里、以 ``TRITON_INTERPRET=1`` 跑这些测试。

``triton.language`` 自己的函数也要在导入时就知道，所以不能与别的测试同在一个进程。
"""

import logging
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from objectives import DIVERGENCES, relative
from test_aligned import Case as TwoTokenizers
from test_fused import Case, half_products  # noqa: F401  (fixture)

from distillab.config.schema import LossConfig
from distillab.loss import aligned, buffers, chunking, fused, kernels
from distillab.loss.losses import LossSums, distillation_loss
from distillab.loss.products import FP16_GRADIENT_SCALE, MixedProducts
from distillab.loss.rows import RowSpec
from distillab.targets import DenseTargets, HiddenTargets
from distillab.vocabulary import Vocabulary

VOCAB, STRIDE = 201, 256
"""一整块与不足一块的各一段；行距补齐到 64 列。"""

EXCLUDED = torch.tensor([0, 7, 150, 200])


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 128)


class Rows:
    """``gaps`` 的每一项一行：两个模型的 logits 相差这么多，``None`` 是互不相干。"""

    def __init__(self, loss, gaps=(None,), seed=0, labels=True, excluded=None, far=1.0, **finish):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        self.count = len(gaps)
        self.teacher = 4 * far * draw(self.count, VOCAB)
        self.student = torch.stack(
            [
                4 * far * draw(VOCAB) if gap is None else teacher + gap * draw(VOCAB)
                for gap, teacher in zip(gaps, self.teacher, strict=True)
            ]
        )
        self.labels = torch.tensor([199, 8, 3])[: self.count] if labels else None
        self.biases = [0.3 * draw(VOCAB) if finish else None for _ in range(2)]
        self.loss, self.excluded, self.finish = loss, excluded, finish
        if excluded is not None:
            self.teacher[:, excluded] = self.student[:, excluded] = -torch.inf

    def spec(self):
        absent = 0 if self.excluded is None else len(self.excluded)
        return RowSpec.of(self.loss, VOCAB)._replace(excluded=absent, **self.finish)

    def found(self, dtype=torch.float32, factor=1.0, gradient=True):
        """``(RowValues [5, R], 对矩阵乘结果的梯度 [R, V])``；行尾补齐的列是 NaN。"""

        def padded(values, dtype=torch.float32):
            buffer = torch.full((self.count, STRIDE), torch.nan, dtype=dtype)
            buffer[:, :VOCAB] = values
            return buffer[:, :VOCAB]

        d_logits = padded(torch.nan, dtype) if gradient else None
        student = padded(self.student)
        teacher = padded(self.teacher) if self.loss.alpha > 0 else None
        before = student.clone()
        values = kernels.kernel_rows(
            student, teacher, d_logits, self.labels, *self.biases, self.spec(), factor
        )
        torch.testing.assert_close(student, before, rtol=0, atol=0, equal_nan=True)
        if d_logits is not None:
            rest = d_logits.as_strided((self.count, STRIDE - VOCAB), d_logits.stride(), VOCAB)
            assert not rest.any()
        return values.double(), d_logits

    def exact(self):
        """同样的两样，来自 float64 的 ``losses.py``，一行一行地算。"""
        spec, values, gradients = self.spec(), [], []
        for row in range(self.count):
            product = self.student[row : row + 1].double().requires_grad_()
            logits = finished(product, self.biases[0], spec.scale, spec.softcap)
            teacher = finished(
                self.teacher[row : row + 1].double(), self.biases[1], spec.teacher_scale,
                spec.teacher_softcap,
            )  # fmt: skip
            labels = None if self.labels is None else self.labels[row : row + 1]
            sums = distillation_loss(
                logits, DenseTargets(teacher), labels, self.loss, excluded=self.excluded
            )
            sums.total.backward()
            values.append(torch.stack(sums[1:]).detach())
            gradients.append(product.grad[0])
        return torch.stack(values, 1), torch.stack(gradients)


def finished(product, bias, scale, softcap):
    logits = (product if bias is None else product + bias.double()) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def compare(rows, tolerances):
    """逐行：值相差不到 1e-6，梯度不到 ``tolerances``。"""
    (values, gradients), (expected, exact) = rows.found(), rows.exact()
    for name, left, right in zip(LossSums._fields[1:], values, expected, strict=True):
        # 1e-6 的差别，散度约 1e-12：float64 的参考自己也只剩三四位
        torch.testing.assert_close(
            left, right, rtol=1e-6, atol=2e-15, msg=lambda m, name=name: f"{name}: {m}"
        )
    for left, right, tolerance in zip(gradients, exact, tolerances, strict=True):
        assert relative(left, right) < tolerance


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_alone_is_exact_however_close_the_models(name):
    """相差 1e-3 时，归一化项之差由相减得出；1e-6 时不是，相对误差反而更小。"""
    loss = LossConfig(divergence=name, alpha=1.0, temperature=1.0, **DIVERGENCES[name])
    compare(Rows(loss, (None, 1e-3, 1e-6), labels=False), (1e-5, 1e-3, 5e-6))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_labels_and_temperature(name):
    loss = LossConfig(
        divergence=name, alpha=0.5, temperature=2.0, label_smoothing=0.1, **DIVERGENCES[name]
    )
    compare(Rows(loss, (None, 1e-3), seed=1), (1e-6, 1e-6))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_bias_scale_softcap_and_columns_without_probability(name):
    loss = LossConfig(
        divergence=name, alpha=0.6, temperature=1.0, label_smoothing=0.1, **DIVERGENCES[name]
    )
    compare(
        Rows(loss, seed=2, excluded=EXCLUDED, scale=0.9, softcap=30.0, teacher_scale=1.1,
             teacher_softcap=20.0),
        (1e-5,),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_distributions_far_apart(name):
    """T = 0.5，logits 的标准差 40，学生的又整个高出 300：最大值各算各的，指数不溢出。"""
    loss = LossConfig(divergence=name, alpha=1.0, temperature=0.5, **DIVERGENCES[name])
    rows = Rows(loss, seed=3, labels=False, far=10.0)
    rows.student += 300
    (values, gradients), (expected, exact) = rows.found(), rows.exact()
    torch.testing.assert_close(values[0, 0], expected[0, 0], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients, exact.float(), rtol=1e-5, atol=1e-7)


def shuffle(rows, seed):
    """一行一个样：尖的、平的、相近的、错开了一个常数的。"""
    generator = torch.Generator().manual_seed(seed)
    uniform = lambda low, high: low + (high - low) * torch.rand((), generator=generator)  # noqa: E731
    rows.labels = torch.randint(VOCAB, (rows.count,), generator=generator)
    for student, teacher in zip(rows.student, rows.teacher, strict=True):
        teacher.normal_(generator=generator).mul_(10 ** uniform(-2, 1.5))
        student.normal_(generator=generator).mul_(10 ** uniform(-2, 1.5))
        if uniform(0, 1) < 0.4:
            student.mul_(10 ** uniform(-6, 0) / student.std()).add_(teacher)
        if uniform(0, 1) < 0.3:
            token = torch.randint(VOCAB, (), generator=generator)
            student[token] += uniform(0, 40)
            teacher[token] += uniform(0, 40)
        elif uniform(0, 1) < 0.5:
            (student if uniform(0, 1) < 0.5 else teacher)[8] += uniform(0, 40)
        if uniform(0, 1) < 0.3:
            student += uniform(-50, 50)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_random_rows_keep_their_digits(name):
    """float32 的一行，六位；教师与标签的几乎确定、两个模型的几乎一致，都不由 1 减出来。"""
    for seed, (alpha, temperature) in enumerate([(1.0, 1.0), (0.3, 1.0), (0.3, 2.0), (1.0, 5.0)]):
        loss = LossConfig(
            divergence=name, alpha=alpha, temperature=temperature,
            label_smoothing=0.1 * (temperature == 2), **DIVERGENCES[name],
        )  # fmt: skip
        rows = Rows(loss, 8 * (None,))
        shuffle(rows, seed)
        if alpha == 1:
            rows.labels = None
        (values, gradients), (expected, exact) = rows.found(), rows.exact()
        torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-8)
        for left, right in zip(gradients, exact, strict=True):
            assert (left - right).norm() < 1e-4 * right.norm() + 5e-8


@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "skew_reverse_kl"])
@pytest.mark.parametrize("sharp", ["student", "teacher"])
def test_a_sharp_and_a_flat_distribution(sharp, name, monkeypatch):
    """两个归一化项相差两万倍，学生几乎只给一个 token：梯度是 h 与它的平均之差，两个约 10 的数。"""
    monkeypatch.setattr(kernels, "BLOCK", 1024)
    monkeypatch.setitem(globals(), "VOCAB", 20_001)
    monkeypatch.setitem(globals(), "STRIDE", 20_032)
    loss = LossConfig(divergence=name, alpha=1.0, temperature=1.0, **DIVERGENCES[name])
    rows = Rows(loss, seed=4, labels=False)
    flat = "teacher" if sharp == "student" else "student"
    getattr(rows, flat).mul_(1e-3)
    getattr(rows, sharp)[:, 77] += 18
    compare(rows, (1e-5,))


@pytest.mark.parametrize("name", ["jsd", "skew_reverse_kl"])
def test_models_a_constant_apart(name):
    """两个模型相近，学生的 logits 却整个高出 47.3：舍入只有 logits 自己的。"""
    loss = LossConfig(divergence=name, alpha=1.0, temperature=0.5, **DIVERGENCES[name])
    rows = Rows(loss, (0.02, 0.02), seed=5, labels=False, far=3.0)
    rows.student += 47.3
    found, (_, exact) = rows.found()[1], rows.exact()
    for left, right in zip(found, exact, strict=True):
        assert relative(left, right) < 2e-6


def test_a_label_that_is_almost_certain():
    """CE 与它的梯度都是 ``1 - q``，约 1e-6，不由 1 减出来。"""
    rows = Rows(LossConfig(alpha=0.0))
    rows.student[0, 199] = rows.student.max() + 14
    compare(rows, (1e-6,))


def test_no_teacher_and_label_metrics():
    compare(Rows(LossConfig(alpha=0.0, label_smoothing=0.1)), (1e-6,))
    rows = Rows(LossConfig(divergence="jsd", alpha=1.0, temperature=2.0))
    values, gradients = rows.found()
    teacher = DenseTargets(rows.teacher.double())
    both = distillation_loss(rows.student.double(), teacher, rows.labels, LossConfig(alpha=0.5))
    assert values[1].sum().item() == pytest.approx(both.cross_entropy.item(), rel=1e-6)
    assert values[2].sum().item() == pytest.approx(both.teacher_cross_entropy.item(), rel=1e-6)
    rows.labels = None
    torch.testing.assert_close(rows.found()[1], gradients, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_values_without_gradient_are_the_same(name):
    loss = LossConfig(divergence=name, alpha=0.5, temperature=2.0, **DIVERGENCES[name])
    rows = Rows(loss)
    torch.testing.assert_close(rows.found(gradient=False)[0], rows.found()[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_gradients_are_rounded_once_into_half_precision(dtype):
    """fp16 先放大：小于 6e-8 的梯度也留得下来。解释器转成 bf16 时截断，GPU 上是舍入。"""
    rows = Rows(LossConfig(alpha=1.0, temperature=1.0), (None, 1e-3), labels=False)
    factor = FP16_GRADIENT_SCALE if dtype == torch.float16 else 1.0
    _, whole = rows.found()
    _, half = rows.found(dtype, factor)
    truncated = 2**-7 if dtype == torch.bfloat16 else 0
    torch.testing.assert_close(half, (whole * factor).to(dtype), rtol=truncated, atol=0)
    for left, right in zip(half, rows.exact()[1], strict=True):
        assert relative(left.double() / factor, right) < 0.01


def test_logits_that_are_not_finite_make_the_loss_so():
    rows = Rows(LossConfig(alpha=0.5), (None, None))
    rows.student[1, 5] = torch.nan
    values, gradients = rows.found()
    assert values[0].isfinite().tolist() == [True, False]
    assert gradients.isfinite().all(1).tolist() == [True, False]


# ---------------------------------------------------------------- 整条路：乘法、分块、分组


@pytest.fixture
def mixed(half_products, monkeypatch):  # noqa: F811
    """CPU 上的半精度乘法，走 kernel；2 行一块，4 行一组。"""
    monkeypatch.setattr(buffers.KERNELS, "failed", False)

    def use(dtype):
        monkeypatch.setattr(fused, "head_products", lambda *_: nullcontext(MixedProducts(dtype)))
        return 2 * 512 * (8 + chunking.GROUP * 2)

    yield use
    assert not buffers.KERNELS.failed


def rounded(case, dtype):
    for name in ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight"):
        setattr(case, name, getattr(case, name).to(dtype).float())
    return case


@pytest.mark.parametrize(
    ("dtype", "name", "alpha"),
    [(torch.bfloat16, "forward_kl", 0.5), (torch.float16, "jsd", 1.0)],
    ids=["bf16", "fp16"],
)
def test_the_whole_loss_in_chunks_and_groups(dtype, name, alpha, mixed, monkeypatch):
    budget = mixed(dtype)
    loss = LossConfig(divergence=name, alpha=alpha, temperature=2.0, **DIVERGENCES[name])
    case = rounded(Case(rows=5, near=True), dtype)
    groups = []
    original = MixedProducts.add_d_weight
    monkeypatch.setattr(
        MixedProducts,
        "add_d_weight",
        lambda self, total, d_logits, rows: (
            groups.append(len(rows)) or original(self, total, d_logits, rows)
        ),
    )
    found, gradients = case.run(loss, dtype=dtype, memory_budget=budget)
    assert groups == [4, 1]
    expected, exact = case.oracle(loss)
    for left, right in zip(found, expected, strict=True):
        assert left.item() == pytest.approx(right.item(), rel=1e-5)
    for gradient, right in zip(gradients, exact, strict=True):
        assert relative(gradient, right) < 0.01


def test_a_vocabulary_that_is_cut_leaves_no_gradient_outside(mixed):
    budget, case = mixed(torch.bfloat16), rounded(Case(rows=3), torch.bfloat16)
    vocabulary = Vocabulary(401, (0, 7, 250))
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        if dtype == torch.float32:
            fused.head_products = original_products
        weight = case.weight.clone().requires_grad_()
        head = case.targets("hidden")[0].head.cut(vocabulary)
        sums = fused.fused_distillation_loss(
            case.hidden.to(dtype), weight, 1 + case.labels % 6,
            HiddenTargets(case.teacher_hidden, head), LossConfig(), vocab_limit=401,
            excluded=vocabulary.excluded(weight.device), memory_budget=budget,
        )  # fmt: skip
        sums.total.backward()
        results.append((sums.total.detach(), weight.grad))
    (total, gradient), (expected, exact) = results
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    assert relative(gradient, exact.double()) < 0.01
    assert not gradient[[0, 7, 250, *range(401, 500)]].any()


original_products = fused.head_products


def test_no_rows_and_no_gradient(mixed, caplog):
    mixed(torch.bfloat16)
    _, gradients = Case(rows=0).run(LossConfig(), dtype=torch.bfloat16)
    assert not any(gradient.any() for gradient in gradients)
    case = rounded(Case(rows=2), torch.bfloat16)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        sums = fused.fused_distillation_loss(
            case.hidden.bfloat16(), case.weight, case.labels, case.targets("hidden")[0],
            LossConfig(),
        )  # fmt: skip
    assert sums.total.isfinite()
    assert not caplog.records


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("divergence", ["alm", "uld"])
def test_the_loss_of_two_tokenizers(divergence, dtype, mixed, monkeypatch):
    budget = mixed(dtype)
    monkeypatch.setattr(aligned, "head_products", fused.head_products)
    monkeypatch.setattr(kernels, "BLOCK", 64)  # 两个词表都是一整块与不足一块的各一段
    case = TwoTokenizers(rows=(9, 8), chunks=5)
    for name in ("hidden", "weight", "bias"):
        setattr(case, name, getattr(case, name).to(dtype).float())
    hidden, head = case.teacher.hidden.to(dtype).float(), case.teacher.head
    head = replace(head, weight=head.weight.to(dtype).float())
    case.teacher = HiddenTargets(hidden, head)
    loss = LossConfig(divergence=divergence, alpha=0.5)
    found, gradients = case.run(loss, dtype, memory_budget=budget)
    expected, exact = case.oracle(loss)
    assert found.total.item() == pytest.approx(expected.total.item(), rel=1e-4)
    for gradient, right in zip(gradients, exact, strict=True):
        assert relative(gradient, right) < 0.01
