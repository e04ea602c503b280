"""教师给了裁剪掉的 token 多少概率，以及把它并到哪里。"""

from __future__ import annotations

import torch
from torch import Tensor

from ..loss.products import head_products
from ..targets import DenseTargets, Head, HiddenTargets

CHUNK_BYTES = 2**27
"""留下的与去掉的 logits，float32，一次至多这么多字节。"""


class Outside:
    """教师的输出层里裁剪掉的行 ``dropped [D, H_t]``。

    ``into [D]``，int64：各行的概率并到哪个新的 id；``None`` 是不并，留下的重新归一化。``sums`` 是
    ``[裁剪掉的概率之和, 行数]``，float64；``measuring`` 时才累积。
    """

    def __init__(self, dropped: Head, into: Tensor | None = None) -> None:
        self.dropped, self.into = dropped, into
        self.measuring, self.sums = True, torch.zeros(2, dtype=torch.float64)

    @property
    def needed(self) -> bool:
        """量完之后还用不用得着。"""
        return self.into is not None

    def targets(self, hidden: Tensor, head: Head) -> HiddenTargets | DenseTargets:
        """``hidden [P, H_t]`` 处的目标，``head`` 是留下的；要并的，是并好的 logits ``[P, V]``。"""
        if not (self.measuring or self.needed):
            return HiddenTargets(hidden, head)
        self._place(hidden.device)
        count, rows = len(head.weight), len(hidden)
        size = max(1, CHUNK_BYTES // (4 * (count + len(self.dropped.weight))))
        folded = torch.empty(rows if self.needed else 0, count, device=hidden.device)
        with head_products(hidden.device.type, hidden.dtype) as products:
            weights = [products.weight(each.weight) for each in (head, self.dropped)]
            for start in range(0, rows, size):
                part = slice(start, min(start + size, rows))
                both = []
                for each, weight in zip((head, self.dropped), weights, strict=True):
                    out = hidden.new_empty(part.stop - start, len(weight), dtype=products.dtype)
                    products.logits(products.rows(hidden[part]), weight, out)
                    both.append(each.finish(out))
                if self.measuring:
                    lost = both[1].logsumexp(-1) - both[0].logsumexp(-1)
                    self.sums[0] += lost.sigmoid().sum()
                if self.into is not None:
                    folded[part] = fold(both[0], both[1], self.into)
        self.sums[1] += rows if self.measuring else 0
        return DenseTargets(folded) if self.needed else HiddenTargets(hidden, head)

    def _place(self, device: torch.device) -> None:
        """跟着教师；分到各进程的教师，它也是每个进程一份。"""
        old = self.dropped
        if old.weight.device != device:
            bias = None if old.bias is None else old.bias.to(device)
            self.dropped = Head(old.weight.to(device), bias, old.scale, old.softcap)
            self.into = None if self.into is None else self.into.to(device)
            self.sums = self.sums.to(device)


def fold(inside: Tensor, outside: Tensor, into: Tensor) -> Tensor:
    """``inside [R, V]`` 的各列加上并到它的 ``outside [R, D]`` 的各列：``log Σ exp``。

    每一列各减去自己的最大值；``-inf`` 的列（没有概率的）没有谁并进来，仍是 ``-inf``。
    """
    columns = into.expand(len(outside), -1)
    top = inside.scatter_reduce(1, columns, outside, "amax")
    top = top.clamp(min=torch.finfo(inside.dtype).min)
    total = (inside - top).exp()
    total.scatter_add_(1, columns, (outside - top.gather(1, columns)).exp())
    return top + total.log()
