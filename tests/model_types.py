"""各种结构的小模型，只有随机的权重，没有 tokenizer：几毫秒一个。"""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCAB = 400

_MOE = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
_LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
_DELTA = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256},
    "gpt_neox": {},
    "bloom": {"n_layer": 4, "n_head": 4},
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 48},
    "phi3": {},
    "olmo2": {},
    "glm4": {"head_dim": 8},
    "mistral": {"sliding_window": 8, "head_dim": 8},
    "gemma2": {**_WINDOWS, "head_dim": 8, "final_logit_softcapping": 3.0},
    "gemma3_text": {**_WINDOWS, "head_dim": 8},
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"logit_scale": 0.0625, **_WINDOWS},
    "granite": {"logits_scaling": 8.0},
    "hyperclovax": {"logits_scaling": 0.25, "head_dim": 8},
    "minicpm3": _LATENT,
    "deepseek_v3": {
        **_LATENT,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "mixtral": {**_MOE, "head_dim": 8},
    "qwen3_moe": {**_MOE, "head_dim": 8},
    "gpt_oss": {**_WINDOWS, **_MOE, "head_dim": 8},
    "llama4_text": {**_MOE, "intermediate_size_mlp": 48, "head_dim": 8},
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8, "chunk_size": 8},
    "jamba": {
        **_MOE,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "bamba": {**_SSM, "attn_layer_indices": [1, 3]},
    "falcon_h1": {**_SSM, "mamba_d_ssm": 64, "lm_head_multiplier": 0.25, "head_dim": 8},
    "nemotron_h": {
        "hybrid_override_pattern": "M*M-",
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "head_dim": 8,
    },
    "lfm2": {
        "layer_types": ["conv", "full_attention"] * 2,
        "block_auto_adjust_ff_dim": False,
    },
    "qwen3_next": {**_DELTA, **_MOE, "shared_expert_intermediate_size": 16, "head_dim": 8},
    "recurrent_gemma": {
        "head_dim": 8,
        "lru_width": 32,
        "attention_window_size": 8,
        "logits_soft_cap": 3.0,
    },
    "rwkv": {"attention_hidden_size": 32, "context_length": 256},
    "openai-gpt": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256},
    "bert": {"is_decoder": True},
    "modernbert-decoder": {},
    "xlnet": {"d_model": 32, "n_layer": 4, "n_head": 4, "d_inner": 48},
}
"""结构 → 与下面共同的不同之处。"""

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def model_of(name: str, **shape: Any) -> PreTrainedModel:
    """那种结构的小模型，处于 eval；连偏置与归一化的权重也随机。

    Args:
        name: ``SHAPES`` 里的名字。
        shape: 改掉的配置。
    """
    config_class = CONFIG_MAPPING[name]
    known = config_class().to_dict() | config_class.attribute_map
    values = {key: value for key, value in _COMMON.items() if key in known}
    config = config_class(**{**values, **SHAPES[name], **shape})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape)
            if any(part in parameter_name for part in ("A_log", "dt_", "time_")):
                continue  # 状态衰减的快慢，随便取会溢出
            if "norm" in parameter_name and parameter.ndim == 1:
                parameter.add_(noise)  # 有的以 0 为恒等，有的以 1
            elif parameter.ndim > 1 or parameter_name.endswith("bias"):
                parameter.copy_(noise)
    return model.eval()
