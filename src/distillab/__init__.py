"""distillab：把大语言模型蒸馏成小的，把提示蒸馏进权重。"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "ModelConfig": "config",
    "TrainingConfig": "config",
    "LossConfig": "config",
    "Recipe": "config",
    "load_recipe": "recipes",
    "DistillabError": "errors",
    "StudentModel": "model",
    "RMSNorm": "model",
    "GQAAttention": "model",
    "SwiGLUFFN": "model",
    "TransformerBlock": "model",
    "PretrainedLM": "language_model",
    "WikiDataset": "data",
    "load_tokenizer": "tokenizer",
    "DistillationTrainer": "trainer",
    "LocalTeacher": "teachers",
    "TextGenerator": "generate",
    "export_student": "convert",
    "from_hf": "convert",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """公开的名字用到时才导入：``import distillab`` 不导入 torch。"""
    if name not in _HOMES:
        raise AttributeError(f"module 'distillab' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
