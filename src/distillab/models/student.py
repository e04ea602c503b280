"""从零实现的 decoder-only Transformer，结构与 Qwen2.5 对齐，权重可与 transformers 互换。

一层的数据流（pre-norm）::

    x ─┬─ attention_norm ─ attention ─ (+) ─┬─ ffn_norm ─ ffn ─ (+) ─→
       └──────────────────────────────┘     └──────────────────┘

形状记号：B 批大小，T 本次输入的长度，S = 缓存长度 + T，H = hidden_size，V = vocab_size，
nh 查询头数，nkv 键值头数，hd = H / nh 每个头的宽度。
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config.schema import ModelConfig
from ..errors import DistillabError
from ..targets import Head
from .interface import LanguageModel
from .kv_cache import KVCache, LayerCache


class RMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)``（Zhang & Sennrich 2019，arXiv:1910.07467）。

    与 LayerNorm 相比不减均值、没有偏置。

    Args:
        hidden_size: 最后一维的宽度。
        eps: 防止除零。
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """``hidden: [..., H]`` → 同形状、同 dtype。"""
        # 平方和在 fp16 里会溢出、在 bf16 里丢精度，所以中间用 float32；先转回原 dtype 再乘
        # weight，与 transformers 的舍入次序一致。
        x = hidden.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(hidden.dtype)


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """RoPE 的 cos 与 sin（Su et al. 2021，arXiv:2104.09864）。

    位置 m 处第 i 对分量旋转 ``m * theta^(-2i/hd)`` 弧度：i 小转得快，分辨近处；i 大转得慢，
    分辨远处。

    Args:
        positions: ``[B, T]``，整数位置。
        head_dim: hd，偶数。
        theta: 旋转基数。

    Returns:
        ``(cos, sin)``，各 ``[B, 1, T, hd]``，float32，中间一维对所有头广播。
    """
    # 每次现算而不存成 buffer：buffer 会随 model.to(bfloat16) 一起降精度，位置就乱了。
    exponent = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions[..., None].float() * (1.0 / theta**exponent)  # (B, T, hd/2)
    angles = torch.cat((angles, angles), dim=-1)[:, None]  # (B, 1, T, hd)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """把每个头的前半与后半配对旋转（half-split，与 transformers 的 Qwen2、Llama 相同）。

    论文配对的是相邻分量 ``(x0, x1), (x2, x3), ...``；这里第 i 个与第 i + hd/2 个配对。两者只差
    一次分量重排，但权重是按后者训练的，混用不报错而结果全错。以 hd = 8 为例::

        x        = [ a0 a1 a2 a3 | b0 b1 b2 b3 ]     (a_i, b_i) 是一对，转同一个角度 m·θ_i
        rotated  = [-b0 -b1 -b2 -b3 | a0 a1 a2 a3 ]
        x·cos + rotated·sin:  a_i' = a_i cos - b_i sin
                              b_i' = b_i cos + a_i sin

    Args:
        x: ``[B, n, T, hd]``。
        cos: ``[B, 1, T, hd]``，float32。
        sin: 同 ``cos``。

    Returns:
        与 ``x`` 同形状、同 dtype。
    """
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (x * cos + rotated * sin).to(x.dtype)


class GQAAttention(nn.Module):
    """Grouped-query attention（Ainslie et al. 2023，arXiv:2305.13245）。

    nh 个查询头分成 nkv 组，同组共用一对键值头。以 nh = 8、nkv = 2 为例::

        q:  0 1 2 3 | 4 5 6 7
        kv: 0       | 1

    nkv = nh 即 multi-head，nkv = 1 即 multi-query。与 Qwen2.5 一致：q、k、v 有偏置，o 没有。

    Args:
        hidden_size: H。
        num_heads: nh，整除 H。
        num_kv_heads: nkv，整除 nh。
        dropout: 注意力权重的 dropout，只在训练时生效。
    """

    def __init__(
        self, hidden_size: int, num_heads: int, num_kv_heads: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.head_dim = hidden_size // num_heads
        self.group_size = num_heads // num_kv_heads
        self.dropout = dropout
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=True)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=True)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=True)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, bias=False)

    def forward(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """因果自注意力。

        Args:
            hidden: ``[B, T, H]``。
            cos: ``[B, 1, T, hd]``，见 ``rotary_tables``。
            sin: 同 ``cos``。
            mask: ``[B, 1, T, S]``，bool，True 为可见；``None`` 表示纯因果（T = S）或全部
                可见（T = 1）。
            cache: 这一层的缓存，会被就地更新。

        Returns:
            ``[B, T, H]``。
        """
        batch, length, _ = hidden.shape
        shape = (batch, length, -1, self.head_dim)
        query = self.q_proj(hidden).view(shape).transpose(1, 2)  # (B, nh, T, hd)
        key = self.k_proj(hidden).view(shape).transpose(1, 2)  # (B, nkv, T, hd)
        value = self.v_proj(hidden).view(shape).transpose(1, 2)  # (B, nkv, T, hd)
        # 先旋转再缓存：RoPE 用绝对位置旋转，内积只剩相对位置，所以旧键不必重转。
        query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        if cache is not None:
            key, value = cache.update(key, value)
        if length == 1:
            # 一步只有一个查询：同组的查询头排成一组查询，键值头就不必复制。
            query = query.reshape(batch, -1, self.group_size, self.head_dim)  # (B, nkv, nh/nkv, hd)
        elif mask is not None and self.group_size > 1:
            # 带 mask 时 CUDA 的快速内核不认 GQA，会退回物化 [B, nh, T, S] 的朴素实现；
            # 复制键值头反而便宜得多。
            key = key.repeat_interleave(self.group_size, dim=1)  # (B, nh, S, hd)
            value = value.repeat_interleave(self.group_size, dim=1)
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=length > 1 and mask is None,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        output = output.reshape(batch, -1, length, self.head_dim)  # (B, nh, T, hd)
        output = output.transpose(1, 2).reshape(batch, length, -1)  # (B, T, nh * hd)
        projected: Tensor = self.o_proj(output)
        return projected


class SwiGLUFFN(nn.Module):
    """``down(silu(gate(x)) * up(x))``（Shazeer 2020，arXiv:2002.05202）。

    比普通 FFN 多一个矩阵：``gate`` 决定 ``up`` 的每个分量放行多少，``silu(z) = z * sigmoid(z)``。

    Args:
        hidden_size: H。
        intermediate_size: 中间宽度 I。
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """``hidden: [B, T, H]`` → ``[B, T, H]``，中间为 ``[B, T, I]``。"""
        output: Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return output


class TransformerBlock(nn.Module):
    """一层 pre-norm Transformer。

    Args:
        config: 模型结构。
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = GQAAttention(
            config.hidden_size, config.num_heads, config.num_kv_heads, config.dropout
        )
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn = SwiGLUFFN(config.hidden_size, config.intermediate_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """参数同 ``GQAAttention.forward``；``[B, T, H]`` → ``[B, T, H]``。"""
        attended = self.attention(self.attention_norm(hidden), cos, sin, mask, cache)
        hidden = hidden + self.dropout(attended)
        output: Tensor = hidden + self.dropout(self.ffn(self.ffn_norm(hidden)))
        return output


class StudentModel(LanguageModel):
    """学生模型：Embedding、若干 ``TransformerBlock``、最终归一化，词表投影与 Embedding 绑定。

    Args:
        config: 模型结构。默认配置共 123,426,304 个参数。
    """

    block_names = (TransformerBlock.__name__,)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.weight = self.embedding.weight
        self.apply(_init_weights)

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
                ``None`` 表示没有填充，走因果注意力的快速路径。
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
        if position_ids is None:
            positions, mask = _positions_and_mask(input_ids, attention_mask, past)
        else:
            positions, mask = position_ids, _document_mask(position_ids)
        cos, sin = rotary_tables(positions, self.config.head_dim, self.config.rope_theta)
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
        """词表投影，权重就是 Embedding 的权重。"""
        return Head(self.lm_head.weight)

    def new_cache(self) -> KVCache:
        """空的 KV cache。"""
        return KVCache(self.config.num_layers)

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


def _init_weights(module: nn.Module) -> None:
    """权重 N(0, 0.02)，偏置 0；RMSNorm 生来为 1。"""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
