"""由 ``blocks.py`` 的各层搭成的语言模型：学生，与权重来自 transformers 的教师。"""

from __future__ import annotations

import functools
from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config.model_sections import ModelConfig
from ..errors import DistillabError
from ..targets import Head
from .blocks import RMSNorm, TransformerBlock
from .interface import LanguageModel
from .kv_cache import KVCache
from .static_cache import StaticKVCache, places_of


class Decoder(LanguageModel):
    """Embedding、若干 ``TransformerBlock``、最终归一化与词表投影。

    Args:
        config: 模型结构。
    """

    block_names = (TransformerBlock.__name__,)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, config.norm_unit_offset)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embedding.weight

    @abstractmethod
    def rotary(self, positions: Tensor, *, local: bool = False) -> tuple[Tensor, Tensor]:
        """``positions: [B, T]`` → ``(cos, sin)``，见 ``rotary_tables``。

        各层共用；``local`` 是基数为 ``rope_local_theta`` 的，滑动窗口的各层用它。
        """

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
        places, window = places_of(cache), self.config.sliding_window
        if places is not None:
            positions, mask = places.step()
            local: Tensor | None = mask if window is None else places.recent(mask, window)
        else:
            if position_ids is None:
                keys, mask = _positions_and_mask(input_ids, attention_mask, past)
            else:
                keys, mask = position_ids, _document_mask(position_ids)
            positions = keys[:, -length:]
            local = mask
            if window is not None and total > window:
                local = _recent(positions, keys, mask, window)
        tables = self.rotary(positions)
        full, sliding = (*tables, mask), (*tables, local)
        if self.config.rope_local_theta is not None:
            sliding = (*self.rotary(positions, local=True), local)
        hidden: Tensor = self.embedding(input_ids)  # (B, T, H)
        if self.config.scaled_embeddings:
            hidden = hidden * _root(self.config.hidden_size, self.embedding.weight.dtype)
        recompute = self.gradient_checkpointing and self.training and cache is None
        for index, block in enumerate(self.layers):
            reach = sliding if self.config.slides(index) else full
            if recompute:
                hidden = checkpoint(block, hidden, *reach, use_reentrant=False)
            else:
                layer_cache = None if cache is None else cache.layers[index]
                hidden = block(hidden, *reach, layer_cache)
        normalized: Tensor = self.norm(hidden)
        return normalized

    @property
    def head(self) -> Head:
        """词表投影；绑定时它的权重就是 Embedding 的权重。"""
        return Head(self.lm_head.weight, softcap=self.config.logit_softcap)

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
    """连同缓存的位置 ``[B 或 1, S]``，可见性 ``[B 或 1, 1, T, S]``；快速路径的后者是 ``None``。"""
    length, device = input_ids.shape[1], input_ids.device
    steps = torch.arange(past + length, device=device)
    queries = steps[past:, None]  # (T, 1)
    if attention_mask is None:
        if past == 0 or length == 1:
            return steps[None], None
        return steps[None], (steps <= queries)[None, None]
    # 只数真实 token，左填充的句子才从位置 0 开始；减 1 后开头的填充是 -1，收到 0。
    positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    real = attention_mask.bool()[:, None, None, :]  # (B, 1, 1, S)
    # 左填充的查询看不到任何真实 token，softmax 会得到 NaN：让它们看见自己。
    # 真实 token 本来就看得见自己，不受影响。
    visible = (steps <= queries) & real | (steps == queries)
    return positions, visible  # (B, 1, T, S)


def _recent(positions: Tensor, keys: Tensor, mask: Tensor | None, window: int) -> Tensor:
    """``mask`` 里只留最近 ``window`` 个 token 的，连同自己：``[B 或 1, 1, T, S]``。

    数的是位置 ``[B, T]`` 与 ``[B, S]`` 的差，夹在中间的填充不算；``mask`` 为 ``None`` 即因果。
    """
    distance = positions[:, None, :, None] - keys[:, None, None, :]
    return (distance < window) & ((distance >= 0) if mask is None else mask)


@functools.cache
def _root(size: int, dtype: torch.dtype) -> float:
    """``size`` 的平方根，先舍入到 ``dtype``，与 transformers 相同。"""
    return float(torch.tensor(size**0.5, dtype=dtype))


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
