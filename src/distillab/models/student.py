"""从零实现的学生：decoder-only Transformer，缺省与 Qwen2.5 对齐，权重可与 transformers 互换。

一层是怎样算的见 ``blocks.py``，各层怎样连起来见 ``decoder.py``。
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config.model_sections import ModelConfig
from .blocks import rotary_tables, rotation
from .decoder import Decoder
from .rope import as_bits, scaled_frequencies


class StudentModel(Decoder):
    """学生模型：Embedding、若干 ``TransformerBlock``、最终归一化与词表投影。

    Args:
        config: 模型结构。默认配置共 123,426,304 个参数。
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self._factor = 1.0
        if config.rope_scaling is not None:
            frequencies, self._factor = scaled_frequencies(config)
            self.register_buffer("_bits", as_bits(frequencies), persistent=False)
        self.apply(_init_weights)

    def rotary(self, positions: Tensor, *, local: bool = False) -> tuple[Tensor, Tensor]:
        """``(cos, sin)``，float32，由基数现算；拉长过的频率是存下的。"""
        config = self.config
        if local and config.rope_local_theta is not None:
            return rotary_tables(positions, config.head_width, config.rope_local_theta)
        if config.rope_scaling is None:
            return rotary_tables(positions, config.head_width, config.rope_theta)
        bits: Tensor = self._bits  # type: ignore[assignment]
        cos, sin = rotation(positions, bits.view(torch.float32))
        return cos * self._factor, sin * self._factor


def _init_weights(module: nn.Module) -> None:
    """权重 N(0, 0.02)，偏置 0；RMSNorm 生来为 1。"""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
