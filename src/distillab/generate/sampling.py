"""从 logits 到 token：过滤、采样与随机数。

每行用自己的种子，每步只用一个随机数，所以一行的结果不取决于它与谁同批。
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..config.sections import SamplingConfig
from ..errors import DistillabError, nearest

BLOCK = 256
"""GPU 上抽样时一块几个 token。"""

Strategy = Literal["greedy", "top_k", "top_p", "sample"]


def filter_top_k(logits: Tensor, k: int) -> Tensor:
    """``[..., V]`` 只留最大的 k 个 logit（Fan et al. 2018，arXiv:1805.04833），其余为 ``-inf``。

    与第 k 大并列的全部保留，所以留下的可能多于 k 个；与 transformers 的 ``TopKLogitsWarper`` 相同。
    """
    smallest_kept = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def filter_top_p(logits: Tensor, p: float) -> Tensor:
    """``[..., V]`` 只留概率之和达到 p 的最小集合，其余为 ``-inf``。

    即 nucleus（Holtzman et al. 2020，arXiv:1904.09751）：从小到大累加，去掉累计不超过 ``1 - p`` 的
    尾巴，最大的一个总会留下；求和方向与排序都和 transformers 的 ``TopPLogitsWarper`` 相同，并列时
    才会留下同一批 token。
    """
    ascending, order = logits.sort(dim=-1)
    dropped = ascending.softmax(-1).cumsum(-1) <= 1 - p
    dropped[..., -1] = False
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)


def sample_tokens(logits: Tensor, uniform: Tensor) -> Tensor:
    """按 ``logits [B, V]`` 的 softmax 各取一个 token ``[B]``：累积分布的反函数。

    每行只用 ``uniform [B]`` 里一个 ``[0, 1)`` 上的 float64；``torch.multinomial`` 每行每步要用 V 个
    随机数，在 CPU 上比 head 的矩阵乘还慢。
    """
    if logits.is_cuda:
        return sample_by_blocks(logits, uniform)
    # float64：float32 累加十几万项，尾部的概率会被舍入吃掉。
    cumulative = logits.double().softmax(-1).cumsum(-1)  # (B, V)
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


def sample_by_blocks(logits: Tensor, uniform: Tensor) -> Tensor:
    """``sample_tokens`` 的 GPU 做法：先选 ``BLOCK`` 个 token 的一块，再在块里选。

    T4 做 float64 的 exp 与逐个累加慢三十倍，所以 exp 是 float32 的，float64 只用来加。边界上的误差
    约 1e-8：只有离边界这么近的随机数才可能选到邻近的 token。
    """
    batch, size = logits.shape
    blocks = -(-size // BLOCK)
    weights = logits.new_zeros(batch, blocks * BLOCK, dtype=torch.float32)
    torch.exp(logits - logits.amax(-1, keepdim=True), out=weights[:, :size])
    weights = weights.view(batch, blocks, BLOCK)
    upto = weights.sum(-1, dtype=torch.float64).cumsum(-1)  # (B, V / BLOCK)
    target = uniform[:, None] * upto[:, -1:]
    block = torch.searchsorted(upto, target, right=True).clamp(max=blocks - 1)  # (B, 1)
    before = (block > 0) * upto.gather(1, (block - 1).clamp(min=0))
    inside = weights.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0].double().cumsum(-1)
    # 块内另加一遍，舍入可能略小：不到块的总和，才落在块里最后一个有概率的 token 上。
    rest = torch.minimum(target - before, torch.nextafter(inside[:, -1:], -inside[:, -1:]))
    token = block * BLOCK + torch.searchsorted(inside, rest, right=True)
    return token[:, 0].clamp(max=size - 1)


def next_tokens(
    logits: Tensor,
    strategy: Strategy,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    uniform: Tensor | None,
) -> Tensor:
    """``logits: [B, V]`` → 各行的下一个 token ``[B]``；``greedy`` 不用 ``uniform``。"""
    if uniform is None:
        return logits.argmax(-1)
    logits = logits / temperature
    if strategy == "top_k":
        logits = filter_top_k(logits, top_k)
    elif strategy == "top_p":
        logits = filter_top_p(logits, top_p)
    return sample_tokens(logits, uniform)


def uniform_draws(seeds: Sequence[int], count: int) -> Tensor:
    """每行 ``count`` 个 ``[0, 1)`` 上的随机数，``[B, count]``，float64。

    在 CPU 上取，换设备也是同一串；不碰全局的随机状态。
    """
    rows = [
        torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for seed in seeds
    ]
    return torch.stack(rows)


def row_seeds(seed: int | None, count: int) -> list[int]:
    """一批的种子换成每行的；``None`` 每次不同。"""
    if seed is None:
        return [secrets.randbits(63) for _ in range(count)]
    return [random.Random(f"{seed}/{row}").getrandbits(63) for row in range(count)]


def sampling_options(sampling: SamplingConfig) -> dict[str, Any]:
    """``SamplingConfig`` 换成 ``generate_ids`` 的参数，长度除外。"""
    if sampling.temperature == 0:
        return {"strategy": "greedy"}
    for name in ("top_k", "top_p"):  # 至多设了一个
        if (value := getattr(sampling, name)) is not None:
            return {"strategy": name, "temperature": sampling.temperature, name: value}
    return {"strategy": "sample", "temperature": sampling.temperature}


def check_options(
    strategy: str, max_new_tokens: int, temperature: float, top_k: int, top_p: float
) -> None:
    """有一个越界就是 ``DistillabError``。"""
    if strategy not in get_args(Strategy):
        raise DistillabError(f"strategy is '{strategy}', {nearest(strategy, get_args(Strategy))}")
    if max_new_tokens < 1:
        raise DistillabError(f"max_new_tokens={max_new_tokens}, expected at least 1")
    if not 0 < temperature < float("inf"):
        raise DistillabError(
            f"temperature={temperature}, expected above 0: use strategy greedy for the limit"
        )
    if top_k < 1:
        raise DistillabError(f"top_k={top_k}, expected at least 1")
    if not 0 < top_p <= 1:
        raise DistillabError(f"top_p={top_p}, expected above 0 and at most 1")
