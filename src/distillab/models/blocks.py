"""一层 decoder-only Transformer：RMSNorm、RoPE、GQA、SwiGLU；缺省与 Qwen2.5 对齐，别家的另有选项。

一层的数据流（pre-norm）::

    x ─┬─ attention_norm ─ attention ─ (+) ─┬─ ffn_norm ─ ffn ─ (+) ─→
       └──────────────────────────────┘     └──────────────────┘

Gemma 在两个 (+) 之前各多一个 norm（post_norms）。

形状记号：B 批大小，T 本次输入的长度，S = 缓存长度 + T，H = hidden_size，V = vocab_size，
nh 查询头数，nkv 键值头数，hd 每个头的宽度，缺省 H / nh。
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.model_sections import ModelConfig
from .kv_cache import LayerCache

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
"""``ModelConfig.activation`` → 函数。"""


class RMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)``（Zhang & Sennrich 2019，arXiv:1910.07467）。

    与 LayerNorm 相比不减均值、没有偏置。

    Args:
        hidden_size: 最后一维的宽度。
        eps: 防止除零。
        unit_offset: 乘的是 ``1 + weight``，weight 生来为 0（Gemma）。
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6, unit_offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter((torch.zeros if unit_offset else torch.ones)(hidden_size))
        self.eps = eps
        self.unit_offset = unit_offset

    def forward(self, hidden: Tensor) -> Tensor:
        """``hidden: [..., H]`` → 同形状、同 dtype。"""
        offset = self.unit_offset
        weight = 1.0 + self.weight.float() if offset else self.weight
        if hidden.is_cuda and (offset or hidden.dtype == weight.dtype):
            # 一个融合的内核，中间同样是 float32；CPU 上没有，舍入也与 transformers 的不同。
            x = hidden.float() if offset else hidden
            fused = F.rms_norm(x, weight.shape, weight, self.eps)
            return fused.to(hidden.dtype)  # autocast 里它总是 float32 的
        # 平方和在 fp16 里会溢出、在 bf16 里丢精度，所以中间用 float32；先转回原 dtype 再乘
        # weight，Gemma 则相反，都与 transformers 的舍入次序一致。
        x = hidden.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return (x * weight).to(hidden.dtype) if offset else weight * x.to(hidden.dtype)


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """RoPE 的 cos 与 sin（Su et al. 2021，arXiv:2104.09864）。

    位置 m 处第 i 对分量旋转 ``m * theta^(-2i/hd)`` 弧度：i 小转得快，分辨近处；i 大转得慢，
    分辨远处。

    Args:
        positions: ``[B, T]``，整数位置。
        head_dim: hd，偶数。
        theta: 旋转基数。

    Returns:
        ``(cos, sin)``，各 ``[B, 1, T, hd]``，float32，中间一维对所有头广播；sin 的前半取负，见
        ``apply_rotary``。
    """
    # 每次现算而不存成 buffer：buffer 会随 model.to(bfloat16) 一起降精度，位置就乱了。
    exponent = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    return rotation(positions, 1.0 / theta**exponent)


def rotation(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """``rotary_tables``，每对分量一步转几弧度由 ``frequencies: [hd / 2]`` 给出，float32。"""
    angles = positions[..., None].float() * frequencies  # (B, T, hd/2)
    angles = torch.cat((-angles, angles), dim=-1)[:, None]  # (B, 1, T, hd)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """把每个头的前半与后半配对旋转（half-split，与 transformers 的 Qwen2、Llama 相同）。

    论文配对的是相邻分量 ``(x0, x1), (x2, x3), ...``；这里第 i 个与第 i + hd/2 个配对。两者只差
    一次分量重排，但权重是按后者训练的，混用不报错而结果全错。以 hd = 8 为例::

        x        = [ a0 a1 a2 a3 | b0 b1 b2 b3 ]     (a_i, b_i) 是一对，转同一个角度 φ = m·θ_i
        swapped  = [ b0 b1 b2 b3 | a0 a1 a2 a3 ]
        sin      = [ sin(-φ) ... | sin φ ... ]       负号放在表里，不必每层每头取一遍
        x·cos + swapped·sin:  a_i' = a_i cos φ - b_i sin φ
                              b_i' = b_i cos φ + a_i sin φ

    Args:
        x: ``[B, n, T, hd]``。
        cos: ``[B, 1, T, hd]``，float32。
        sin: 同 ``cos``。

    Returns:
        与 ``x`` 同形状、同 dtype。
    """
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return (x * cos + swapped * sin).to(x.dtype)


class GQAAttention(nn.Module):
    """Grouped-query attention（Ainslie et al. 2023，arXiv:2305.13245）。

    nh 个查询头分成 nkv 组，同组共用一对键值头。以 nh = 8、nkv = 2 为例::

        q:  0 1 2 3 | 4 5 6 7
        kv: 0       | 1

    nkv = nh 即 multi-head，nkv = 1 即 multi-query。缺省与 Qwen2.5 一致：q、k、v 有偏置，o 没有。

    Args:
        hidden_size: H。
        num_heads: nh，整除 H。
        num_kv_heads: nkv，整除 nh。
        dropout: 注意力权重的 dropout，只在训练时生效。
        head_dim: hd，缺省 H / nh，这时 nh 要整除 H。
        qkv_bias: q、k、v 有偏置。
        o_bias: o 有偏置。
        qk_norm: q、k 的每个头各过一个 RMSNorm（Qwen3）。
        norm_eps: 它们的 eps。
        unit_offset: 它们的 ``unit_offset``，见 ``RMSNorm``。
        scale: 分数乘的数，缺省 ``hd^-0.5``。
        softcap: 分数收进 ``±softcap``：``softcap * tanh(分数 / softcap)``（Gemma 2）。
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        dropout: float = 0.0,
        *,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        o_bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        unit_offset: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim or hidden_size // num_heads
        self.group_size = num_heads // num_kv_heads
        self.dropout = dropout
        self.scale = scale
        self.softcap = softcap
        width, kv_width = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, width, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, kv_width, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, kv_width, bias=qkv_bias)
        self.o_proj = nn.Linear(width, hidden_size, bias=o_bias)
        self.q_norm = RMSNorm(self.head_dim, norm_eps, unit_offset) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, norm_eps, unit_offset) if qk_norm else None

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
            mask: ``[B, 1, T, S]``，bool，True 为可见，或加在分数上的浮点；``None`` 表示纯因果
                （T = S）或全部可见（T = 1）。
            cache: 这一层的缓存，会被就地更新。

        Returns:
            ``[B, T, H]``。
        """
        batch, length, _ = hidden.shape
        query, key, value = self.heads(hidden, cos, sin)
        if cache is not None:
            key, value = cache.update(key, value)
        if self.softcap is not None:
            output = self._capped(query, key, value, mask)
        else:
            output = self._attended(query, key, value, mask)
        output = output.reshape(batch, -1, length, self.head_dim)  # (B, nh, T, hd)
        output = output.transpose(1, 2).reshape(batch, length, -1)  # (B, T, nh * hd)
        projected: Tensor = self.o_proj(output)
        return projected

    def _attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, _, length, _ = query.shape
        if length == 1:
            # 一步只有一个查询：同组的查询头排成一组查询，键值头就不必复制。
            query = query.reshape(batch, -1, self.group_size, self.head_dim)  # (B, nkv, nh/nkv, hd)
        elif mask is not None and self.group_size > 1:
            # 带 mask 时 CUDA 的快速内核不认 GQA，会退回物化 [B, nh, T, S] 的朴素实现；
            # 复制键值头反而便宜得多。
            key = key.repeat_interleave(self.group_size, dim=1)  # (B, nh, S, hd)
            value = value.repeat_interleave(self.group_size, dim=1)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=length > 1 and mask is None,
            scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def _capped(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """SDPA 不会收分数，只好写出 ``[B, nh, T, S]`` 来（Gemma 2，arXiv:2408.00118，§2）。"""
        assert self.softcap is not None
        groups = torch.unflatten(query, 1, (-1, self.group_size))  # (B, nkv, nh/nkv, T, hd)
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        scores = groups @ key[:, :, None].transpose(-1, -2) * scale  # (B, nkv, nh/nkv, T, S)
        scores = self.softcap * torch.tanh(scores / self.softcap)
        length, total = scores.shape[-2:]
        if mask is None and length > 1:
            mask = scores.new_ones(1, 1, length, total, dtype=torch.bool).tril()
        if mask is not None:
            hidden = ~mask if mask.dtype == torch.bool else mask < 0
            scores = scores.masked_fill(hidden.unsqueeze(-4), -torch.inf)
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
        weights = F.dropout(weights, self.dropout, self.training)
        return (weights @ value[:, :, None]).flatten(1, 2)  # (B, nh, T, hd)

    def heads(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """旋转过的 q 与 k，和 v：``[B, nh 或 nkv, T, hd]``。"""
        shape = (*hidden.shape[:2], -1, self.head_dim)
        query, key = self.q_proj(hidden).view(shape), self.k_proj(hidden).view(shape)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        value = self.v_proj(hidden).view(shape).transpose(1, 2)
        # 先旋转再缓存：RoPE 用绝对位置旋转，内积只剩相对位置，所以旧键不必重转。
        query = apply_rotary(query.transpose(1, 2), cos, sin)
        return query, apply_rotary(key.transpose(1, 2), cos, sin), value


class SwiGLUFFN(nn.Module):
    """``down(silu(gate(x)) * up(x))``（Shazeer 2020，arXiv:2002.05202）。

    比普通 FFN 多一个矩阵：``gate`` 决定 ``up`` 的每个分量放行多少，``silu(z) = z * sigmoid(z)``。

    Args:
        hidden_size: H。
        intermediate_size: 中间宽度 I。
        bias: 三个线性层有没有偏置。
        activation: 见 ``ModelConfig.activation``；``gelu_tanh`` 时就是 GeGLU（Gemma）。
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        bias: bool = False,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, hidden: Tensor) -> Tensor:
        """``hidden: [B, T, H]`` → ``[B, T, H]``，中间为 ``[B, T, I]``。"""
        gate, up = self.gate_proj(hidden), self.up_proj(hidden)
        output: Tensor = self.down_proj(self.activation(gate) * up)
        return output


class TransformerBlock(nn.Module):
    """一层 pre-norm Transformer。

    Args:
        config: 模型结构。
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        norm = partial(RMSNorm, config.hidden_size, config.norm_eps, config.norm_unit_offset)
        scalar = config.query_pre_attn_scalar
        self.attention_norm = norm()
        self.attention = GQAAttention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.dropout,
            head_dim=config.head_width,
            qkv_bias=config.qkv_bias,
            o_bias=config.o_bias,
            qk_norm=config.qk_norm,
            norm_eps=config.norm_eps,
            unit_offset=config.norm_unit_offset,
            scale=None if scalar is None else scalar**-0.5,
            softcap=config.attention_softcap,
        )
        self.ffn_norm = norm()
        self.ffn = SwiGLUFFN(
            config.hidden_size, config.intermediate_size, config.ffn_bias, config.activation
        )
        self.attention_post_norm = norm() if config.post_norms else None
        self.ffn_post_norm = norm() if config.post_norms else None
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
        if self.attention_post_norm is not None:
            attended = self.attention_post_norm(attended)
        hidden = hidden + self.dropout(attended)
        output = self.ffn(self.ffn_norm(hidden))
        if self.ffn_post_norm is not None:
            output = self.ffn_post_norm(output)
        result: Tensor = hidden + self.dropout(output)
        return result
