"""一步训练要多少内存与多少次浮点运算：全由形状算出，不加载模型，不导入 torch。

只算说得清出处的部分；分配器的碎片、CUDA context、库自己的缓冲区不在内。
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from .config import ModelConfig

BYTES = MappingProxyType({"fp32": 4, "bf16": 2, "fp16": 2})
"""每个数的字节数。"""

LOSS_BUFFERS = MappingProxyType({"cpu": 160 * 2**20, "cuda": 512 * 2**20})
"""损失分块的缓冲区至多这么大，与 ``fused.BUDGET_BYTES`` 相同。"""


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

    def activations(self, precision: str) -> int:
        """一层为一个 token 留给反向的字节数。

        RMSNorm 在 float32 里算，其余是计算精度。autocast 为每个 Linear 各转换一次输入，所以半精度时
        q、k、v 的输入有三份，gate、up 的有两份。
        """
        h, q, kv, i = self.hidden_size, self.query_size, self.kv_size, self.intermediate_size
        norms = 2 * 2 * h * 4  # 两个 norm 各留输入与归一化后的
        inputs = 2 * h if precision == "fp32" else 5 * h
        attention = 2 * q + 2 * kv  # q、k、v，输出也是 o 的输入
        gates = 4 * i  # gate、silu(gate)、up、它们的积
        log_sums = self.num_heads * 4
        return norms + (inputs + attention + gates) * BYTES[precision] + log_sums


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


@dataclass(frozen=True)
class Step:
    """一步训练里，一个进程上的一个 micro-batch。

    Attributes:
        student: 学生，参数为 float32。
        teacher: 教师；``None`` 是没有，或与 LoRA 学生是同一个模型。
        tokens: 学生读的 token 数，``B * T``。
        rows: response token 数 P；缺省与 ``tokens`` 相同。
        teacher_tokens: 教师读的 token 数；缺省与 ``tokens`` 相同。
        precision: 学生的计算精度。
        teacher_precision: 教师权重与计算的精度。
        checkpointing: 反向时重算各层。
        shards: 学生的权重、梯度、optimizer 状态分到几个进程（ZeRO-3、FSDP2）。
        lora_rank: 只训练秩为 r 的 adapter；基座不再有梯度，也可以是半精度。
        base_precision: LoRA 时基座的精度。
    """

    student: Shape
    teacher: Shape | None
    tokens: int
    rows: int | None = None
    teacher_tokens: int | None = None
    precision: str = "fp32"
    teacher_precision: str = "fp32"
    checkpointing: bool = False
    shards: int = 1
    lora_rank: int | None = None
    base_precision: str = "fp32"

    @property
    def trained(self) -> int:
        """训练的参数个数；LoRA 时是全部线性层上的 adapter。"""
        if self.lora_rank is None:
            return self.student.parameters
        h, q, kv, i = (
            self.student.hidden_size, self.student.query_size,
            self.student.kv_size, self.student.intermediate_size,
        )  # fmt: skip
        widths = 2 * (h + q) + 2 * (h + kv) + 3 * (h + i)  # q、o，k、v，gate、up、down
        return self.lora_rank * widths * self.student.num_layers

    def memory(self, device: str = "cuda") -> dict[str, int]:
        """一个进程上各部分的峰值，单位字节；各部分的峰值不在同一刻，总和因而是上界。

        Args:
            device: ``cpu`` 或 ``cuda``，只影响损失的缓冲区。

        Returns:
            部分的名字 -> 字节数。
        """
        student, teacher = self.student, self.teacher
        trained = self.trained
        own = trained * 4
        if self.lora_rank is not None:
            own += student.parameters * BYTES[self.base_precision]
        compute = BYTES[self.precision]
        largest = max(student.head_parameters, student.block_matmuls)
        kept = student.activations(self.precision)
        layers = kept * student.num_layers
        if self.checkpointing:  # 每层只留输入，外加正在重算的一层
            layers = student.hidden_size * 4 * student.num_layers + kept
        found = {
            "student weights": own // self.shards,
            "gradients": trained * 4 // self.shards,
            "optimizer": trained * 8 // self.shards,
            "student activations": layers * self.tokens,
            "loss": LOSS_BUFFERS[device] + 2 * student.hidden_size * 4 * (self.rows or self.tokens),
        }
        if self.shards > 1:  # 用到的一层要先收齐
            found["gathered weights"] = largest * 4
        if self.precision != "fp32" and self.lora_rank is None:
            # autocast 在一次前向里缓存每个权重的半精度副本；分片时只有收齐的那一层。
            cast = largest if self.shards > 1 else student.num_layers * student.block_matmuls
            found["autocast weights"] = cast * compute
        if teacher is not None:
            found["teacher weights"] = teacher.parameters * BYTES[self.teacher_precision]
        if reader := teacher or (student if self.lora_rank is not None else None):
            widest = 3 * reader.hidden_size + 3 * reader.intermediate_size
            size = BYTES[self.teacher_precision]
            found["teacher forward"] = widest * size * (
                self.teacher_tokens or self.tokens
            ) + reader.hidden_size * size * (self.rows or self.tokens)
        return found

    def dense_logits(self) -> int:
        """若把两个模型的 logits 以 float32 整个放下要多少字节；distillab 从不这样做。"""
        both = self.student.vocab_size + (self.teacher.vocab_size if self.teacher else 0)
        return both * (self.rows or self.tokens) * 4

    def operations(self, seq_len: int) -> dict[str, float]:
        """一步的浮点运算次数（乘与加各算一次）。

        矩阵乘：前向每个参数每个 token 2 次，反向 4 次；因果注意力只算下三角。

        Args:
            seq_len: 每条序列的长度 T。

        Returns:
            ``student``、``teacher`` 两个模型体，与 ``heads``。
        """
        rows = self.rows or self.tokens

        def body(shape: Shape, tokens: int) -> float:
            attention = 2 * seq_len * shape.query_size  # QK^T 与 AV，各 T/2 个键
            return 2.0 * tokens * shape.num_layers * (shape.block_matmuls + attention / 2)

        found = {
            "student": body(self.student, self.tokens) * (4 if self.checkpointing else 3),
            "heads": 2.0 * rows * self.student.head_parameters * 3,
        }
        if self.teacher is not None:
            found["teacher"] = body(self.teacher, self.teacher_tokens or self.tokens)
            found["heads"] += 2.0 * rows * self.teacher.head_parameters
        return found
