"""Qwen2 与 Llama 的配置怎样译成 ``ModelConfig``，哪些拒绝。"""

import pytest
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from distillab.config.model_sections import ModelConfig
from distillab.errors import DistillabError
from distillab.export.hf_layout import config_from_hf

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
        (Qwen3Config(**SHAPE), "model_type=qwen3, expected qwen2 or llama: use student.path"),
        (Qwen2Config(**{**SHAPE, "tie_word_embeddings": False}), "tie_word_embeddings=False"),
        (
            Qwen2Config(
                **SHAPE,
                rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            ),
            "rope_type=linear, expected default",
        ),
        (
            LlamaConfig(**SHAPE, head_dim=16),
            r"head_dim \* num_attention_heads=64, expected 32",
        ),
        (LlamaConfig(**SHAPE, hidden_act="gelu"), "hidden_act=gelu, expected silu"),
        (
            Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=16, max_window_layers=2),
            "use_sliding_window=True, expected False",
        ),
        (LlamaConfig(**SHAPE, mlp_bias=True), "mlp_bias=True, expected False"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_structure_that_the_student_cannot_represent_is_refused(
    config: object, message: str
) -> None:
    with pytest.raises(DistillabError, match=message):
        config_from_hf(config)


def test_sliding_window_that_no_layer_uses_is_accepted() -> None:
    config = Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=16, max_window_layers=4)
    assert config_from_hf(config).num_layers == 4
