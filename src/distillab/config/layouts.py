"""``ModelConfig`` 的选项合起来是 transformers 里的哪一家；没有一家有的组合导出不了，是错误。

还有其中自成一节的 ``RopeScaling``。
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from .sections import Section


class RopeScaling(Section):
    """RoPE 的频率怎样拉长；键与 transformers 的 ``rope_parameters`` 同名，频率由它来算。"""

    model_config = ConfigDict(frozen=True)

    rope_type: Literal["linear", "llama3", "yarn"] = Field(description="How they are stretched.")
    factor: float = Field(ge=1, description="Stretched this many times.")
    original_max_position_embeddings: int | None = Field(
        None, gt=0, description="Longest sequence before stretching, in tokens."
    )
    low_freq_factor: float | None = Field(None, gt=0, description="llama3: below it, stretched.")
    high_freq_factor: float | None = Field(None, gt=0, description="llama3: above it, kept.")
    attention_factor: float | None = Field(None, gt=0, description="yarn: scale of cos and sin.")
    beta_fast: float | None = Field(None, gt=0, description="yarn: above it, kept.")
    beta_slow: float | None = Field(None, gt=0, description="yarn: below it, stretched.")
    mscale: float | None = Field(None, description="yarn: numerator of the attention factor.")
    mscale_all_dim: float | None = Field(None, description="yarn: its denominator.")
    truncate: bool | None = Field(None, description="yarn: round the limits to whole dimensions.")

    @model_validator(mode="after")
    def _complete(self) -> RopeScaling:
        needed = {
            "linear": (),
            "llama3": (
                "original_max_position_embeddings",
                "low_freq_factor",
                "high_freq_factor",
            ),
            "yarn": ("original_max_position_embeddings",),
        }[self.rope_type]
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ValueError(f"rope_type={self.rope_type} needs {', '.join(missing)}")
        return self


_PLAIN: dict[str, object] = {
    "norm_unit_offset": False,
    "post_norms": False,
    "scaled_embeddings": False,
    "query_pre_attn_scalar": None,
    "attention_softcap": None,
    "logit_softcap": None,
    "rope_local_theta": None,
}
_GEMMA: dict[str, object] = {
    "norm_unit_offset": True,
    "post_norms": True,
    "scaled_embeddings": True,
    "ffn_bias": False,
}
LAYOUTS: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "qwen2": {
            **_PLAIN,
            "qkv_bias": True,
            "o_bias": False,
            "ffn_bias": False,
            "qk_norm": False,
            "head_dim": None,
        },
        "llama": {**_PLAIN, "qk_norm": False, "sliding_window": None},
        "qwen3": {**_PLAIN, "qk_norm": True, "ffn_bias": False},
        "mistral": {
            **_PLAIN,
            "qkv_bias": False,
            "o_bias": False,
            "ffn_bias": False,
            "qk_norm": False,
            "layer_types": None,
        },
        "gemma2": {**_GEMMA, "qk_norm": False, "rope_local_theta": None},
        "gemma3_text": {**_GEMMA, "qk_norm": True, "attention_softcap": None},
    }
)
"""``model_type`` → 它定死的选项；没写的随意。"""

_DIVIDED = ("llama", "gemma2", "gemma3_text")
"""``head_dim`` 另给，``num_heads`` 也要整除 ``hidden_size`` 的几家。"""


def layout_of(options: Mapping[str, Any]) -> str:
    """``ModelConfig`` 的各项 → ``model_type``。

    没有一家是这样则是 ``ValueError``，说出最接近的差在哪里。
    """
    hidden, heads = options["hidden_size"], options["num_heads"]
    if options["o_bias"] and not options["qkv_bias"]:
        raise ValueError("o_bias=True needs qkv_bias=True: no layout has it alone")
    if options["head_dim"] is not None and options["head_dim"] * heads == hidden:
        options = {**options, "head_dim": None}
    differing = {
        layout: {name: value for name, value in fixed.items() if options[name] != value}
        for layout, fixed in LAYOUTS.items()
    }
    layout = min(differing, key=lambda each: len(differing[each]))
    for name, value in differing[layout].items():
        raise ValueError(
            f"{name}={options[name]} does not fit the other options: no layout of transformers has "
            f"them together; {layout}, the nearest, has {name}={value}"
        )
    if layout in _DIVIDED and hidden % heads:
        raise ValueError(
            f"hidden_size={hidden} is not divisible by num_heads={heads}, which {layout} needs "
            "even with head_dim"
        )
    return layout
