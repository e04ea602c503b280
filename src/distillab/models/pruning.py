"""把模型裁窄：按激活给 FFN 神经元、注意力头与残差通道打分，留下分数高的。

打分与聚合取自 Minitron（Muralidharan et al. 2024，arXiv:2407.14679，§2.2 与 §4.1 第 2 条）：各单元
的激活，序列上取绝对值的平均，批上取 L2；只要前向。
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config.model_sections import ModelConfig
from ..config.width_sections import KeptWidths
from .blocks import TransformerBlock
from .interface import evaluating
from .student import StudentModel


class WidthScores(NamedTuple):
    """各单元的分数，大的重要，float32：``heads: [L, nh]``，``neurons: [L, I]``，``channels: [H]``。

    只有同一行里的才能比。
    """

    heads: Tensor
    neurons: Tensor
    channels: Tensor


class _Total:
    """逐批累加 ``[B, T, n]``：序列上取绝对值的平均，平方后在批上相加。"""

    def __init__(self) -> None:
        self.squares = torch.zeros(())

    def add(self, values: Tensor) -> None:
        self.squares = self.squares + values.float().abs().mean(1).square().sum(0).cpu()


@torch.no_grad()
def width_scores(model: StudentModel, rows: Iterable[Tensor]) -> WidthScores:
    """``model`` 读过 ``rows``（各 ``[T]``）后各单元的分数；``model`` 不变。

    头是它那一份注意力输出的 L2，神经元是 ``down`` 的输入，通道是各层两个 norm 的输出、各层相加。
    """
    blocks = [block for block in model.layers if isinstance(block, TransformerBlock)]
    norms = [norm for block in blocks for norm in (block.attention_norm, block.ffn_norm)]
    head_dim, device = model.config.head_width, model.embedding.weight.device
    with _watching() as watch, evaluating(model):
        heads = [watch(b.attention.o_proj, lambda x, _: _lengths(x, head_dim)) for b in blocks]
        neurons = [watch(b.ffn.down_proj, lambda x, _: x) for b in blocks]
        channels = [watch(norm, lambda _, y: y) for norm in norms]
        for row in rows:
            model(row[None].to(device))
    by_layer = [torch.stack([t.squares.sqrt() for t in of]) for of in (heads, neurons, channels)]
    return WidthScores(by_layer[0], by_layer[1], by_layer[2].sum(0))


def _lengths(output: Tensor, head_dim: int) -> Tensor:
    """``[B, T, nh * hd]`` → 每个头的 L2 ``[B, T, nh]``。"""
    heads = output.float().view(*output.shape[:2], -1, head_dim)
    lengths: Tensor = torch.linalg.vector_norm(heads, dim=-1)
    return lengths


@contextmanager
def _watching() -> Iterator[Callable[..., _Total]]:
    """``watch(module, of)``：其间 ``module`` 每算一次，就累加 ``of(输入, 输出)``。"""
    handles = []

    def watch(module: nn.Module, of: Callable[[Tensor, Tensor], Tensor]) -> _Total:
        total = _Total()
        handles.append(
            module.register_forward_hook(lambda _, given, output: total.add(of(given[0], output)))
        )
        return total

    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def most_active(scores: WidthScores, config: ModelConfig, widths: Mapping[str, int]) -> KeptWidths:
    """裁成 ``widths``（四个宽度，见 ``WIDTHS``）时留下哪些；``config`` 是裁之前的。"""
    pairs = [
        _head_picks(row, config.num_kv_heads, widths["num_heads"], widths["num_kv_heads"])
        for row in scores.heads
    ]
    channels = _best(scores.channels, widths["hidden_size"])
    heads = [own for own, _ in pairs]
    neurons = [_best(row, widths["intermediate_size"]) for row in scores.neurons]
    return KeptWidths(
        channels=channels,
        heads=heads,
        kv_heads=[sources for _, sources in pairs],
        neurons=neurons,
        shares={
            "channels": _share(scores.channels[None], [channels]),
            "heads": _share(scores.heads, heads),
            "neurons": _share(scores.neurons, neurons),
        },
    )


def _share(scores: Tensor, kept: list[list[int]]) -> float:
    """留下的占全部的几成，各层平均。"""
    tiny = torch.finfo(scores.dtype).tiny
    shares = [
        float(row[own].sum() / row.sum().clamp(min=tiny))
        for row, own in zip(scores, kept, strict=True)
    ]
    return sum(shares) / len(shares)


def _best(scores: Tensor, keep: int) -> list[int]:
    """分数最高的 ``keep`` 个的号，升序；一样高的取前面的。"""
    order = scores.argsort(descending=True, stable=True)
    return sorted(order[:keep].tolist())


def _head_picks(
    scores: Tensor, kv_heads: int, keep: int, keep_kv: int
) -> tuple[list[int], list[list[int]]]:
    """``scores: [nh]`` → 留下的查询头，与新的每个键值头由哪几个而来。

    一组里的查询头不多于原来的时，去掉分数低的组，余下各组去掉同样多的头：谁用哪个键值头不变。否则键
    值头去得比查询头多：留下的查询头按原来的次序重新分组，一组原来用的几个键值头取平均（Ainslie et
    al. 2023，arXiv:2305.13245，§2.1）。
    """
    size, new_size = len(scores) // kv_heads, keep // keep_kv
    groups = scores.view(kv_heads, size)
    if new_size <= size:
        inside = [_best(group, new_size) for group in groups]
        totals = torch.stack([group[own].sum() for group, own in zip(groups, inside, strict=True)])
        kept = _best(totals, keep_kv)
        return [group * size + i for group in kept for i in inside[group]], [[g] for g in kept]
    kept = _best(groups.sum(1), -(-keep // size))
    known = [group * size + i for group in kept for i in range(size)]
    heads = [known[i] for i in _best(scores[known], keep)]
    starts = range(0, keep, new_size)
    return heads, [sorted({head // size for head in heads[i : i + new_size]}) for i in starts]


@torch.no_grad()
def narrowed(model: StudentModel, kept: KeptWidths) -> StudentModel:
    """``model`` 只留下 ``kept`` 的一份，float32；``model`` 不变。"""
    config = model.config
    student = StudentModel(config.narrowed(kept.widths))
    state = {name: _cut(name, each, config, kept) for name, each in model.state_dict().items()}
    student.load_state_dict(state)
    student.eos_token_ids = model.eos_token_ids
    return student


def _cut(name: str, weight: Tensor, config: ModelConfig, kept: KeptWidths) -> Tensor:
    """``model.state_dict()`` 的一项，裁过；``config`` 是原来的。"""
    *where, module, _ = name.split(".")
    if module in ("q_norm", "k_norm"):
        return weight
    if module.endswith("norm"):
        return _cut_norm(weight, config, kept.channels, final=not where)
    if not where:
        rows = weight[:, kept.channels]
        if module == "embedding" or config.tie_embeddings:
            rows = rows * _embedding_scale(config, kept.channels)
        return rows
    heads, width = kept.heads[int(where[1])], config.head_width
    if module in ("k_proj", "v_proj"):
        own = weight.view(-1, width, *weight.shape[1:])  # (nkv, hd, H)
        rows = torch.cat([own[sources].mean(0) for sources in kept.kv_heads[int(where[1])]])
        return _columns(rows, kept.channels)
    inner = kept.neurons[int(where[1])]
    if module in ("q_proj", "o_proj"):
        inner = [head * width + i for head in heads for i in range(width)]
    if module in ("o_proj", "down_proj"):
        return _columns(weight[kept.channels], inner)
    return _columns(weight[inner], kept.channels)


def _columns(weight: Tensor, columns: list[int]) -> Tensor:
    """偏置没有列。"""
    return weight if weight.dim() == 1 else weight[:, columns]


def _cut_norm(weight: Tensor, config: ModelConfig, channels: list[int], final: bool) -> Tensor:
    """RMSNorm 从此只在 H' 个通道上求平均；乘 ``sqrt(H / H')``，去掉的通道就当作 0，平均仍按 H 算。

    SmolLM2 上这样比不乘的初始损失低；去掉的真是 0 时分毫不差。``final`` 的还抵消放大的输出层。
    """
    kept = weight[channels]
    if len(channels) == config.hidden_size:
        return kept
    scale = math.sqrt(config.hidden_size / len(channels))
    if final and config.tie_embeddings:
        scale /= _embedding_scale(config, channels)
    offset = float(config.norm_unit_offset)
    return (kept + offset) * scale - offset


def _embedding_scale(config: ModelConfig, channels: list[int]) -> float:
    """Gemma 的 embedding 乘 ``sqrt(H)``，H 变小了，权重就放大这么多。"""
    return math.sqrt(config.hidden_size / len(channels)) if config.scaled_embeddings else 1.0
