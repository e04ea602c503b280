"""各家的配置怎样译成 ``ModelConfig``，哪些拒绝。"""

import pytest
from transformers import (
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from distillab.config.model_sections import ModelConfig
from distillab.errors import DistillabError
from distillab.models.hf_layout import config_from_hf

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 400,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def test_config_of_qwen2_is_translated_field_by_field() -> None:
    config = config_from_hf(
        Qwen2Config(
            **SHAPE,
            rope_parameters={"rope_type": "default", "rope_theta": 5e5},
            rms_norm_eps=1e-5,
        )
    )
    assert config == ModelConfig(
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=48,
        vocab_size=400,
        max_seq_len=64,
        rope_theta=5e5,
        norm_eps=1e-5,
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Qwen3MoeConfig(**SHAPE), "model_type=qwen3_moe, expected qwen2, llama, qwen3, mistral, "),
        (Gemma3nTextConfig(), "model_type=gemma3n_text, expected .* gemma2 or gemma3_text: use"),
        (Phi3Config(pad_token_id=0), "model_type=phi3, expected"),
        (
            LlamaConfig(
                **SHAPE,
                rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            ),
            "rope_type=dynamic, expected default, linear, llama3, yarn",
        ),
        (
            LlamaConfig(
                **SHAPE,
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.5,
                },
            ),
            r"partial_rotary_factor=0\.5, expected 1\.0",
        ),
        (LlamaConfig(**SHAPE, hidden_act="relu"), "hidden_act=relu, expected silu or gelu_pyt"),
        (
            Gemma2Config(**SHAPE, use_bidirectional_attention=True),
            "use_bidirectional_attention=True, expected False",
        ),
        (
            Gemma3TextConfig(**SHAPE, attn_logit_softcapping=50.0),
            r"attn_logit_softcapping=50\.0, expected None",
        ),
        (
            Gemma3TextConfig(
                **SHAPE,
                rope_parameters={
                    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
                },
            ),
            r"sliding_attention\.rope_type=linear, expected default",
        ),
        (
            Qwen3Config(**SHAPE, layer_types=["chunked_attention"] * 4, sliding_window=8),
            "layer_types=chunked_attention, expected full_attention or sliding_attention",
        ),
        (LlamaConfig(**SHAPE, quantization_config={"bits": 4}), "quantization_config=.*expected"),
        (
            Qwen3Config(**{**SHAPE, "num_key_value_heads": 3}),
            "num_heads=4 is not divisible by num_kv_heads=3; use student.path",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_structure_that_the_student_cannot_represent_is_refused(
    config: object, message: str
) -> None:
    with pytest.raises(DistillabError, match=message):
        config_from_hf(config)


def test_sliding_window_that_no_layer_uses_is_dropped() -> None:
    config = Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=16, max_window_layers=4)
    assert config_from_hf(config) == config_from_hf(Qwen2Config(**SHAPE))
