"""decoder 的形状：由它算出参数、留给反向的激活值与浮点运算，不加载模型，不导入 torch。"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..config.schema import ModelConfig

BYTES = MappingProxyType({"fp32": 4, "bf16": 2, "fp16": 2})
"""每个数的字节数。"""


@dataclass(frozen=True)
class Shape:
    """Qwen2 / Qwen3 / Llama 一类 decoder 的形状。

    Attributes:
        hidden_size: H。
        num_layers: 层数。
        num_heads: 查询头数。
        num_kv_heads: 键值头数。
        head_dim: 每个头的宽度。
        intermediate_size: SwiGLU 的中间宽度 I。
        vocab_size: V。
        tied: 输出层与 embedding 共用权重。
        qkv_bias: q、k、v 有偏置（Qwen2）。
        qk_norm: q、k 各有一个 RMSNorm（Qwen3）。
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False

    @classmethod
    def of(cls, config: ModelConfig) -> Shape:
        """``StudentModel(config)`` 的形状。"""
        return cls(
            config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads,
            config.head_dim, config.intermediate_size, config.vocab_size, qkv_bias=True,
        )  # fmt: skip

    @property
    def query_size(self) -> int:
        """全部查询头的宽度。"""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """全部键（或值）头的宽度。"""
        return self.num_kv_heads * self.head_dim

    @property
    def block_matmuls(self) -> int:
        """一层里参与矩阵乘的参数。"""
        attention = self.hidden_size * 2 * (self.query_size + self.kv_size)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def head_parameters(self) -> int:
        """输出层 ``[V, H]`` 的参数。"""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """全部参数，绑定的只数一次。"""
        block = self.block_matmuls + 2 * self.hidden_size
        block += (self.query_size + 2 * self.kv_size) * self.qkv_bias
        block += 2 * self.head_dim * self.qk_norm
        ends = self.head_parameters * (1 if self.tied else 2) + self.hidden_size
        return self.num_layers * block + ends

    def activations(
        self,
        precision: str,
        *,
        masked: int = 0,
        lora_rank: int | None = None,
    ) -> int:
        """一层为一个 token 留给反向的字节数。

        RMSNorm 在 float32 里算，其余是计算精度。autocast 为每个 Linear 各转换一次输入，所以半精度时
        q、k、v 的输入有三份，gate、up 的有两份。冻结的 RMSNorm 不必留归一化后的。

        Args:
            precision: 计算精度。
            masked: 有 padding 时的序列长度 T：每层各留一份转成数的 mask，键值头也复制到与查询头一样
                多；0 是没有 mask。
            lora_rank: 只训练秩为 r 的 adapter。
        """
        h, q, kv, i = self.hidden_size, self.query_size, self.kv_size, self.intermediate_size
        size = BYTES[precision]
        norms = 2 * (2 if lora_rank is None else 1) * h * 4  # 两个 norm 各留输入与归一化后的
        inputs = 2 * h if precision == "fp32" else 5 * h
        attention = 2 * q + 2 * (q if masked else kv)  # q、k、v，输出也是 o 的输入
        gates = 4 * i  # gate、silu(gate)、up、它们的积
        log_sums = self.num_heads * 4
        heads = (q + kv) * (4 + size) * self.qk_norm  # q、k 各自归一化之前与之后
        adapters = 7 * (lora_rank or 0) * size
        kept = (inputs + attention + gates + masked) * size
        return norms + kept + log_sums + heads + adapters


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "SmolLM2-135M": Shape(576, 30, 9, 3, 64, 1536, 49152),
        "Qwen2.5-0.5B": Shape(896, 24, 14, 2, 64, 4864, 151936, qkv_bias=True),
        "Qwen3-0.6B": Shape(1024, 28, 16, 8, 128, 3072, 151936, qk_norm=True),
        "Qwen3-4B": Shape(2560, 36, 32, 8, 128, 9728, 151936, qk_norm=True),
        "Qwen3-8B": Shape(4096, 36, 32, 8, 128, 12288, 151936, tied=False, qk_norm=True),
    }
)
"""配方里用到的模型。"""


def forward_operations(shape: Shape, tokens: int, seq_len: int) -> float:
    """模型体一次前向的浮点运算。

    Args:
        shape: 模型。
        tokens: 全部 token。
        seq_len: 每条序列的长度；因果注意力平均看一半。
    """
    attention = 2 * seq_len * shape.query_size  # QK^T 与 AV，各 T/2 个键
    return 2.0 * tokens * shape.num_layers * (shape.block_matmuls + attention / 2)
