"""``Decoder`` 的参数与设置，在 Hugging Face 的 Qwen、Llama、Gemma 各家里叫什么。"""

from __future__ import annotations

from collections.abc import Sequence

_BLOCK_NAMES = {
    "attention_norm": "input_layernorm",
    "attention": "self_attn",
    "ffn_norm": "post_attention_layernorm",
    "ffn": "mlp",
}
_TOP_NAMES = {"embedding": "embed_tokens", "norm": "norm"}
CONFIG_NAMES = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}
"""``ModelConfig`` 的字段 → 各家的配置里同样含义的字段。"""


_GEMMA_BLOCK_NAMES = {
    **_BLOCK_NAMES,
    "attention_post_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
}
"""有 ``post_norms`` 时；``post_attention_layernorm`` 在两处不是同一样东西。"""


def hf_name(name: str, layers: Sequence[int], post_norms: bool = False) -> str:
    """``Decoder`` 的参数名 → 对方的；``layers[i]`` 是第 i 层在对方那里的层号。"""
    head, *rest = name.split(".")
    if head == "lm_head":
        return name
    if head != "layers":
        return f"model.{_TOP_NAMES[head]}.{'.'.join(rest)}"
    index, module, *tail = rest
    block = (_GEMMA_BLOCK_NAMES if post_norms else _BLOCK_NAMES)[module]
    return f"model.layers.{layers[int(index)]}.{block}.{'.'.join(tail)}"
