"""裁剪过的词表所对应的教师（或预训练的学生）：embedding 与输出层只留几行，id 处处是新的。"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DistillabError, foreign
from ..targets import Head
from .head_fit import relative_error, tolerance
from .interface import PROBE_TOKENS, PretrainedLM, evaluating


@torch.no_grad()
def trim_model(model: PretrainedLM, kept: Sequence[int], dropped: Sequence[int]) -> Head:
    """``model`` 就地变成词表是 ``kept``（原来的 id）的模型；返回 ``dropped`` 各行的 ``Head``。

    其余的行（填充行）没有人要。embedding 的行数不够，或另有一张以 token 为行的表的模型，是
    ``DistillabError``。
    """
    if max(kept) >= model.vocab_size:
        raise DistillabError(
            f"student.vocab: the tokenizer has id {max(kept)}, but the model's embedding has "
            f"{model.vocab_size} rows; expected one tokenizer for both"
        )
    what = f"student.vocab cannot trim model_type {model.model.config.model_type!r}"
    head, device = model.head, model.head.weight.device
    rows = torch.tensor(kept, device=device)
    probe = torch.arange(min(PROBE_TOKENS, len(kept), model.max_seq_len), device=device)
    with foreign(what), evaluating(model), torch.autocast(device.type, enabled=False):
        before = model.logits(model(rows[probe][None]))[..., rows]
    outside = _rows(head, torch.tensor(dropped, dtype=torch.int64, device=device))
    with foreign(what):
        _select(model.model, rows)
        _renumber(model.model, {old: index for index, old in enumerate(kept)})
    with foreign(what), evaluating(model), torch.autocast(device.type, enabled=False):
        after = model.logits(model(probe[None]))
    if after.shape != before.shape or not (
        relative_error(after, before) <= tolerance(head.weight.dtype)
    ):
        raise DistillabError(f"{what}: its logits change, expected the same for the tokens kept")
    return outside


def _rows(head: Head, rows: Tensor) -> Head:
    bias = None if head.bias is None else head.bias[rows].detach()
    return Head(head.weight[rows].detach(), bias, head.scale, head.softcap)


def _select(hf: Any, rows: Tensor) -> None:
    """Embedding 与输出层只留 ``rows``；原来绑定的仍是同一个参数。"""
    embedding, output = hf.get_input_embeddings(), hf.get_output_embeddings()
    tied = output.weight is embedding.weight
    embedding.weight = _parameter(embedding.weight, rows)
    embedding.num_embeddings = len(rows)
    output.weight = embedding.weight if tied else _parameter(output.weight, rows)
    if getattr(output, "bias", None) is not None:
        output.bias = _parameter(output.bias, rows)
    output.out_features = len(rows)


def _parameter(old: nn.Parameter, rows: Tensor) -> nn.Parameter:
    return nn.Parameter(old.detach()[rows].clone(), requires_grad=old.requires_grad)


def _renumber(hf: Any, new: dict[int, int]) -> None:
    """各个配置里的词表大小与 token id；没有留下的 id 变成 ``None``。"""
    text = hf.config.get_text_config()
    configs = [hf.config, text] if text is not hf.config else [hf.config]
    for config in configs:
        if hasattr(config, "vocab_size"):
            config.vocab_size = len(new)
    if getattr(hf, "vocab_size", None) is not None:
        hf.vocab_size = len(new)
    embedding = hf.get_input_embeddings()
    embedding.padding_idx = new.get(embedding.padding_idx)
    for part in hf.modules():
        if getattr(part, "padding_idx", None) is not None and part is not embedding:
            part.padding_idx = new.get(part.padding_idx)
    for config in [*configs, *filter(None, [getattr(hf, "generation_config", None)])]:
        for key, value in list(vars(config).items()):
            if key.endswith("_token_id") and isinstance(value, int):
                setattr(config, key, new.get(value))
            elif key.endswith(("_token_id", "suppress_tokens")) and isinstance(value, list):
                setattr(config, key, [new[i] for i in value if i in new])
