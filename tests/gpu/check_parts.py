"""``checks.py`` 各项共用的：小模型与相对误差。"""

import contextlib
import io
import logging

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distillab.config.model_sections import ModelConfig
from distillab.models.student import StudentModel

VOCAB = 1000


class Skip(Exception):
    """这台机器上做不了。"""


@contextlib.contextmanager
def nothing_steps_aside():
    """其间编译器、kernel、CUDA graph 都用上了；没有用上的，日志里说了为什么。"""
    said = io.StringIO()
    logger, handler = logging.getLogger("distillab"), logging.StreamHandler(said)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    lines = [line for line in said.getvalue().splitlines() if "cannot be used here" in line]
    assert not lines, lines[0]


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def student():
    torch.manual_seed(0)
    return StudentModel(
        ModelConfig(
            hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=96,
            vocab_size=VOCAB, max_seq_len=128,
        )
    )  # fmt: skip


def pretrained(std=0.1, layout="qwen2", **options):
    """transformers 的 Qwen2 或别的一家，随机权重，分布不平。"""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            layout, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=96, vocab_size=VOCAB,
            max_position_embeddings=128, tie_word_embeddings=True, **options,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += std * torch.randn_like(parameter)
    return model


class Plain:
    """只有 ``TextGenerator`` 看的几样：没有停止 token。"""

    added_tokens_decoder = {}  # noqa: RUF012 - 从不改
    eos_token_id = bos_token_id = None
    pad_token_id = 0
    name_or_path = "plain"

    def __len__(self):
        return VOCAB

    def get_vocab(self):
        return {str(index): index for index in range(VOCAB)}

    def get_added_vocab(self):
        return {}

    def get_chat_template(self, **_):
        raise ValueError("no chat template")
