"""从零实现的学生：decoder-only Transformer，结构与 Qwen2.5 对齐，权重可与 transformers 互换。

一层是怎样算的见 ``blocks.py``，各层怎样连起来见 ``decoder.py``。
"""

from __future__ import annotations

from torch import Tensor, nn

from ..config.model_sections import ModelConfig
from .blocks import rotary_tables
from .decoder import Decoder


class StudentModel(Decoder):
    """学生模型：Embedding、若干 ``TransformerBlock``、最终归一化，词表投影与 Embedding 绑定。

    Args:
        config: 模型结构。默认配置共 123,426,304 个参数。
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.apply(_init_weights)

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """``(cos, sin)``，float32，由 ``rope_theta`` 现算。"""
        return rotary_tables(positions, self.config.head_dim, self.config.rope_theta)


def _init_weights(module: nn.Module) -> None:
    """权重 N(0, 0.02)，偏置 0；RMSNorm 生来为 1。"""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
