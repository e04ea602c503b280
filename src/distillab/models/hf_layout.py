"""Hugging Face 的 Qwen、Llama、Mistral、Gemma 的设置与 ``ModelConfig`` 互译。

别的结构、``ModelConfig`` 里没有的设置一律拒绝，而不是悄悄给出不同的 logits。
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ..config.layouts import LAYOUTS, RopeScaling
from ..config.model_sections import ModelConfig
from ..errors import DistillabError
from .hf_names import CONFIG_NAMES
from .rope import rope_parameters

REMEDY = "use student.path to train it as a pretrained model"
"""错误信息的结尾：``StudentModel`` 不行，还可以怎样。"""

_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_GEMMA = ("gemma2", "gemma3_text")
_GEMMA_OPTIONS = {
    "query_pre_attn_scalar": "query_pre_attn_scalar",
    "attention_softcap": "attn_logit_softcapping",
    "logit_softcap": "final_logit_softcapping",
}
_FULL, _SLIDING = "full_attention", "sliding_attention"

# ---------------------------------------------------------------- 导入


def config_from_hf(hf_config: Any) -> ModelConfig:
    """等价的 ``ModelConfig``；表达不了的设置是 ``DistillabError``。"""
    kind = hf_config.model_type
    if kind not in LAYOUTS:
        *names, last = LAYOUTS
        raise _unsupported("model_type", kind, f"{', '.join(names)} or {last}")
    values = {ours: getattr(hf_config, theirs) for ours, theirs in CONFIG_NAMES.items()}
    head_dim = getattr(hf_config, "head_dim", None)
    if head_dim != values["hidden_size"] / values["num_heads"]:
        values["head_dim"] = head_dim
    bias = kind == "qwen2" or bool(getattr(hf_config, "attention_bias", False))
    values |= {
        "tie_embeddings": hf_config.tie_word_embeddings,
        "activation": _activation(hf_config),
        "qkv_bias": bias,
        "o_bias": bias and kind != "qwen2",
        "ffn_bias": bool(getattr(hf_config, "mlp_bias", False)),
        **{name: value for name, value in LAYOUTS[kind].items() if value is True},
        **_windows(hf_config),
    }
    values |= _rotary(hf_config, values["sliding_window"] is not None)
    if kind in _GEMMA:
        values |= {ours: getattr(hf_config, theirs) for ours, theirs in _GEMMA_OPTIONS.items()}
    _refuse("use_bidirectional_attention", hf_config, (None, False))
    _refuse("quantization_config", hf_config, (None,))
    if kind == "gemma3_text":
        _refuse("attn_logit_softcapping", hf_config, (None,))  # transformers 读了却不用
    try:
        return ModelConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        what = first["msg"].removeprefix("Value error, ")
        raise DistillabError(f"{f'{where}: ' if where else ''}{what}; {REMEDY}") from None


def _unsupported(field: str, found: object, expected: object) -> DistillabError:
    return DistillabError(f"{field}={found}, expected {expected}: {REMEDY}")


def _refuse(field: str, hf_config: Any, allowed: tuple[object, ...]) -> None:
    found = getattr(hf_config, field, None)
    if found not in allowed:
        raise _unsupported(field, found, allowed[-1])


def _activation(hf_config: Any) -> str:
    field = "hidden_activation" if hf_config.model_type in _GEMMA else "hidden_act"
    found = getattr(hf_config, field) or "gelu_pytorch_tanh"
    if found not in _ACTIVATIONS:
        raise _unsupported(field, found, " or ".join(_ACTIVATIONS))
    return _ACTIVATIONS[found]


def _windows(hf_config: Any) -> dict[str, Any]:
    """``sliding_window`` 与 ``layer_types``；没有一层是滑动窗口就都是 ``None``。"""
    if hf_config.model_type == "llama":
        return {"sliding_window": None, "layer_types": None}
    window = getattr(hf_config, "sliding_window", None)
    types = list(getattr(hf_config, "layer_types", None) or ())
    if hf_config.model_type == "mistral":
        types = []  # 它不看
    for kind in types:
        if kind not in (_FULL, _SLIDING):
            raise _unsupported("layer_types", kind, f"{_FULL} or {_SLIDING}")
    if types and _SLIDING not in types:
        window = None
    return {"sliding_window": window, "layer_types": types if window and types else None}


def _rotary(hf_config: Any, slides: bool) -> dict[str, Any]:
    """``rope_theta``、``rope_scaling`` 与 ``rope_local_theta``。"""
    own = hf_config.rope_parameters or {}
    full = own.get(_FULL, own)
    values: dict[str, Any] = {"rope_theta": full["rope_theta"], "rope_scaling": _scaling(full)}
    local = own.get(_SLIDING, full)
    if slides and local != full:
        if _scaling(local) is not None:
            raise _unsupported(f"{_SLIDING}.rope_type", local["rope_type"], "default")
        values["rope_local_theta"] = local["rope_theta"]
    return values


def _scaling(parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = parameters.get("rope_type", "default")
    partial = parameters.get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise _unsupported("partial_rotary_factor", partial, 1.0)
    if kind == "default":
        return None
    known = ("linear", "llama3", "yarn")
    if kind not in known:
        raise _unsupported("rope_type", kind, f"default, {', '.join(known)}")
    return {
        name: parameters[name]
        for name in RopeScaling.model_fields
        if parameters.get(name) is not None
    }


# ---------------------------------------------------------------- 导出


def hf_config_of(config: ModelConfig, layout: str, **values: Any) -> Any:
    """``layout`` 的配置，说的是与 ``config`` 同样的模型；``values`` 是其余的设置。"""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    cls = CONFIG_MAPPING[layout]
    activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    gemma = layout in _GEMMA
    values |= {theirs: getattr(config, ours) for ours, theirs in CONFIG_NAMES.items()}
    values |= {
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING[cls].__name__],
        "rope_parameters": rope_parameters(config),
        "attention_dropout": config.dropout,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_activation" if gemma else "hidden_act": activations[config.activation],
    }
    if layout != "qwen2":
        values["head_dim"] = config.head_width
    if layout not in ("qwen2", "mistral"):
        values["attention_bias"] = config.qkv_bias
    if layout == "llama":
        values["mlp_bias"] = config.ffn_bias
    else:
        values["sliding_window"] = config.sliding_window
    if layout not in ("llama", "mistral"):
        slides = [config.slides(layer) for layer in range(config.num_layers)]
        values["layer_types"] = [_SLIDING if each else _FULL for each in slides]
        if not gemma:
            values["use_sliding_window"] = any(slides)
    if gemma:  # 没有滑动的层，transformers 也要建它的 mask
        values["sliding_window"] = config.sliding_window or config.max_seq_len
        values |= {theirs: getattr(config, ours) for ours, theirs in _GEMMA_OPTIONS.items()}
        values["query_pre_attn_scalar"] = config.query_pre_attn_scalar or config.head_width
    if layout == "gemma3_text":
        full = values["rope_parameters"]
        theta = config.rope_local_theta
        local = full if theta is None else {"rope_type": "default", "rope_theta": theta}
        values["rope_parameters"] = {_FULL: full, _SLIDING: dict(local)}
    return cls(**values)
