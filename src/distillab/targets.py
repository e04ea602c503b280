"""教师给出的分布以什么形式到达，以及从 hidden state 到 logits 的 ``Head``。"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import DistillabError


@dataclass(frozen=True)
class Head:
    """语言模型的输出层：``logits = softcap(scale * (hidden @ weight.T + bias))``。

    Attributes:
        weight: ``[V, H]``。
        bias: ``[V]`` 或 ``None``。
        scale: logits 的倍数（Cohere 的 ``logit_scale``，Granite 的 ``1 / logits_scaling``）。
        softcap: ``c * tanh(logits / c)`` 的 c（Gemma 2），``None`` 为不限。
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden [..., H]`` 到 ``[..., V]`` 的 float32 logits，不受 autocast 影响。"""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.finish(hidden.float() @ self.weight.float().T)

    def finish(self, product: Tensor) -> Tensor:
        """矩阵乘之后的逐元素部分：bias、scale、softcap。"""
        logits = product if self.bias is None else product + self.bias.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def cut(self, limit: int) -> Head:
        """只留词表的前 ``limit`` 行（视图，不复制）：填充行没有概率，也没有梯度。

        Raises:
            DistillabError: ``limit`` 小于 1。
        """
        if limit < 1:
            raise DistillabError(f"vocabulary limit is {limit}, expected at least 1")
        bias = None if self.bias is None else self.bias[:limit]
        return Head(self.weight[:limit], bias, self.scale, self.softcap)


@dataclass(frozen=True)
class HiddenTargets:
    """教师的 hidden state 与它的 head；``[P, V]`` 的 logits 从不整个存在。

    Attributes:
        hidden: ``[P, H_t]``，第 i 行与学生的第 i 行预测同一个 token。
        head: 教师的 head，宽度可与学生不同，词表必须相同。
    """

    hidden: Tensor
    head: Head
