"""GPU 上的损失：对照 float64，Triton kernel 对照编译的。"""

import math
import sys

import torch
from check_parts import VOCAB, Skip, nothing_steps_aside, relative

from distillab.config.schema import LossConfig
from distillab.loss import buffers
from distillab.loss.fused import fused_distillation_loss
from distillab.loss.losses import distillation_loss
from distillab.targets import DenseTargets, Head, HiddenTargets

DIVERGENCES = {
    "forward_kl": {}, "reverse_kl": {}, "jsd": {"beta": 0.3}, "skew_forward_kl": {"skew": 0.2},
    "skew_reverse_kl": {"skew": 0.2},
}  # fmt: skip
GRADIENT = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 1e-2}
"""对 float64 的相对误差至多这么多。"""

VALUE = 1e-5


def loss_matches_float64(device, divergence):
    """每种精度的值与两个梯度。"""
    return "; ".join(compared(device, divergence, dtype) for dtype in GRADIENT)


def compared(device, divergence, dtype, rows=96, budget=None):
    """一种精度；独立的与几乎相同的两个模型。"""
    half = getattr(torch, dtype)
    worst = worst_value = 0.0
    for near in (False, True):
        inputs = [x.to(device, half) for x in loss_inputs(rows, near)]
        labels = torch.arange(rows, device=device) * 7 % VOCAB
        for alpha, temperature in ((0.5, 2.0), (1.0, 1.0)):
            loss = LossConfig(
                divergence=divergence, alpha=alpha, temperature=temperature,
                **DIVERGENCES[divergence],
            )  # fmt: skip
            hidden, weight = (x.detach().clone().requires_grad_() for x in inputs[:2])
            targets = HiddenTargets(inputs[2], Head(inputs[3]))
            with nothing_steps_aside():
                found = fused_distillation_loss(
                    hidden, weight, labels, targets, loss, memory_budget=budget
                )
            found.total.backward()
            exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in inputs[:2])
            logits = inputs[2].double() @ inputs[3].double().T
            expected = distillation_loss(
                exact_hidden @ exact_weight.T, DenseTargets(logits), labels, loss
            )
            expected.total.backward()
            pairs = ((hidden.grad, exact_hidden.grad), (weight.grad, exact_weight.grad))
            worst = max(worst, *(relative(*pair) for pair in pairs))
            error = abs(found.total.item() / expected.total.item() - 1)
            worst_value = max(worst_value, error)
    said = f"{dtype}: gradient error {worst:.1e}, value error {worst_value:.1e}"
    assert worst <= GRADIENT[dtype], said
    assert worst_value <= VALUE, said
    return said


def loss_inputs(rows, near):
    """``(hidden, weight, 教师的 hidden, 教师的 weight)``，CPU 上的 float32；logits 的标准差约 4。"""
    generator = torch.Generator().manual_seed(0)
    width, wider = 64, 80

    def normal(*shape, std=1.0):
        return torch.randn(*shape, generator=generator) * std

    hidden, weight = normal(rows, width), normal(VOCAB, width, std=4 / math.sqrt(width))
    if not near:
        return hidden, weight, normal(rows, wider), normal(VOCAB, wider, std=4 / math.sqrt(wider))
    more = normal(rows, wider - width, std=0.05), normal(VOCAB, wider - width, std=0.5)
    return hidden, weight, torch.cat([hidden, more[0]], 1), torch.cat([weight, more[1]], 1)


def kernels_equal_the_compiled(device, divergence):
    """半精度里，Triton kernel 与 ``torch.compile`` 的值相同，梯度只差舍入。"""
    if device == "cpu":
        raise Skip("the kernels need a GPU; the interpreter runs them in tests/loss")
    half = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    inputs = [x.to(device, half) for x in loss_inputs(300, near=False)]
    labels = torch.arange(300, device=device) * 7 % VOCAB
    loss = LossConfig(divergence=divergence, **DIVERGENCES[divergence])
    found = []
    for kernels in (True, False):
        buffers.KERNELS.failed = not kernels
        hidden, weight = (x.detach().clone().requires_grad_() for x in inputs[:2])
        targets = HiddenTargets(inputs[2], Head(inputs[3]))
        with nothing_steps_aside():
            sums = fused_distillation_loss(
                hidden, weight, labels, targets, loss, memory_budget=128 * VOCAB * 10
            )
        sums.total.backward()
        values = torch.stack(sums)[:-1].detach()  # 最可能的 token 并列时，谁在前都对
        found.append((values, hidden.grad, weight.grad))
        assert "distillab.loss.kernels" in sys.modules, "the kernels were not tried"
    errors = [relative(one, other.double()) for one, other in zip(*found, strict=True)]
    said = f"sums within {errors[0]:.1e}, gradients within {max(errors[1:]):.1e}"
    assert errors[0] <= VALUE, said
    assert max(errors) <= 1e-2, said
    return said


def loss_in_chunks(device, dtype="float32"):
    """每块不满整批的行，最后一块更少；与整块的同样准。"""
    return compared(device, "jsd", dtype, rows=300, budget=64 * VOCAB * 10)
