"""自回归文本生成：贪心、top-k、top-p 与纯采样。

``TextGenerator`` 只依赖 ``LanguageModel`` 接口，教师与学生通用；训练中的 rollout 用它的
``generate_ids``。
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .errors import DistillabError, nearest
from .language_model import LanguageModel, evaluating

__all__ = ["Strategy", "TextGenerator", "filter_top_k", "filter_top_p"]

Strategy = Literal["greedy", "top_k", "top_p", "sample"]

# Qwen 的 base 与 chat 两种 checkpoint 各以其中一个为 eos，另一个同样表示说完了。
_END_TOKENS = ("<|endoftext|>", "<|im_end|>")


def filter_top_k(logits: Tensor, k: int) -> Tensor:
    """只留最大的 k 个 logit（Fan et al. 2018，arXiv:1805.04833），其余为 ``-inf``。

    与第 k 大并列的全部保留，所以留下的可能多于 k 个；与 transformers 的 ``TopKLogitsWarper`` 相同。

    Args:
        logits: ``[..., V]``。
        k: 保留的个数；大于 V 等于不过滤。

    Returns:
        ``[..., V]``。
    """
    smallest_kept = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def filter_top_p(logits: Tensor, p: float) -> Tensor:
    """只留概率之和达到 p 的最小集合（nucleus，Holtzman et al. 2020，arXiv:1904.09751）。

    从小到大累加、去掉累计不超过 ``1 - p`` 的尾巴，最大的一个总会留下；求和方向与排序都和
    transformers 的 ``TopPLogitsWarper`` 相同，并列时才会留下同一批 token。

    Args:
        logits: ``[..., V]``。
        p: ``(0, 1]``。

    Returns:
        ``[..., V]``，去掉的为 ``-inf``。
    """
    ascending, order = logits.sort(dim=-1)
    dropped = ascending.softmax(-1).cumsum(-1) <= 1 - p
    dropped[..., -1] = False
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)


class TextGenerator:
    """用一个语言模型续写文本。

    Args:
        model: ``StudentModel`` 或 ``PretrainedLM``。
        tokenizer: Hugging Face tokenizer。

    Attributes:
        stop_ids: 生成到其中任何一个就停。
        pad_id: 已经停下的行用它补齐。
    """

    def __init__(self, model: LanguageModel, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        special = {
            str(token): index
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        stops = {special[token] for token in _END_TOKENS if token in special}
        if tokenizer.eos_token_id is not None:
            stops.add(tokenizer.eos_token_id)
        self.stop_ids = frozenset(stops)
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, *sorted(stops), 0)
        self.pad_id: int = next(index for index in candidates if index is not None)
        start = (tokenizer.bos_token_id, special.get(_END_TOKENS[0]))
        self._start_id: int | None = next((index for index in start if index is not None), None)

    def generate(
        self,
        prompts: str | list[str],
        *,
        strategy: Strategy = "greedy",
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 0.9,
        seed: int | None = None,
        stream: Callable[[str], object] | None = None,
    ) -> list[str]:
        """续写一批提示。

        Args:
            prompts: 一条或多条提示；空串从 bos（没有就从 ``<|endoftext|>``）开始。
            strategy: ``greedy``、``top_k``、``top_p`` 或 ``sample``（不过滤）。
            max_new_tokens: 每条最多生成的 token 数；到 ``max_seq_len`` 也会停。
            temperature: 采样温度，``greedy`` 不用。
            top_k: ``top_k`` 策略保留的个数。
            top_p: ``top_p`` 策略保留的概率，``(0, 1]``。
            seed: 采样的种子；``None`` 则每次不同。不影响 torch 的全局随机状态。
            stream: 每有新文字就调用一次，只能用于单条提示；各段相连等于返回值。

        Returns:
            每条提示的续写，不含提示与特殊 token。

        Raises:
            DistillabError: 参数越界，没有提示，或提示太长。
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if stream is not None and len(prompts) != 1:
            raise DistillabError(f"stream needs exactly one prompt, found {len(prompts)}")
        input_ids, attention_mask = self._encode(prompts)
        streamer = None if stream is None else _Streamer(self, stream)
        new_ids = self.generate_ids(
            input_ids,
            attention_mask,
            strategy=strategy,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            on_token=None if streamer is None else lambda ids: streamer.put(int(ids[0])),
        )
        if streamer is not None:
            streamer.finish()
        return [self._decode(self._until_stop(row)) for row in new_ids.tolist()]

    @torch.no_grad()
    def generate_ids(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        strategy: Strategy = "greedy",
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 0.9,
        seed: int | None = None,
        on_token: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """续写一批已编码的提示。

        Args:
            input_ids: ``[B, T]``，int64，左填充。
            attention_mask: ``[B, T]``，1 为真实 token；``None`` 表示没有填充。
            strategy: 同 ``generate``，``temperature``、``top_k``、``top_p``、``seed`` 亦然。
            max_new_tokens: 最多生成的步数。
            temperature: 见 ``generate``。
            top_k: 见 ``generate``。
            top_p: 见 ``generate``。
            seed: 见 ``generate``。
            on_token: 每一步得到 ``[B]`` 个新 token 后调用。

        Returns:
            ``[B, N]``，int64，N 不超过 ``max_new_tokens``。每行到第一个停止 token（含）为止有效，
            其后是 ``pad_id``。

        Raises:
            DistillabError: 参数越界，或提示没给新 token 留位置。
        """
        _check_options(strategy, max_new_tokens, temperature, top_k, top_p)
        batch, length = input_ids.shape
        room = self.model.max_seq_len - length
        if room < 1:
            raise DistillabError(
                f"prompt has {length} tokens, expected fewer than "
                f"max_seq_len={self.model.max_seq_len}: shorten it"
            )
        # 词表末尾的填充行没有对应的文字，不能采到。
        head = self.model.head.cut(len(self.tokenizer))
        device = input_ids.device
        generator = torch.Generator(device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        stops = torch.tensor(sorted(self.stop_ids), device=device, dtype=torch.long)
        finished = torch.zeros(batch, dtype=torch.bool, device=device)
        new_ids: list[Tensor] = []
        step_ids, cache = input_ids, self.model.new_cache()
        with evaluating(self.model):
            for _ in range(min(max_new_tokens, room)):
                hidden = self.model(step_ids, attention_mask, cache)
                logits = head.logits(hidden[:, -1])  # (B, V)
                if strategy == "greedy":
                    chosen = logits.argmax(-1)
                else:
                    logits = logits / temperature
                    if strategy == "top_k":
                        logits = filter_top_k(logits, top_k)
                    elif strategy == "top_p":
                        logits = filter_top_p(logits, top_p)
                    chosen = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
                chosen = chosen.masked_fill(finished, self.pad_id)
                new_ids.append(chosen)
                if on_token is not None:
                    on_token(chosen)
                finished = finished | torch.isin(chosen, stops)
                if finished.all():
                    break
                step_ids = chosen[:, None]
                if attention_mask is not None:
                    attention_mask = torch.cat(
                        (attention_mask, attention_mask.new_ones(batch, 1)), dim=1
                    )
        return torch.stack(new_ids, dim=1)

    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor | None]:
        """编码并左填充：最后一列总是真实 token，新 token 才能接在每一行后面。"""
        if not prompts:
            raise DistillabError("prompts is empty, expected at least one prompt")
        rows: list[list[int]] = []
        for prompt in prompts:
            ids = list(self.tokenizer(prompt)["input_ids"])
            if not ids:
                if self._start_id is None:
                    raise DistillabError(
                        "prompt is empty and the tokenizer has neither a bos token nor "
                        "<|endoftext|>: give at least one token"
                    )
                ids = [self._start_id]
            rows.append(ids)
        width = max(map(len, rows))
        device = self.model.head.weight.device
        padded = [[self.pad_id] * (width - len(row)) + row for row in rows]
        input_ids = torch.tensor(padded, device=device)
        if all(len(row) == width for row in rows):
            return input_ids, None
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return input_ids, torch.tensor(mask, device=device)

    def _until_stop(self, ids: list[int]) -> list[int]:
        """去掉停止 token 与其后的填充：它们未必是特殊 token，不能靠解码时跳过。"""
        for index, token in enumerate(ids):
            if token in self.stop_ids:
                return ids[:index]
        return ids

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


class _Streamer:
    """把逐个到来的 token 变成不断字的文本片段。"""

    def __init__(self, generator: TextGenerator, emit: Callable[[str], object]) -> None:
        self._generator, self._emit = generator, emit
        self._ids: list[int] = []
        self._emitted = ""

    def put(self, token: int) -> None:
        if token in self._generator.stop_ids:
            return
        self._ids.append(token)
        # 每次从头解码：有的 tokenizer 会去掉片段开头的空格，分段解码再拼接并不等于整体。
        text = self._generator._decode(self._ids)
        # 一个汉字的几个字节可能分在几个 token 里，没凑齐时解码成 U+FFFD，先扣住不发。
        if not text.endswith("\ufffd"):
            self._send(text)

    def finish(self) -> None:
        self._send(self._generator._decode(self._ids))

    def _send(self, text: str) -> None:
        piece = text[len(self._emitted) :]
        self._emitted = text
        if piece:
            self._emit(piece)


def _check_options(
    strategy: str, max_new_tokens: int, temperature: float, top_k: int, top_p: float
) -> None:
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
