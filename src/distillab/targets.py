"""教师给出的分布以什么形式到达，以及从 hidden state 到 logits 的 ``Head``。"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .vocabulary import Vocabulary

Tail = Literal["renormalise", "bucket", "sampled"]


@dataclass(frozen=True)
class Head:
    """语言模型的输出层：``logits = softcap(scale * (hidden @ weight.T + bias))``。

    Attributes:
        weight: ``[V, H]``。
        bias: ``[V]`` 或 ``None``。
        scale: logits 的倍数（Cohere 的 ``logit_scale``，Granite 的 ``1 / logits_scaling``）。
        softcap: ``c * tanh(logits / c)`` 的 c（Gemma 2），``None`` 为不限。
        excluded: ``[E]``，int64，logit 为 ``-inf`` 的 id；``None`` 为没有。
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    excluded: Tensor | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden [..., H]`` 到 ``[..., V]`` 的 float32 logits，不受 autocast 影响。"""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.finish(hidden.float() @ self.weight.float().T)

    def finish(self, product: Tensor) -> Tensor:
        """矩阵乘之后的逐元素部分：bias、scale、softcap，不用的 id 为 ``-inf``。"""
        logits = product if self.bias is None else product + self.bias.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.excluded is not None:
            logits = logits.index_fill(-1, self.excluded, -torch.inf)
        return logits

    def cut(self, vocabulary: Vocabulary) -> Head:
        """只留 ``vocabulary`` 的行（视图，不复制）：其余的没有概率，也没有梯度。"""
        vocabulary = vocabulary.within(len(self.weight))
        limit = vocabulary.limit
        bias = None if self.bias is None else self.bias[:limit]
        excluded = vocabulary.excluded(self.weight.device)
        return Head(self.weight[:limit], bias, self.scale, self.softcap, excluded)


@dataclass(frozen=True)
class HiddenTargets:
    """教师的 hidden state 与它的 head；``[P, V]`` 的 logits 从不整个存在。

    Attributes:
        hidden: ``[P, H_t]``，第 i 行与学生的第 i 行预测同一个 token。
        head: 教师的 head，宽度可与学生不同，词表必须相同。
    """

    hidden: Tensor
    head: Head


@dataclass(frozen=True)
class DenseTargets:
    """教师的完整 logits ``[P, V]``，已经过它的 head 的全部；只宜用于测试与小词表。"""

    logits: Tensor


@dataclass(frozen=True)
class SparseTargets:
    """教师分布的 K 个 token，其余的概率按 ``tail`` 处理。

    ==============  ======================================  ==================  ============
    ``tail``        其余 token                              能用的 divergence   温度
    ==============  ======================================  ==================  ============
    ``renormalise`` 概率为 0，K 个重新归一化                除 reverse_kl 外    任意
    ``bucket``      合成一个结果，概率 ``1 - Σ probs``      全部                1
    ``sampled``     不处理：``probs`` 是无偏的重要性权重    forward_kl          1
    ==============  ======================================  ==================  ============

    ``renormalise`` 之下 p 有零，KL(q||p) 无穷大；另两种只知道 T = 1 时的尾部。``sampled`` 见
    Anshumann et al. 2025，*Sparse Logit Sampling*，arXiv:2503.16870。

    Attributes:
        ids: ``[P, K]``，int64；除 ``sampled`` 外一行之内互不相同。概率为 0 的位置是填充，
            它的 id 也要与同行的其他 id 不同。
        probs: ``[P, K]``，T = 1 的概率；``sampled`` 时是权重 w：``E[Σ_k w_k 1(id_k = v)] = p_v``。
        tail: 尾部的处理方式。
        entropy: ``[P]``，教师完整分布的熵，单位 nat。``sampled`` 必须有它，散度的值才无偏；
            其他方式下只影响报告的熵。
        label_log_prob: ``[P]``，教师给标签的 log 概率，T = 1；没有它，报告的教师交叉熵是 NaN。
        top: ``[P]``，int64，教师最可能的 token；没有它，看 K 个之中概率最大的，``sampled`` 报告的
            top-1 一致率是 NaN。

    Raises:
        ValueError: 形状不合，或 ``sampled`` 没有 ``entropy``。
    """

    ids: Tensor
    probs: Tensor
    tail: Tail
    entropy: Tensor | None = None
    label_log_prob: Tensor | None = None
    top: Tensor | None = None

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.shape != self.probs.shape:
            raise ValueError(
                f"ids {list(self.ids.shape)} and probs {list(self.probs.shape)} must both be [P, K]"
            )
        if self.entropy is None and self.tail == "sampled":
            raise ValueError(
                "sampled targets need entropy [P]: without it forward_kl is known only up "
                "to a constant"
            )
        for name in ("entropy", "label_log_prob", "top"):
            given = getattr(self, name)
            if given is not None and given.shape != self.ids.shape[:1]:
                raise ValueError(f"{name} {list(given.shape)} must be [P] with P={len(self.ids)}")

    def map(self, function: Callable[[Tensor], Tensor]) -> SparseTargets:
        """对每个张量施加 ``function``。"""
        rest = (self.entropy, self.label_log_prob, self.top)
        moved = (None if one is None else function(one) for one in rest)
        return SparseTargets(function(self.ids), function(self.probs), self.tail, *moved)

    def likeliest(self) -> Tensor | None:
        """教师最可能的 token ``[P]``，int64；不知道时是 ``None``。"""
        if self.top is not None or self.tail == "sampled":
            return self.top
        return self.ids.gather(1, self.probs.argmax(-1, keepdim=True))[:, 0]


Targets = HiddenTargets | DenseTargets | SparseTargets
"""教师目标的三种形式；第 i 行与学生的第 i 行预测同一个 token。"""
