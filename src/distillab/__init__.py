"""distillab：把大语言模型蒸馏成小的，把提示蒸馏进权重。"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "ModelConfig": "config.model_sections",
    "TrainingConfig": "config.schema",
    "LossConfig": "config.schema",
    "Recipe": "config.schema",
    "load_recipe": "config.recipes",
    "DistillabError": "errors",
    "StudentModel": "models.student",
    "RMSNorm": "models.blocks",
    "GQAAttention": "models.blocks",
    "SwiGLUFFN": "models.blocks",
    "TransformerBlock": "models.blocks",
    "PretrainedLM": "models.interface",
    "WikiDataset": "data.chunks",
    "load_tokenizer": "models.tokenizer",
    "DistillationTrainer": "train.trainer",
    "LocalTeacher": "teachers.in_process",
    "TextGenerator": "generate.generator",
    "export_student": "export.convert",
    "from_hf": "export.convert",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """公开的名字用到时才导入：``import distillab`` 不导入 torch。"""
    if name not in _HOMES:
        raise AttributeError(f"module 'distillab' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
