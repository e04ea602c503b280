"""拉长过的 RoPE 频率：由 transformers 的 ``ROPE_INIT_FUNCTIONS`` 来算，这里不重写。"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config.model_sections import ModelConfig


def rope_parameters(config: ModelConfig) -> dict[str, Any]:
    """Transformers 的 ``rope_parameters``。"""
    scaling = config.rope_scaling
    given = {"rope_type": "default"} if scaling is None else scaling.model_dump(exclude_none=True)
    return {**given, "rope_theta": config.rope_theta}


def scaled_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """``rope_scaling`` 之下每对分量一步转几弧度 ``[hd / 2]``，float32，与 cos、sin 另乘的数。"""
    from transformers import Qwen3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert config.rope_scaling is not None
    parameters = rope_parameters(config)
    shape = Qwen3Config(  # 它不要求 num_heads 整除 hidden_size
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        head_dim=config.head_width,
        max_position_embeddings=config.max_seq_len,
        rope_parameters=parameters,
    )
    compute: Any = ROPE_INIT_FUNCTIONS[config.rope_scaling.rope_type]
    with torch.device("cpu"):  # 外面可能是 meta
        frequencies, factor = compute(shape, torch.device("cpu"))
    return frequencies, float(factor)


def as_bits(frequencies: Tensor) -> Tensor:
    """存成整数：float 的 buffer 会随 ``model.to(bfloat16)`` 一起降精度，位置就乱了。"""
    return frequencies.float().view(torch.int32)
