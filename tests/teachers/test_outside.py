"""裁剪掉的概率：量得与 softmax 相同；并起来的目标与稠密的参考相同，值与梯度都是。"""

import pytest
import torch

from distillab.batch import View
from distillab.config.schema import LossConfig
from distillab.loss.fused import fused_distillation_loss
from distillab.loss.losses import distillation_loss
from distillab.models.interface import PretrainedLM
from distillab.models.trimmed_model import trim_model
from distillab.targets import DenseTargets, Head, HiddenTargets
from distillab.teachers import outside as module
from distillab.teachers.in_process import LocalTeacher
from distillab.teachers.outside import Outside, fold
from distillab.vocabulary import Vocabulary

P, H, V, D = 7, 6, 11, 23


@pytest.fixture
def parts(monkeypatch):
    """``(hidden, 留下的 head, 去掉的 head, into)``；一次只算两行。"""
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * (V + D) * 2)
    torch.manual_seed(0)
    heads = [Head(torch.randn(rows, H), torch.randn(rows), 0.7, 9.0) for rows in (V, D)]
    return 2 * torch.randn(P, H), *heads, torch.randint(0, V, (D,))


def reference(hidden, inside, dropped, into):
    """``(并好的概率 [P, V], 去掉的概率 [P])``，float64，稠密地算。"""
    logits = torch.cat([head.logits(hidden) for head in (inside, dropped)], -1).double()
    probs = logits.softmax(-1)
    kept, lost = probs[:, :V].clone(), probs[:, V:]
    for column, target in enumerate(into.tolist()):
        kept[:, target] += lost[:, column]
    return kept, lost.sum(-1)


def test_mass_is_moved_and_none_is_lost(parts):
    hidden, inside, dropped, into = parts
    expected, lost = reference(*parts)
    outside = Outside(dropped, into)
    found = outside.targets(hidden, inside)
    assert isinstance(found, DenseTargets)
    torch.testing.assert_close(found.logits.double().softmax(-1), expected, rtol=1e-5, atol=1e-7)
    whole = torch.cat([head.logits(hidden) for head in (inside, dropped)], -1)
    torch.testing.assert_close(found.logits.logsumexp(-1), whole.logsumexp(-1))
    assert outside.sums.tolist() == pytest.approx([float(lost.sum()), P], rel=1e-5)


@pytest.mark.parametrize("loss", [
    LossConfig(alpha=0.5, temperature=2.0),
    LossConfig(divergence="reverse_kl", alpha=1.0, temperature=1.0),
    LossConfig(divergence="jsd", beta=0.3, alpha=1.0, temperature=1.5),
])  # fmt: skip
def test_the_loss_on_moved_mass_is_the_dense_one_in_value_and_gradient(parts, loss):
    hidden, inside, dropped, into = parts
    rows, weight = torch.randn(P, 5), torch.randn(V, 5, requires_grad=True)
    labels = torch.randint(0, V, (P,))
    found = fused_distillation_loss(
        rows, weight, labels, Outside(dropped, into).targets(hidden, inside), loss
    )
    (gradient,) = torch.autograd.grad(found.total, weight)
    probs = reference(hidden, inside, dropped, into)[0].float()
    dense = distillation_loss(rows @ weight.T, DenseTargets(probs.log()), labels, loss)
    (expected,) = torch.autograd.grad(dense.total, weight)
    torch.testing.assert_close(found.total, dense.total, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_columns_that_nothing_joins_and_that_have_no_probability_stay():
    inside = torch.tensor([[0.0, -torch.inf, 300.0, -300.0]])
    found = fold(inside, torch.tensor([[1.0, -300.0]]), torch.tensor([0, 3]))
    expected = torch.tensor([[torch.tensor([0.0, 1.0]).logsumexp(0), -torch.inf, 300.0, -299.3069]])
    torch.testing.assert_close(found, expected)


def test_renormalised_targets_are_measured_once_and_the_rows_are_let_go(tiny_llama):
    model = PretrainedLM(tiny_llama)
    kept, dropped = [*range(0, 400, 2)], [*range(1, 400, 2)]
    ids = torch.arange(6)[None]
    with torch.no_grad():
        probs = tiny_llama(torch.tensor(kept)[ids]).logits.softmax(-1)[0]
    teacher = LocalTeacher(model)
    teacher.outside = Outside(trim_model(model, kept, dropped))
    view = View(ids, torch.ones_like(ids), torch.arange(6))
    found = teacher.targets(view, Vocabulary(200))
    assert isinstance(found, HiddenTargets)
    inside = probs[:, kept]
    expected = inside / inside.sum(-1, keepdim=True)
    torch.testing.assert_close(found.head.logits(found.hidden).softmax(-1), expected)
    sums = teacher.measured_outside()
    assert sums.tolist() == pytest.approx([float(probs[:, dropped].sum()), 6], rel=1e-5)
    assert teacher.outside is None
    assert teacher.measured_outside() is None
