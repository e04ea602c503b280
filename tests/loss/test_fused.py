"""分块的损失：对照 float64 的 ``losses.py``，以及它自己的承诺（内存、切分、拒绝什么）。"""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objectives import DIVERGENCES, LOSSES, relative

from distillab.config.schema import LossConfig
from distillab.loss import buffers, fused
from distillab.loss.buffers import COMPILER, Chunks, default_budget
from distillab.loss.fused import fused_distillation_loss
from distillab.loss.losses import LossSums, distillation_loss
from distillab.loss.products import HeadProducts
from distillab.targets import DenseTargets, Head, HiddenTargets, SparseTargets
from distillab.vocabulary import Vocabulary

VOCAB = 500


def short(loss):
    return f"{loss.divergence} a={loss.alpha:g} T={loss.temperature:g}"


class Case:
    """学生宽 16、教师宽 24，词表 500；两个 head 各有 bias、scale、softcap。"""

    def __init__(self, rows=150, near=False, seed=0):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        self.hidden, self.weight = draw(rows, 16), draw(VOCAB, 16)
        self.bias = 0.3 * draw(VOCAB)
        self.teacher_hidden, self.teacher_weight = draw(rows, 24), 0.8 * draw(VOCAB, 24)
        self.head = {"scale": 0.9, "softcap": 30.0}
        self.teacher_head = {"softcap": 20.0}
        if near:  # logits 相差约 0.2
            self.teacher_hidden = torch.cat([self.hidden, 0.07 * self.teacher_hidden[:, 16:]], 1)
            self.teacher_weight = torch.cat([self.weight, draw(VOCAB, 8)], 1)
            self.teacher_head = self.head
        self.labels = torch.randint(VOCAB, (rows,), generator=generator)
        self.near, self.generator = near, generator

    def logits(self):
        logits = self.teacher_hidden.double() @ self.teacher_weight.double().T
        if self.near:
            logits = (logits + self.bias.double()) * self.head["scale"]
        capped = self.teacher_head["softcap"]
        return capped * torch.tanh(logits / capped)

    def near_bias(self):
        return self.bias if self.near else None

    def targets(self, kind):
        if kind == "hidden":
            head = Head(self.teacher_weight, self.near_bias(), **self.teacher_head)
            return HiddenTargets(self.teacher_hidden, head), DenseTargets(self.logits())
        p = self.logits().softmax(-1)
        if kind == "sampled":
            ids = torch.multinomial(p, 12, replacement=True, generator=self.generator)
            probs, entropy = torch.full(ids.shape, 1 / 12), -(p * p.log()).sum(-1).float()
            targets = SparseTargets(ids, probs, kind, entropy)
        else:
            probs, ids = p.float().topk(12)
            if kind == "renormalise":
                probs[::3, -4:] = 0  # 填充
            targets = SparseTargets(ids, probs, kind)
        return targets, targets

    def run(self, loss, kind="hidden", rows=slice(None), dtype=torch.float32, **options):
        """``(LossSums, [d hidden, d weight, d bias])``。"""
        targets, _ = self.targets(kind)
        if isinstance(targets, HiddenTargets):
            targets = HiddenTargets(targets.hidden[rows].to(dtype), targets.head)
        inputs = [
            x.to(dtype, copy=True).requires_grad_() for x in (self.hidden, self.weight, self.bias)
        ]
        sums = fused_distillation_loss(
            inputs[0][rows], inputs[1], self.labels[rows], targets, loss,
            bias=inputs[2], **self.head, **options,
        )  # fmt: skip
        (2.5 * sums.total).backward()
        return sums, [x.grad for x in inputs]

    def oracle(self, loss, kind="hidden"):
        _, targets = self.targets(kind)
        inputs = [x.double().requires_grad_() for x in (self.hidden, self.weight, self.bias)]
        capped = self.head["softcap"]
        product = (inputs[0] @ inputs[1].T + inputs[2]) * self.head["scale"]
        logits = capped * torch.tanh(product / capped)
        sums = distillation_loss(logits, targets, self.labels, loss)
        (2.5 * sums.total).backward()
        return sums, [x.grad for x in inputs]


def cases():
    for loss, kind in itertools.product(LOSSES, ["hidden", "renormalise", "bucket", "sampled"]):
        if kind == "renormalise" and loss.divergence == "reverse_kl" and loss.alpha > 0:
            continue
        if kind in ("bucket", "sampled") and loss.temperature != 1 and loss.alpha > 0:
            continue
        if kind == "sampled" and loss.divergence != "forward_kl" and loss.alpha > 0:
            continue
        if loss.alpha == 0 and (kind != "hidden" or loss.divergence != "forward_kl"):
            continue
        yield pytest.param(loss, kind, id=f"{short(loss)} {kind}")


@pytest.mark.parametrize("near", [False, True], ids=["random rows", "rows that nearly agree"])
@pytest.mark.parametrize(("loss", "kind"), list(cases()))
def test_value_and_gradients_equal_the_float64_oracle(loss, kind, near):
    case = Case(near=near, seed=1)
    if kind == "sampled":  # 两边用同一份样本
        sample = case.targets(kind)
        case.targets = lambda _: sample
    found, gradients = case.run(loss, kind)
    expected, exact = case.oracle(loss, kind)
    for name, left, right in zip(LossSums._fields, found, expected, strict=True):
        if (
            name in ("total", "divergence") and kind == "sampled"
        ):  # 与熵几乎相等，相减之后的相对误差无意义
            size = expected.teacher_entropy.item() + abs(right.item())
            assert abs(left.item() - right.item()) < 1e-6 * size, name
        else:
            assert left.item() == pytest.approx(right.item(), rel=1e-6, nan_ok=True), name
    for left, right in zip(gradients, exact, strict=True):
        assert relative(left, right) < 1e-5


@pytest.mark.parametrize("kind", ["hidden", "renormalise"])
def test_label_smoothing_equals_the_oracle(kind):
    case, loss = Case(), LossConfig(alpha=0.4, temperature=2.0, label_smoothing=0.2)
    found, gradients = case.run(loss, kind)
    expected, exact = case.oracle(loss, kind)
    assert found.total.item() == pytest.approx(expected.total.item(), rel=1e-6)
    for left, right in zip(gradients, exact, strict=True):
        assert relative(left, right) < 1e-5


@pytest.mark.parametrize("near", [False, True], ids=["random rows", "rows that nearly agree"])
@pytest.mark.parametrize("loss", [x for x in LOSSES if x.temperature in (1, 5)], ids=short)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_inputs_give_gradients_within_one_percent(loss, near, dtype):
    case = Case(near=near)
    for name in ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight"):
        setattr(case, name, getattr(case, name).to(dtype).float())  # 输入相同，只比较算术
    _, gradients = case.run(loss, dtype=dtype)
    _, exact = case.oracle(loss)
    for gradient, right in zip(gradients, exact, strict=True):
        assert gradient.dtype == dtype
        assert relative(gradient, right) < 0.01


def test_autocast_rounds_the_inputs_and_keeps_float32_gradients():
    case, loss = Case(near=True), LossConfig(alpha=1.0, temperature=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        _, gradients = case.run(loss)
    _, exact = case.oracle(loss)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    assert relative(gradients[1], exact[1]) < 0.05


def test_gradcheck_in_float64():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).double()  # noqa: E731
    hidden, weight, bias = draw(3, 4).requires_grad_(), draw(7, 4), draw(7)
    weight.requires_grad_()
    bias.requires_grad_()
    targets = HiddenTargets(draw(3, 5), Head(draw(7, 5), softcap=3.0))
    labels = torch.tensor([0, 3, 6])
    for name, parameters in DIVERGENCES.items():
        loss = LossConfig(divergence=name, alpha=0.6, label_smoothing=0.1, **parameters)

        def value(hidden, weight, bias, loss=loss):
            return fused_distillation_loss(
                hidden, weight, labels, targets, loss, bias=bias, scale=1.5, softcap=4.0
            ).total

        class Fresh(torch.autograd.Function):
            """gradcheck 对同一次前向多次求导，而融合的损失一次前向只给一次反向：每次重算。"""

            @staticmethod
            def forward(ctx, *inputs):
                ctx.save_for_backward(*inputs)
                return value(*inputs)

            @staticmethod
            def backward(ctx, upstream):
                with torch.enable_grad():
                    inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
                    return torch.autograd.grad(value(*inputs), inputs, upstream)

        assert torch.autograd.gradcheck(Fresh.apply, (hidden, weight, bias))


# ---------------------------------------------------------------- 性质


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(DIVERGENCES)),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 5.0]),
    spread=st.floats(0.01, 20),
    constant=st.floats(-20, 20),
    seed=st.integers(0, 2**31),
)
def test_divergences_are_not_negative_zero_at_a_match_and_blind_to_a_constant(
    name, temperature, spread, constant, seed
):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(5, 8, generator=generator)
    weight, other = spread * torch.randn(2, 40, 8, generator=generator)
    loss = LossConfig(divergence=name, alpha=1.0, temperature=temperature, **DIVERGENCES[name])

    def divergence(teacher, bias=None):
        targets = HiddenTargets(hidden, Head(teacher))
        return fused_distillation_loss(hidden, weight, None, targets, loss, bias=bias).divergence

    value = divergence(other)
    # 每行的舍入与 logits 的大小成比例
    rounding = 5e-6 * (1 + spread / temperature)
    assert value > -rounding
    assert divergence(weight).abs() < 1e-6
    moved = divergence(other, torch.full((40,), constant))
    torch.testing.assert_close(moved, value, rtol=1e-4, atol=rounding * (1 + abs(constant)))


@settings(max_examples=30, deadline=None)
@given(
    loss=st.sampled_from(LOSSES),
    kind=st.sampled_from(["hidden", "renormalise"]),
    rows_per_chunk=st.integers(1, 60),
    cut=st.integers(0, 50),
    seed=st.integers(0, 100),
)
def test_chunk_size_row_order_and_splitting_change_nothing(loss, kind, rows_per_chunk, cut, seed):
    if kind == "renormalise" and loss.divergence == "reverse_kl":
        kind = "hidden"
    case = Case(rows=50, seed=seed)
    targets, _ = case.targets(kind)

    def run(rows, budget=None):
        inputs = [x.clone().requires_grad_() for x in (case.hidden, case.weight)]
        if kind == "hidden":
            given = HiddenTargets(targets.hidden[rows], targets.head)
        else:
            given = SparseTargets(targets.ids[rows], targets.probs[rows], kind)
        sums = fused_distillation_loss(
            inputs[0][rows], inputs[1], case.labels[rows], given, loss, memory_budget=budget
        )
        sums.total.backward()
        return [*sums, *(x.grad for x in inputs)]

    def same(left, right):
        for a, b in zip(left, right, strict=True):
            scale = b.abs().max().item() if b.isfinite().all() else 0.0
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * scale, equal_nan=True)

    whole = run(torch.arange(50))
    same(run(torch.arange(50), budget=rows_per_chunk * 8 * VOCAB), whole)
    same(run(torch.randperm(50, generator=case.generator)), whole)
    parts = run(torch.arange(cut)), run(torch.arange(cut, 50))
    same([a + b for a, b in zip(*parts, strict=True)], whole)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("kind", ["renormalise", "bucket", "sampled"])
def test_label_log_prob_and_top_complete_the_metrics_and_change_no_gradient(kind, alpha):
    case, loss = Case(seed=1), LossConfig(alpha=alpha, temperature=1.0)
    options = {"label_metrics": True, "memory_budget": 4 * VOCAB * 7}
    bare, _ = case.targets(kind)
    log_p, everywhere = case.logits().log_softmax(-1), torch.arange(150)
    full = replace(bare, label_log_prob=log_p[everywhere, case.labels], top=log_p.argmax(-1))
    dense, _ = case.run(loss, **options)

    def run(targets):
        case.targets = lambda _: (targets, targets)
        return case.run(loss, kind, **options)

    (without, unchanged), (found, gradients) = run(bare), run(full)
    torch.testing.assert_close(found.teacher_cross_entropy, dense.teacher_cross_entropy)
    assert found.top1_agreement == dense.top1_agreement
    assert without.teacher_cross_entropy.isnan()
    assert found[:3] == without[:3]
    assert found.teacher_entropy == without.teacher_entropy
    for left, right in zip(gradients, unchanged, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    logits = case.hidden @ case.weight.T + case.bias  # softcap 之前，次序相同
    assert run(replace(full, top=logits.argmax(-1)))[0].top1_agreement == 150
    assert run(replace(full, top=logits.argmin(-1)))[0].top1_agreement == 0


# ---------------------------------------------------------------- 各种情形


def test_no_response_token_gives_zero_loss_with_a_graph():
    case = Case(rows=0)
    sums, (d_hidden, d_weight, d_bias) = case.run(LossConfig())
    assert [value.item() for value in sums] == [0.0] * 6
    assert d_hidden.shape == (0, 16)
    assert not d_weight.any()
    assert not d_bias.any()


@pytest.mark.parametrize("needed", ["hidden", "weight"])
def test_only_the_gradients_that_are_needed_are_computed(needed, monkeypatch):
    case, loss = Case(), LossConfig()
    _, full = case.run(loss)
    targets, _ = case.targets("hidden")
    calls = []
    for name in ("d_rows", "add_d_weight"):
        original = getattr(HeadProducts, name)
        monkeypatch.setattr(
            HeadProducts,
            name,
            lambda *a, name=name, original=original: calls.append(name) or original(*a),
        )
    inputs = {"hidden": case.hidden, "weight": case.weight.clone()}
    inputs[needed].requires_grad_()
    sums = fused_distillation_loss(
        *inputs.values(), case.labels, targets, loss, bias=case.bias, **case.head
    )
    (2.5 * sums.total).backward()
    assert set(calls) == {"hidden": {"d_rows"}, "weight": {"add_d_weight"}}[needed]
    assert relative(inputs[needed].grad, full[["hidden", "weight"].index(needed)]) < 1e-6


def test_tied_weight_gets_the_gradients_of_both_uses():
    case, loss = Case(), LossConfig()
    tokens = case.labels
    results = []
    for function in ("fused", "dense"):
        weight = case.weight.clone().requires_grad_()
        hidden = torch.nn.functional.embedding(tokens, weight).tanh()
        if function == "fused":
            total = fused_distillation_loss(
                hidden, weight, tokens, case.targets("hidden")[0], loss
            ).total
        else:
            logits = hidden @ weight.T
            total = distillation_loss(logits, case.targets("hidden")[1], tokens, loss).total
        total.backward()
        results.append(weight.grad)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_vocab_limit_leaves_the_padding_rows_without_probability_and_gradient():
    case, loss = Case(), LossConfig()
    labels = case.labels % 400
    head = Head(case.teacher_weight)
    results = []
    for limit, weight, teacher in (
        (400, case.weight, head),
        (None, case.weight[:400], head.cut(Vocabulary(400))),
    ):
        weight = weight.clone().requires_grad_()
        targets = HiddenTargets(case.teacher_hidden, teacher)
        sums = fused_distillation_loss(
            case.hidden, weight, labels, targets, loss, vocab_limit=limit
        )
        sums.total.backward()
        results.append((sums.total.detach(), weight.grad))
    (limited, gradient), (cut, expected) = results
    torch.testing.assert_close(limited, cut)
    torch.testing.assert_close(gradient[:400], expected)
    assert not gradient[400:].any()


EXCLUDED = torch.tensor([0, 7, 8, 250, 498])
SHARED = torch.tensor([index for index in range(VOCAB) if index not in EXCLUDED.tolist()])


def gap_cases():
    """每种 divergence 与每种目标都有，但不是全部组合：一列列地遮掉与 alpha、T 无关。"""
    for name, parameters in DIVERGENCES.items():
        yield LossConfig(divergence=name, alpha=0.6, temperature=2.0, **parameters), "hidden"
        yield LossConfig(divergence=name, alpha=1.0, temperature=1.0, **parameters), "bucket"
        if name != "reverse_kl":
            yield (
                LossConfig(divergence=name, alpha=0.6, temperature=2.0, **parameters),
                "renormalise",
            )
    yield LossConfig(alpha=0.6, temperature=1.0), "sampled"
    yield LossConfig(alpha=0.0), "hidden"
    yield LossConfig(alpha=0.6, temperature=2.0, label_smoothing=0.2), "hidden"
    yield LossConfig(alpha=0.6, temperature=2.0, label_smoothing=0.2), "renormalise"


@pytest.mark.parametrize(
    ("loss", "kind"),
    [pytest.param(*case, id=f"{short(case[0])} {case[1]}") for case in gap_cases()],
)
def test_excluded_ids_are_as_if_their_rows_were_not_there(loss, kind):
    """参考只用剩下的行，float64；``losses.py`` 的 ``excluded`` 与它、分块的与它都相同。"""
    case = Case(near=True, seed=3)
    labels = SHARED[case.labels % len(SHARED)]
    place = torch.full((VOCAB,), -1).index_copy(0, SHARED, torch.arange(len(SHARED)))
    teacher = case.logits()[:, SHARED]
    fewer = DenseTargets(teacher)  # 教师在剩下的各列上归一化
    if kind == "hidden":
        head = Head(case.teacher_weight, case.near_bias(), **case.teacher_head)
        found_targets = HiddenTargets(case.teacher_hidden, head)
        dense = DenseTargets(case.logits())
    else:
        p = teacher.softmax(-1)
        probs, ids = p.float().topk(12)
        entropy = -(p * p.log()).sum(-1).float() if kind == "sampled" else None
        at_label = p.log().gather(1, place[labels][:, None])[:, 0].float()
        fewer = SparseTargets(ids, probs, kind, entropy, at_label, p.argmax(-1))
        found_targets = dense = replace(fewer, ids=SHARED[ids], top=SHARED[p.argmax(-1)])

    def inputs():
        return [x.double().requires_grad_() for x in (case.hidden, case.weight, case.bias)]

    def logits(hidden, weight, bias):
        capped = case.head["softcap"]
        return capped * torch.tanh((hidden @ weight.T + bias) * case.head["scale"] / capped)

    exact = inputs()
    expected = distillation_loss(logits(*exact)[:, SHARED], fewer, place[labels], loss)
    (2.5 * expected.total).backward()
    whole = inputs()
    reference = distillation_loss(logits(*whole), dense, labels, loss, excluded=EXCLUDED)
    (2.5 * reference.total).backward()
    for left, right in zip((*reference, *[x.grad for x in whole]),
                           (*expected, *[x.grad for x in exact]), strict=True):  # fmt: skip
        torch.testing.assert_close(left, right, equal_nan=True)

    own = [x.clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    sums = fused_distillation_loss(
        own[0], own[1], labels, found_targets, loss,
        bias=own[2], **case.head, vocab_limit=VOCAB, excluded=EXCLUDED,
    )  # fmt: skip
    (2.5 * sums.total).backward()
    for name, left, right in zip(LossSums._fields, sums, expected, strict=True):
        error = 1e-6 * (expected.teacher_entropy.item() if kind == "sampled" else 0)
        assert left.item() == pytest.approx(right.item(), rel=1e-6, abs=error, nan_ok=True), name
    for part, right in zip(own, exact, strict=True):
        assert part.grad.isfinite().all()
        assert relative(part.grad, right.grad) < 1e-5
    assert not own[1].grad[EXCLUDED].any()
    assert not own[2].grad[EXCLUDED].any()


def test_excluded_ids_in_half_precision_compiled_and_with_both_heads_cut(compiling):
    case, loss = Case(rows=21, near=True), LossConfig(divergence="jsd", alpha=0.5, temperature=1.0)
    vocabulary = Vocabulary(400, (0, 7, 250))
    labels = 1 + case.labels % 6
    results = []
    for elements in (0, 2**62):
        buffers.COMPILE_ELEMENTS = elements
        weight = case.weight.clone().requires_grad_()
        head = Head(case.teacher_weight, case.near_bias(), **case.teacher_head).cut(vocabulary)
        with torch.autocast("cpu", torch.bfloat16):
            total = fused_distillation_loss(
                case.hidden, weight, labels, HiddenTargets(case.teacher_hidden, head), loss,
                vocab_limit=400, excluded=vocabulary.excluded(weight.device),
            ).total  # fmt: skip
        total.backward()
        results.append((total.detach(), weight.grad))
    assert not COMPILER.failed
    (compiled, gradient), (eager, expected) = results
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=0)
    assert relative(gradient, expected.double()) < 1e-5
    assert not gradient[[0, 7, 250, *range(400, 500)]].any()


def test_a_teacher_head_that_excludes_other_ids_is_refused():
    case = Case()
    head = Head(case.teacher_weight).cut(Vocabulary(VOCAB, (3, 4)))
    with pytest.raises(ValueError, match="teacher head excludes 2 ids, the student 1"):
        fused_distillation_loss(
            case.hidden, case.weight, case.labels, HiddenTargets(case.teacher_hidden, head),
            LossConfig(), excluded=torch.tensor([3]),
        )  # fmt: skip


def test_mean_is_the_sum_over_the_rows_divided_by_their_number():
    case, loss = Case(), LossConfig()
    total, gradients = case.run(loss)
    mean, divided = case.run(loss, reduction="mean")
    for left, right in zip([*mean, *divided], [*total, *gradients], strict=True):
        torch.testing.assert_close(left * 150, right)


def test_alpha_one_looks_at_no_label_and_alpha_zero_at_no_teacher():
    case = Case()
    targets, _ = case.targets("hidden")
    nothing = torch.full_like(case.labels, -1)  # gather 会越界
    one = LossConfig(alpha=1.0)
    sums = fused_distillation_loss(case.hidden, case.weight, nothing, targets, one)
    alone = fused_distillation_loss(case.hidden, case.weight, None, targets, one)
    assert sums.total == alone.total
    assert sums.cross_entropy == 0
    zero = LossConfig(alpha=0.0)
    broken = HiddenTargets(torch.full_like(targets.hidden, torch.nan), targets.head)
    sums = fused_distillation_loss(case.hidden, case.weight, case.labels, broken, zero)
    assert sums.total.isfinite()
    assert sums.total == sums.cross_entropy


def test_budget_bounds_the_buffers():
    case, loss = Case(rows=400), LossConfig()
    sizes = []
    original = Chunks.__init__

    def record(self, *arguments):
        original(self, *arguments)
        sizes.append(self.student.nbytes + self.teacher.nbytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Chunks, "__init__", record)
        case.run(loss, memory_budget=200_000)
        case.run(loss)
    assert 100_000 < sizes[0] <= 200_000
    assert sizes[0] < sizes[1] <= default_budget(torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "needs labels"),
        ({"targets": None}, "needs teacher targets"),
        ({"vocab_limit": 501}, "vocab_limit is 501, expected 1 to 500"),
        ({"memory_budget": 0}, "memory_budget is 0 bytes"),
        ({"reduction": "none"}, "reduction is 'none'"),
        ({"targets": DenseTargets(torch.zeros(150, 400))}, "400 columns.*is 500"),
        ({"targets": DenseTargets(torch.zeros(10, 500))}, "teacher has 10 rows, the student 150"),
        (
            {"targets": DenseTargets(torch.zeros(150, 500, requires_grad=True))},
            "teacher targets require grad",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_input_is_refused_in_one_line(change, message):
    case = Case()
    arguments = {"labels": case.labels, "targets": case.targets("hidden")[0]} | change
    with pytest.raises(ValueError, match=message):
        fused_distillation_loss(
            case.hidden, case.weight, arguments.pop("labels"), arguments.pop("targets"),
            LossConfig(), **arguments,
        )  # fmt: skip


def test_a_head_that_both_models_share_is_converted_once(monkeypatch):
    converted, totals = [], []
    convert = HeadProducts.weight
    monkeypatch.setattr(
        HeadProducts, "weight", lambda self, w: converted.append(w) or convert(self, w)
    )
    case, hidden = Case(), Case(seed=2).hidden
    for weight, count in ((case.weight.detach(), 1), (case.weight.clone(), 2)):
        converted.clear()
        targets = HiddenTargets(hidden, Head(weight))
        sums = fused_distillation_loss(
            case.hidden, case.weight, case.labels % 400, targets, LossConfig(), vocab_limit=400
        )
        assert len(converted) == count
        totals.append(sums.total)
    assert totals[0] == totals[1]


def test_second_and_double_backward_are_refused():
    case = Case()
    hidden = case.hidden.requires_grad_()
    targets, _ = case.targets("hidden")
    total = fused_distillation_loss(hidden, case.weight, case.labels, targets, LossConfig()).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass only"):
        total.backward()
    total = fused_distillation_loss(hidden, case.weight, case.labels, targets, LossConfig()).total
    (gradient,) = torch.autograd.grad(total, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        gradient.sum().backward()


# ---------------------------------------------------------------- 编译，以及 GPU 的那条路


@pytest.fixture
def compiling(monkeypatch):
    """小的例子也编译；最后一片有填充。"""
    monkeypatch.setattr(buffers, "COMPILE_ELEMENTS", 0)
    monkeypatch.setattr(COMPILER, "failed", False)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["hidden", "bucket"])
def test_compiled_rows_give_the_numbers_of_eager_ones(kind, compiling, monkeypatch):
    case = Case(rows=21, near=True)
    if kind == "bucket":
        sparse, _ = case.targets(kind)
        sparse = replace(sparse, label_log_prob=-torch.rand(21), top=sparse.ids[:, 1])
        case.targets = lambda _: (sparse, sparse)
    loss = LossConfig(divergence="jsd", alpha=0.5, temperature=1.0, label_smoothing=0.1)
    compiled, gradients = case.run(loss, kind)
    assert not COMPILER.failed
    monkeypatch.setattr(buffers, "COMPILE_ELEMENTS", 2**62)
    eager, expected = case.run(loss, kind)
    for left, right in zip(compiled, eager, strict=True):
        torch.testing.assert_close(left, right, rtol=2e-6, atol=0, equal_nan=True)
    for left, right in zip(gradients, expected, strict=True):
        assert relative(left, right.double()) < 1e-5


BROKEN_COMPILERS = [
    torch._inductor.exc.InductorError(RuntimeError("no compiler"), None),
    torch._dynamo.exc.Unsupported("no"),
    AssertionError(),  # dynamo 在一块 GPU 上的 2.11 里正是这样失败的
]


@pytest.mark.parametrize("error", BROKEN_COMPILERS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("kind", ["hidden", "bucket"])
def test_whatever_the_compiler_raises_the_loss_runs_uncompiled(
    kind, error, compiling, monkeypatch, caplog
):
    def broken(*_):
        raise error

    monkeypatch.setattr(buffers, "_compiled", lambda _: broken)
    case, loss = Case(rows=21), LossConfig(temperature=1.0)
    found, _ = case.run(loss, kind)
    expected, _ = case.oracle(loss, kind)
    assert found.total.item() == pytest.approx(expected.total.item(), rel=1e-6)
    assert caplog.text.count("torch.compile cannot be used here") == 1
    assert type(error).__name__ in caplog.text


def test_an_error_that_is_not_the_compilers_is_raised_as_it_is(compiling, monkeypatch, caplog):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(buffers, "_compiled", lambda _: out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        Case(rows=21).run(LossConfig())
    assert not COMPILER.failed


@pytest.fixture
def half_products():
    """给 CPU 补上只有 GPU 才有的矩阵乘：半精度输入、float32 结果。"""
    library = torch.library.Library("aten", "IMPL")

    def exact(left, right):
        assert left.dtype == right.dtype
        assert left.dtype in (torch.float16, torch.bfloat16)
        return left.float() @ right.float()

    def mm(left, right, dtype, *, out):
        assert dtype == out.dtype == torch.float32
        return out.copy_(exact(left, right))

    def addmm(total, left, right, dtype, *, beta=1, alpha=1, out):
        assert dtype == total.dtype == out.dtype == torch.float32
        return out.copy_(beta * total + alpha * exact(left, right))

    library.impl("mm.dtype", lambda left, right, dtype: exact(left, right), "CPU")
    library.impl("mm.dtype_out", mm, "CPU")
    library.impl("addmm.dtype_out", addmm, "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("loss", [LossConfig(), LossConfig(divergence="jsd", alpha=1.0)], ids=short)
def test_products_of_a_gpu_round_only_what_they_multiply(loss, dtype, half_products, monkeypatch):
    from contextlib import nullcontext

    from distillab.loss.products import MixedProducts

    monkeypatch.setattr(fused, "head_products", lambda *_: nullcontext(MixedProducts(dtype)))
    case = Case(near=True)
    for name in ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight"):
        setattr(case, name, getattr(case, name).to(dtype).float())
    found, gradients = case.run(loss, dtype=dtype)
    expected, exact = case.oracle(loss)
    assert found.total.item() == pytest.approx(expected.total.item(), rel=1e-5)
    for gradient, right in zip(gradients, exact, strict=True):
        assert relative(gradient, right) < 0.01
