"""结果总是 float32 的 head 大小的矩阵乘；输入只在进入乘法时取整到计算精度。"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

TILE_BYTES = 16 * 2**20
"""CPU 上把低精度的 weight 转成 float32 时，一次转这么多字节。"""

FP16_GRADIENT_SCALE = 1024.0
"""fp16 装不下小于 6e-8 的数：对 logits 的梯度先乘它再取整，乘完矩阵再除回去（2 的幂，无舍入）。"""


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """矩阵乘的计算精度：autocast 的 dtype，没有 autocast 则是 ``hidden`` 的。"""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


@contextmanager
def head_products(device: str, compute: torch.dtype) -> Iterator[HeadProducts]:
    """选出设备与精度所对应的乘法；在 with 之内有效，其间 autocast 关闭。"""
    with torch.autocast(device, enabled=False):
        if device == "cuda" and compute in (torch.float16, torch.bfloat16):
            yield MixedProducts(compute)
        elif device == "cpu" and compute == torch.bfloat16 and has_bfloat16_units():
            matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
            previous = matmul.fp32_precision
            matmul.fp32_precision = "bf16"  # oneDNN 在内部取整：float32 进、float32 出
            try:
                yield HeadProducts(torch.float32)
            finally:
                matmul.fp32_precision = previous
        else:
            yield HeadProducts(torch.promote_types(compute, torch.float32))


def has_bfloat16_units() -> bool:
    """CPU 有没有 AVX512-BF16 或 AMX；没有时 bf16 的矩阵乘比 float32 慢几倍。"""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class HeadProducts:
    """一个 head 的三种乘法，全部以 ``dtype``（float32，``gradcheck`` 时 float64）进行。

    weight 的 dtype 不同时（CPU 上的 bf16、fp16），按词表分片转换，不留整份副本：CPU 没有半精度输
    入、float32 结果的矩阵乘，而半精度的 logits 会使梯度差 10% 到 40%。
    """

    d_logits_bytes = 0

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def weight(self, weight: Tensor) -> Tensor:
        """每次调用准备一遍的 weight ``[V, H]``。"""
        return weight.detach()

    def rows(self, rows: Tensor) -> Tensor:
        """每块准备一遍的行 ``[R, H]``。"""
        return rows.to(self.dtype)

    def d_logits(self, d_logits: Tensor) -> Tensor:
        """每块准备一遍的、对 logits 的梯度 ``[R, V]``。"""
        return d_logits

    def logits(self, rows: Tensor, weight: Tensor, out: Tensor) -> None:
        """把 logits 写进 ``out``：``out [R, V] = rows @ weight.T``。"""
        for part, columns in self._tiles(weight):
            torch.mm(rows, part.T, out=out[:, columns])

    def d_bias(self, d_logits: Tensor) -> Tensor:
        """对 bias 的梯度 ``[V]``，``dtype``。"""
        return d_logits.sum(0)

    def d_rows(self, d_logits: Tensor, weight: Tensor) -> Tensor:
        """对行的梯度 ``d_logits @ weight``：``[R, H]``，``dtype``。"""
        total = d_logits.new_zeros(len(d_logits), weight.shape[1])
        for part, columns in self._tiles(weight):
            total.addmm_(d_logits[:, columns], part)
        return total

    def add_d_weight(self, total: Tensor, d_logits: Tensor, rows: Tensor) -> None:
        """``total [V, H] += d_logits.T @ rows``，就地。"""
        total.addmm_(d_logits.T, rows)

    def _tiles(self, weight: Tensor) -> Iterator[tuple[Tensor, slice]]:
        if weight.dtype == self.dtype:
            yield weight, slice(None)
            return
        vocab, width = weight.shape
        size = min(vocab, max(1, TILE_BYTES // (width * self.dtype.itemsize)))
        tile = torch.empty(size, width, dtype=self.dtype, device=weight.device)
        for start in range(0, vocab, size):
            part = weight[start : start + size]
            yield tile[: len(part)].copy_(part), slice(start, start + len(part))


class MixedProducts(HeadProducts):
    """GPU：半精度输入，float32 结果与累积，走 tensor core。"""

    d_logits_bytes = 2

    def __init__(self, compute: torch.dtype) -> None:
        super().__init__(torch.float32)
        self.compute = compute
        self.scale = FP16_GRADIENT_SCALE if compute == torch.float16 else 1.0

    def weight(self, weight: Tensor) -> Tensor:
        """本来就是半精度时不复制。"""
        return weight.detach().to(self.compute)

    def rows(self, rows: Tensor) -> Tensor:
        """半精度的行 ``[R, H]``。"""
        return rows.to(self.compute)

    def d_logits(self, d_logits: Tensor) -> Tensor:
        """半精度的梯度 ``[R, V]``，fp16 时放大了 ``FP16_GRADIENT_SCALE`` 倍。"""
        return (d_logits if self.scale == 1 else d_logits * self.scale).to(self.compute)

    def logits(self, rows: Tensor, weight: Tensor, out: Tensor) -> None:
        """把 logits 写进 ``out``：``out [R, V] = rows @ weight.T``，float32。"""
        torch.mm(rows, weight.T, out_dtype=torch.float32, out=out)

    def d_bias(self, d_logits: Tensor) -> Tensor:
        """对 bias 的梯度 ``[V]``，float32。"""
        return d_logits.sum(0, dtype=self.dtype) / self.scale

    def d_rows(self, d_logits: Tensor, weight: Tensor) -> Tensor:
        """对行的梯度 ``d_logits @ weight``：``[R, H]``，float32。"""
        return torch.mm(d_logits, weight, out_dtype=torch.float32) / self.scale

    def add_d_weight(self, total: Tensor, d_logits: Tensor, rows: Tensor) -> None:
        """``total [V, H] += d_logits.T @ rows``，float32，就地。"""
        torch.addmm(
            total, d_logits.T, rows, alpha=1 / self.scale, out_dtype=torch.float32, out=total
        )
