"""由 ``blocks.py`` 的各层搭成的语言模型：学生，与权重来自 transformers 的教师。"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config.model_sections import ModelConfig
from ..errors import DistillabError
from ..targets import Head
from .blocks import QWEN2, Layout, RMSNorm, TransformerBlock
from .interface import LanguageModel
from .kv_cache import KVCache
from .static_cache import StaticKVCache, places_of


class Decoder(LanguageModel):
    """Embedding、若干 ``TransformerBlock``、最终归一化与词表投影。

    Args:
        config: 模型结构。
        layout: 别家的层不同在哪里。
        tied: 词表投影与 Embedding 是不是同一个参数。
    """

    block_names = (TransformerBlock.__name__,)

    def __init__(self, config: ModelConfig, layout: Layout = QWEN2, tied: bool = True) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            TransformerBlock(config, layout) for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight

    @abstractmethod
    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """``positions: [B, T]`` → 各层共用的 ``(cos, sin)``，见 ``rotary_tables``。"""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """算到最终归一化为止；词表投影交给 ``head``，由损失决定怎样乘。

        Args:
            input_ids: ``[B, T]``，int64。
            attention_mask: ``[B, past + T]``，1 为真实 token、0 为填充，左右填充皆可；
                ``None`` 表示没有要挡住的，走因果注意力的快速路径。
            cache: 之前的键值，会被就地更新；``None`` 表示不缓存。
            position_ids: ``[B, T]``，一行里有几段文档时各从 0 数起，它们互相看不见；给出它时
                没有 ``attention_mask`` 与 ``cache``。

        Returns:
            ``[B, T, H]``。填充位置上的值没有意义，但不会是 NaN。

        Raises:
            DistillabError: 长度超过 ``max_seq_len``，或 ``attention_mask`` 的形状不对。
        """
        batch, length = input_ids.shape
        past = 0 if cache is None else cache.length
        total = past + length
        if total > self.config.max_seq_len:
            raise DistillabError(
                f"sequence of {total} tokens is longer than max_seq_len={self.config.max_seq_len}: "
                "shorten the input or raise max_seq_len"
            )
        if attention_mask is not None and attention_mask.shape != (batch, total):
            raise DistillabError(
                f"attention_mask has shape {list(attention_mask.shape)}, expected "
                f"[{batch}, {total}] (batch, cached + new tokens)"
            )
        mask: Tensor | None
        places = places_of(cache)
        if places is not None:
            positions, mask = places.step()
        elif position_ids is None:
            positions, mask = _positions_and_mask(input_ids, attention_mask, past)
        else:
            positions, mask = position_ids, _document_mask(position_ids)
        cos, sin = self.rotary(positions)
        hidden: Tensor = self.embedding(input_ids)  # (B, T, H)
        recompute = self.gradient_checkpointing and self.training and cache is None
        for index, block in enumerate(self.layers):
            if recompute:
                hidden = checkpoint(block, hidden, cos, sin, mask, use_reentrant=False)
            else:
                layer_cache = None if cache is None else cache.layers[index]
                hidden = block(hidden, cos, sin, mask, layer_cache)
        normalized: Tensor = self.norm(hidden)
        return normalized

    @property
    def head(self) -> Head:
        """词表投影；绑定时它的权重就是 Embedding 的权重。"""
        return Head(self.lm_head.weight)

    def new_cache(self) -> KVCache:
        """空的 KV cache。"""
        return KVCache(self.config.num_layers)

    def static_cache(self, room: int) -> StaticKVCache:
        """空的、形状固定的 KV cache。"""
        return StaticKVCache(self.config.num_layers, room)

    @property
    def max_seq_len(self) -> int:
        """最长序列，单位 token。"""
        return self.config.max_seq_len

    @property
    def capturable(self) -> bool:
        """有 dropout 时不录：随机数另是一套，断点续训接不上；重算激活要存随机状态，录不下来。"""
        return not (self.config.dropout or self.gradient_checkpointing)

    def enable_activation_checkpointing(self) -> None:
        """训练时不存每层的激活，反向时重算：以约三分之一的计算换显存。"""
        self.gradient_checkpointing = True


def _positions_and_mask(
    input_ids: Tensor, attention_mask: Tensor | None, past: int
) -> tuple[Tensor, Tensor | None]:
    """位置 ``[B 或 1, T]`` 与可见性 ``[B 或 1, 1, T, S]``；能走快速路径时后者为 ``None``。"""
    length, device = input_ids.shape[1], input_ids.device
    steps = torch.arange(past + length, device=device)
    queries = steps[past:, None]  # (T, 1)
    if attention_mask is None:
        positions = steps[None, past:]
        if past == 0 or length == 1:
            return positions, None
        return positions, (steps <= queries)[None, None]
    # 只数真实 token，左填充的句子才从位置 0 开始；减 1 后开头的填充是 -1，收到 0。
    positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
    real = attention_mask.bool()[:, None, None, :]  # (B, 1, 1, S)
    # 左填充的查询看不到任何真实 token，softmax 会得到 NaN：让它们看见自己。
    # 真实 token 本来就看得见自己，不受影响。
    visible = (steps <= queries) & real | (steps == queries)
    return positions, visible  # (B, 1, T, S)


def _document_mask(positions: Tensor) -> Tensor:
    """``positions: [B, T]`` → 可见性 ``[B, 1, T, T]``：同一段文档里在前面的。

    例如位置 0 1 2 0 1 是两段，可见性是对角线上的两个下三角::

        1 . . . .
        1 1 . . .
        1 1 1 . .
        . . . 1 .
        . . . 1 1
    """
    document = (positions == 0).cumsum(-1)  # (B, T)
    same = document[:, None, :, None] == document[:, None, None, :]  # (B, 1, T, T)
    return same.tril()
