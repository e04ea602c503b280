"""前向时就算完的梯度：留在 ``ctx`` 里，反向只乘上游的。"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .products import HeadProducts


def keep_gradients(
    ctx: Any, inputs: Sequence[Tensor | None], products: HeadProducts
) -> list[Tensor | None]:
    """``forward`` 的前几个参数 ``inputs`` 的梯度，全 0，累积的精度，不要的是 ``None``。"""
    ctx.dtypes = [None if part is None else part.dtype for part in inputs]
    ctx.gradients = [
        torch.zeros(part.shape, dtype=products.dtype, device=part.device)
        if part is not None and needed
        else None
        for part, needed in zip(inputs, ctx.needs_input_grad, strict=False)
    ]
    gradients: list[Tensor | None] = ctx.gradients
    return gradients


def take_gradients(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
    """留着的梯度乘 ``upstream``，各是输入的 dtype；只能取一次，再取是 ``RuntimeError``。"""
    if ctx.gradients is None:
        raise RuntimeError(
            "the fused loss keeps its gradients for one backward pass only; compute it again"
        )
    # 从 ctx 取走再就地乘：autograd 因而可以直接收下这块内存，不再复制。
    gradients, ctx.gradients = ctx.gradients, None
    return [
        None if gradient is None else gradient.mul_(upstream).to(dtype)
        for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
    ]
