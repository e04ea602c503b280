"""Hugging Face 的 Qwen2 与 Llama 的设置译成 ``ModelConfig``。

Qwen2 与 Llama 之外的结构、``StudentModel`` 表达不了的设置一律拒绝，而不是悄悄给出不同的 logits。
"""

from __future__ import annotations

from typing import Any

from ..config.model_sections import ModelConfig
from ..errors import DistillabError
from ..models.hf_names import CONFIG_NAMES

REMEDY = "use student.path to train it as a pretrained model"
"""错误信息的结尾：``StudentModel`` 不行，还可以怎样。"""


def config_from_hf(hf_config: Any) -> ModelConfig:
    """Qwen2 或 Llama 的配置译成等价的 ``ModelConfig``；表达不了的设置是错误。"""
    _refuse_unsupported(hf_config)
    values = {ours: getattr(hf_config, theirs) for ours, theirs in CONFIG_NAMES.items()}
    values["rope_theta"] = hf_config.rope_parameters["rope_theta"]
    return ModelConfig(**values)


def _refuse_unsupported(hf_config: Any) -> None:
    """逐项核对 ``StudentModel`` 写死的假设。"""
    if hf_config.model_type not in ("qwen2", "llama"):
        raise DistillabError(
            f"model_type={hf_config.model_type}, expected qwen2 or llama: {REMEDY}"
        )
    rope = hf_config.rope_parameters or {}
    heads = hf_config.num_attention_heads
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
    sliding = "sliding_attention" in (getattr(hf_config, "layer_types", None) or ())
    found_and_expected = {
        "tie_word_embeddings": (hf_config.tie_word_embeddings, True),
        "rope_type": (rope.get("rope_type", "default"), "default"),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), 1.0),
        "head_dim * num_attention_heads": (head_dim * heads, hf_config.hidden_size),
        "hidden_act": (hf_config.hidden_act, "silu"),
        "use_sliding_window": (sliding, False),
        "mlp_bias": (getattr(hf_config, "mlp_bias", False), False),
    }
    for field, (found, expected) in found_and_expected.items():
        if found != expected:
            raise DistillabError(f"{field}={found}, expected {expected}: {REMEDY}")
