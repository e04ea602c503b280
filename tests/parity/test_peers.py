"""同一个目标函数，对照别人的实现：TRL 的 ``generalized_jsd_loss``，Liger 的融合 JSD。"""

import os

import pytest
import torch
from objectives import relative

from distillab.config.schema import LossConfig
from distillab.loss.fused import fused_distillation_loss
from distillab.targets import Head, HiddenTargets

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
LigerFusedLinearJSDLoss = pytest.importorskip(
    "liger_kernel.chunked_loss", reason="pip install 'distillab[bench]'"
).LigerFusedLinearJSDLoss
GKDTrainer = pytest.importorskip("trl.experimental.gkd").GKDTrainer

ROWS, VOCAB = 40, 300


def inputs():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    hidden, weight = draw(ROWS, 16), draw(VOCAB, 16)
    teacher_hidden, teacher_weight = draw(ROWS, 24), 0.8 * draw(VOCAB, 24)
    labels = torch.randint(VOCAB, (ROWS,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), teacher_hidden, teacher_weight, labels


def ours(loss):
    hidden, weight, teacher_hidden, teacher_weight, labels = inputs()
    targets = HiddenTargets(teacher_hidden, Head(teacher_weight))
    sums = fused_distillation_loss(hidden, weight, labels, targets, loss)
    sums.total.backward()
    return sums.total.detach(), hidden.grad, weight.grad


def objective(beta):
    """TRL 与 Liger 的端点是 KL：beta 0 是 KL(教师||学生)，1 是 KL(学生||教师)。"""
    ends = {0.0: "forward_kl", 1.0: "reverse_kl"}
    return {"divergence": ends.get(beta, "jsd"), "beta": None if beta in ends else beta}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_jsd_equals_trls_generalized_jsd_loss(beta, temperature):
    hidden, weight, teacher_hidden, teacher_weight, _ = inputs()
    theirs = GKDTrainer.generalized_jsd_loss(
        (hidden @ weight.T)[None],
        (teacher_hidden @ teacher_weight.T)[None],
        beta=beta,
        temperature=temperature,
        reduction="sum",
    )
    theirs.backward()
    loss = LossConfig(alpha=1.0, temperature=temperature, **objective(beta))
    scale = temperature**2  # TRL 不乘 T²
    total, d_hidden, d_weight = ours(loss)
    torch.testing.assert_close(total / scale, theirs.detach(), rtol=1e-5, atol=0)
    assert relative(d_hidden / scale, hidden.grad) < 1e-5
    assert relative(d_weight / scale, weight.grad) < 1e-5


@pytest.mark.parametrize("hard", [0.0, 0.5])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_loss_equals_ligers_fused_jsd(beta, hard):
    # 0 与 1 之间 Liger 的 beta 是学生的份额，只有 0.5 处两种写法相同
    hidden, weight, teacher_hidden, teacher_weight, labels = inputs()
    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=hard, weight_soft_loss=1 - hard, beta=beta, compiled=False, chunk_size=8
    )
    theirs = ROWS * module(hidden, weight, teacher_hidden, teacher_weight, labels)  # 它给平均
    theirs.backward()
    total, d_hidden, d_weight = ours(LossConfig(alpha=1 - hard, temperature=1.0, **objective(beta)))
    torch.testing.assert_close(total, theirs.detach(), rtol=1e-5, atol=0)
    assert relative(d_hidden, hidden.grad) < 1e-5
    assert relative(d_weight, weight.grad) < 1e-5
