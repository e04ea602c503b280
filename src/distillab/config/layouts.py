"""``ModelConfig`` 的选项合起来是 transformers 里的哪一家；没有一家有的组合导出不了，是错误。"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

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
