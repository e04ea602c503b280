"""行的切分，各块轮流使用的缓冲区，与一块里的逐行算术：Triton kernel、编译过的或逐个算子的。"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from ..targets import DenseTargets, HiddenTargets, SparseTargets, Targets
from .chunking import Chunking, budget_bytes
from .compiler import Compiler
from .products import HeadProducts, MixedProducts
from .rows import RowSpec, dense_rows
from .sparse import sparse_rows

COMPILE_ELEMENTS = 2**24
"""CPU 上 ``P * V`` 达到这么多才编译：编译要几秒到半分钟，小的损失赚不回来。"""

COMPILER = Compiler(
    "torch.compile cannot be used here, the loss runs uncompiled: same numbers, slower (%s)"
)
KERNELS = Compiler(
    "the loss's Triton kernels cannot be used here, it runs through torch.compile: "
    "same numbers, slower (%s)"
)


class Chunks:
    """行的切分，各块轮流使用的缓冲区，与一块里的逐行算术。

    GPU 的半精度乘法之后，稠密的目标走 ``kernels.py``：logits 一次一块，半精度的梯度另放，凑满一组才
    交出去。其余的一块就是一组，梯度写在学生的 logits 里。
    """

    def __init__(
        self,
        hidden: Tensor,
        products: HeadProducts,
        targets: Targets | None,
        spec: RowSpec,
        memory_budget: int | None,
        labels: Tensor | None = None,
        bias: Tensor | None = None,
        excluded: Tensor | None = None,
    ) -> None:
        self.products, self.rows, self.labels, self.targets = products, len(hidden), labels, targets
        self.bias = None if bias is None else bias.detach()[: spec.vocab]
        self.teacher_bias, self.excluded = None, excluded
        if isinstance(targets, HiddenTargets):
            head = targets.head
            spec = spec._replace(teacher_scale=head.scale, teacher_softcap=head.softcap)
            self.teacher_bias = None if head.bias is None else head.bias[: spec.vocab]
        self.top = targets.likeliest() if isinstance(targets, SparseTargets) else None
        self.spec, device, vocab = spec, hidden.device, spec.vocab
        two = isinstance(targets, HiddenTargets | DenseTargets)
        half = isinstance(products, MixedProducts) and not KERNELS.failed
        self.kernels = half and not isinstance(targets, SparseTargets)
        chunking = Chunking.of(
            self.rows,
            vocab,
            products.dtype.itemsize * (1 + two),
            products.d_logits_bytes * spec.gradient,
            device.type,
            memory_budget or default_budget(device, half),
            self.kernels,
        )
        self.size, self.tile, self.group = chunking.size, chunking.tile, chunking.group
        self.compiled = device.type != "cpu" or self.rows * vocab >= COMPILE_ELEMENTS

        def buffer(rows: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(rows, chunking.width, dtype=dtype, device=device)[:, :vocab]

        self.student = buffer(chunking.buffer_rows, products.dtype)
        self.teacher = buffer(chunking.buffer_rows if two else 0, products.dtype)
        self.gradient = None
        if isinstance(products, MixedProducts) and self.kernels and spec.gradient:
            self.gradient = buffer(self.group, products.compute)

    def __iter__(self) -> Iterator[slice]:
        for start in range(0, self.rows, self.size):
            yield slice(start, min(start + self.size, self.rows))

    def row_values(self, rows: slice) -> Tensor:
        """缓冲区里的一块：``RowValues`` 的总和 ``[5]``，float64；它的梯度从此可取。"""
        parts = [part.sum(-1, dtype=torch.float64) for part in self._values(rows)]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    def each_row(self, rows: slice) -> Tensor:
        """同 ``row_values``，不求和：``[5, R]``。"""
        return torch.cat(self._values(rows), -1)

    def _values(self, rows: slice) -> list[Tensor]:
        """``RowValues`` 逐行的值，一片一个 ``[5, R]``。"""
        if self.excluded is not None:
            count = rows.stop - rows.start
            for buffer in (self.student[:count], self.teacher[:count]):
                buffer.index_fill_(1, self.excluded, -torch.inf)
        if self.kernels:
            return KERNELS.call(self._by_kernel, self._by_tiles, rows)  # type: ignore[no-any-return]
        return self._by_tiles(rows)

    def complete(self, rows: slice) -> tuple[slice, Tensor] | None:
        """凑满（或到头）了的一组行与它们的梯度，可以直接相乘；还不满，或不要梯度，是 ``None``。"""
        start = rows.start - rows.start % self.group
        if not self.spec.gradient or rows.stop < min(start + self.group, self.rows):
            return None
        group, count = slice(start, rows.stop), rows.stop - start
        if self.gradient is not None:
            return group, self.gradient[:count]
        return group, self.products.d_logits(self.student[:count])

    def _by_kernel(self, rows: slice) -> list[Tensor]:
        from .kernels import kernel_rows  # 没有 Triton 时退到编译的

        assert isinstance(self.products, MixedProducts)
        count = rows.stop - rows.start
        values = kernel_rows(
            self.student[:count],
            None if self.targets is None else self.teacher[:count],
            self._gradient(rows),
            None if self.labels is None else self.labels[rows],
            self.bias,
            self.teacher_bias,
            self.spec,
            self.products.scale,
        )
        return [values]

    def _gradient(self, rows: slice) -> Tensor | None:
        """另放的梯度里，这一块的几行。"""
        if self.gradient is None:
            return None
        first = rows.start % self.group
        return self.gradient[first : first + rows.stop - rows.start]

    def _by_tiles(self, rows: slice) -> list[Tensor]:
        """学生的缓冲区变成梯度。"""
        parts = [
            self._tile(start - rows.start, slice(start, min(start + self.tile, rows.stop)))
            for start in range(rows.start, rows.stop, self.tile)
        ]
        student = self.student[: rows.stop - rows.start]
        if self.excluded is not None and self.spec.gradient:
            student.index_fill_(1, self.excluded, 0)
        gradient = self._gradient(rows)
        if gradient is not None:
            gradient.copy_(self.products.d_logits(student))
        return parts

    def _tile(self, first: int, rows: slice) -> Tensor:
        """``first`` 是这一片在缓冲区里的第一行，``rows`` 是它在全部 P 行里的。

        要编译时，形状总是整片：最后一片不足的补上，补的行不计。
        """
        count = rows.stop - rows.start
        size = self.tile if self.compiled else count
        student = self.student[first : first + size]
        own, targets, spec = student[:count], self.targets, self.spec

        def pad(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or size == count:
                return tensor
            return F.pad(tensor, [0, 0] * (tensor.ndim - 1) + [0, size - count])

        labels = None if self.labels is None else self.labels[rows]
        label_product = None if labels is None else own.gather(1, labels[:, None])[:, 0]
        if isinstance(targets, SparseTargets):
            ids, top = targets.ids[rows], None if self.top is None else self.top[rows]
            probs, entropy, label_log_prob = (
                None if part is None else part[rows].to(own.dtype)
                for part in (targets.probs, targets.entropy, targets.label_log_prob)
            )
            top_product = None if top is None else own.gather(1, top[:, None])[:, 0]
            narrow = (own.gather(1, ids), ids, probs, entropy, label_log_prob, top_product, top,
                      label_product, labels)  # fmt: skip
            if targets.tail != "sampled":
                own.scatter_(1, ids, -torch.inf)
            *values, id_gradient, label_gradient = self._call(
                sparse_rows, student, *map(pad, narrow), self.bias, targets.tail, spec
            )
            if spec.gradient:
                write = own.scatter_add_ if targets.tail == "sampled" else own.scatter_
                write(1, ids, id_gradient[:count])
        else:
            teacher = None if targets is None else self.teacher[first : first + size]
            at_label = pad(label_product), pad(labels)
            *values, label_gradient = self._call(
                dense_rows, student, teacher, *at_label, self.bias, self.teacher_bias, spec
            )
        if labels is not None and spec.gradient:
            own.scatter_add_(1, labels[:, None], label_gradient[:count, None])
        return torch.stack(values)[:, :count]

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if not self.compiled:
            return function(*arguments)
        return COMPILER.call(_compiled(function), function, *arguments)


def default_budget(device: torch.device, kernels: bool = False) -> int:
    """空闲内存的 10% 与 ``budget_bytes`` 中较小的，单位字节。"""
    if device.type == "cuda":
        return _cuda_budget(device, kernels)
    memory = psutil.virtual_memory()
    return min(int(memory.available) // 10, budget_bytes(device.type, memory.total, kernels))


@functools.cache
def _cuda_budget(device: torch.device, kernels: bool) -> int:
    """问一次：每步都问要几百微秒，块的大小也不该在一次训练的半途改变。"""
    total = int(torch.cuda.mem_get_info(device)[1])
    return min(free_cuda_bytes(device) // 10, budget_bytes(device.type, total, kernels))


def free_cuda_bytes(device: torch.device) -> int:
    """还能分配几个字节：设备空着的，与分配器留着没用的。"""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + held)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)
