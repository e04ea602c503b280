"""自回归文本生成：贪心、top-k、top-p 与纯采样。

``TextGenerator`` 只依赖 ``LanguageModel`` 接口，教师与学生通用；训练中的 rollout 用它的
``generate_ids``。
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DistillabError
from ..models.interface import LanguageModel, evaluating
from ..models.tokenizer import continuation_text, own_vocabulary
from ..vocabulary import Vocabulary
from .sampling import Strategy, check_options, next_tokens, row_seeds, uniform_draws
from .stops import stop_ids
from .weights import sampling_weights

__all__ = ["TextGenerator", "left_pad", "padded", "until_stop"]

DROP_AT = 0.25
"""停下的行占到这么多，就不再算它们；每丢一次要把余下的 KV cache 抄一遍。"""


def left_pad(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """长短不一的几行拼成一批：最后一列总是真实 token，新 token 才能接在每一行后面。

    Args:
        rows: 每行的 token，不为空。
        pad_id: 填在左边的 token。
        device: 放在哪里。

    Returns:
        ``(input_ids [B, T], attention_mask [B, T])``，int64；各行一样长时后者为 ``None``，
        注意力可以走快速路径。
    """
    return padded(rows, pad_id, device, "left")


def padded(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device, side: Literal["left", "right"]
) -> tuple[Tensor, Tensor | None]:
    """长短不一的几行补齐；参数与返回值见 ``left_pad``，``side`` 是填在哪一边。"""
    width = max(map(len, rows))

    def filled(row: Sequence[int], token: int) -> list[int]:
        rest = [token] * (width - len(row))
        return [*rest, *row] if side == "left" else [*row, *rest]

    input_ids = torch.tensor([filled(row, pad_id) for row in rows], device=device)
    if all(len(row) == width for row in rows):
        return input_ids, None
    mask = [filled([1] * len(row), 0) for row in rows]
    return input_ids, torch.tensor(mask, device=device)


def until_stop(ids: list[int], stop_ids: Container[int]) -> list[int]:
    """到第一个停止 token 为止，含它：学会停下也是要学的。"""
    end = next((index for index, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[: end + 1]


class TextGenerator:
    """用一个语言模型续写文本。

    Args:
        model: ``StudentModel`` 或 ``PretrainedLM``。
        tokenizer: Hugging Face tokenizer。
        vocabulary: 能采到的 token；缺省为 tokenizer 定义了的。

    Attributes:
        vocabulary: 同上。
        stop_ids: 生成到其中任何一个就停，见 :func:`distillab.generate.stops.stop_ids`。
        pad_id: 已经停下的行用它补齐。
    """

    def __init__(
        self, model: LanguageModel, tokenizer: Any, vocabulary: Vocabulary | None = None
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary or own_vocabulary(tokenizer)
        self.stop_ids = stop_ids(tokenizer, model)
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, *sorted(self.stop_ids), 0)
        self.pad_id: int = next(index for index in candidates if index is not None)
        start = (tokenizer.bos_token_id, tokenizer.get_added_vocab().get("<|endoftext|>"))
        self._start_id: int | None = next((index for index in start if index is not None), None)

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[list[int]],
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
            prompts: 一条或多条提示，文字或已编码的；空串从 bos（没有就从 ``<|endoftext|>``）开始。
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
        rows: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
        if stream is not None and len(rows) != 1:
            raise DistillabError(f"stream needs exactly one prompt, found {len(rows)}")
        encoded = self._encode(rows)
        input_ids, attention_mask = left_pad(encoded, self.pad_id, self.model.head.weight.device)
        before = [
            row if isinstance(rows[i], str) else [] for i, row in enumerate(encoded)
        ]  # 对话的回答自成一段，不接着 prompt 读
        streamer = None if stream is None else _Streamer(self, stream, before[0])
        new_ids = self.generate_ids(
            input_ids,
            attention_mask,
            strategy=strategy,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seeds=row_seeds(seed, len(rows)),
            on_token=None if streamer is None else lambda _, ids: streamer.put(int(ids[0])),
        )
        if streamer is not None:
            streamer.finish()
        return [self.decode(row, own) for row, own in zip(new_ids.tolist(), before, strict=True)]

    def decode(self, ids: list[int], before: Sequence[int] = ()) -> str:
        """``generate_ids`` 的一行 → 接在 ``before`` 之后的文字，不含停止 token 与其后的填充。"""
        ids = until_stop(ids, self.stop_ids)
        if ids[-1] in self.stop_ids:  # 未必是特殊 token，不能靠解码时跳过
            ids = ids[:-1]
        return continuation_text(self.tokenizer, before, ids)

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
        seeds: Sequence[int] | None = None,
        on_token: Callable[[Tensor, Tensor], Tensor | None] | None = None,
    ) -> Tensor:
        """续写一批已编码的提示。

        Args:
            input_ids: ``[B, T]``，int64，左填充。
            attention_mask: ``[B, T]``，1 为真实 token；``None`` 表示没有填充。
            strategy: 同 ``generate``，``temperature``、``top_k``、``top_p`` 亦然。
            max_new_tokens: 最多生成的步数。
            temperature: 见 ``generate``。
            top_k: 见 ``generate``。
            top_p: 见 ``generate``。
            seeds: 每行的种子，一行的采样不取决于它与谁同批；``None`` 则每次不同。
            on_token: 每一步得到新 token 后调用，参数是还在算的行 ``[b]`` 与它们的新 token ``[b]``；
                返回 ``[b]`` 的 bool，为真的行就停下。

        Returns:
            ``[B, N]``，int64，N 不超过 ``max_new_tokens``。每行到第一个停止 token（含）为止有效，
            其后是 ``pad_id``。

        Raises:
            DistillabError: 参数越界，或提示没给新 token 留位置。
        """
        check_options(strategy, max_new_tokens, temperature, top_k, top_p)
        options: dict[str, Any] = {
            "strategy": strategy,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
        }
        if attention_mask is not None and not self.model.pads_left:
            return self._by_length(
                input_ids, attention_mask, max_new_tokens, seeds, on_token, options
            )
        batch, width = input_ids.shape
        room = self.model.max_seq_len - width
        if room < 1:
            raise DistillabError(
                f"prompt has {width} tokens, expected fewer than "
                f"max_seq_len={self.model.max_seq_len}: shorten it"
            )
        device = input_ids.device
        uniform = None
        if strategy != "greedy":
            seeds = row_seeds(None, batch) if seeds is None else seeds
            uniform = uniform_draws(seeds, max_new_tokens).to(device)  # (B, N)
        limit = min(max_new_tokens, room)
        stops = torch.tensor(sorted(self.stop_ids), device=device, dtype=torch.long)
        new_ids = input_ids.new_full((batch, limit), self.pad_id)
        rows = torch.arange(batch, device=device)  # 还在算的行
        finished = torch.zeros(batch, dtype=torch.bool, device=device)
        step_ids, cache, mask = input_ids, self.model.new_cache(), attention_mask
        if mask is not None:
            mask = F.pad(mask, (0, limit), value=1)
        with evaluating(self.model), sampling_weights(self.model, batch, limit):
            # 填充行与空洞没有对应的文字，不能采到。
            head = self.model.head.cut(self.vocabulary)
            for step in range(limit):
                seen = None if mask is None else mask[:, : width + step]
                hidden = self.model(step_ids, seen, cache)
                chosen = next_tokens(
                    head.logits(hidden[:, -1]),  # (B, V)
                    **options,
                    uniform=None if uniform is None else uniform[:, step],
                ).masked_fill(finished, self.pad_id)
                new_ids[rows, step] = chosen
                finished = finished | torch.isin(chosen, stops)
                ended_here = None if on_token is None else on_token(rows, chosen)
                if ended_here is not None:
                    finished = finished | ended_here.to(device)
                ended = int(finished.sum())
                if ended == len(rows):
                    return new_ids[:, : step + 1]
                if ended >= DROP_AT * len(rows):
                    kept = (~finished).nonzero()[:, 0]
                    rows, chosen, finished = rows[kept], chosen[kept], finished[kept]
                    step_ids = step_ids[kept]
                    mask = None if mask is None else mask[kept]
                    uniform = None if uniform is None else uniform[kept]
                    if cache is not None:
                        cache.batch_select_indices(kept)
                new = chosen[:, None]
                step_ids = new if cache is not None else torch.cat((step_ids, new), 1)
        return new_ids

    def _by_length(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        max_new_tokens: int,
        seeds: Sequence[int] | None,
        on_token: Callable[[Tensor, Tensor], Tensor | None] | None,
        options: dict[str, Any],
    ) -> Tensor:
        """看得见左填充的模型：只有等长的几行一起算，参数与返回值同 ``generate_ids``。"""
        lengths = attention_mask.sum(-1)
        new_ids = input_ids.new_full((len(input_ids), max_new_tokens), self.pad_id)
        longest = 0
        for length in sorted(set(lengths.tolist())):
            rows = (lengths == length).nonzero()[:, 0]

            def of_all(at: Tensor, ids: Tensor, rows: Tensor = rows) -> Tensor | None:
                return None if on_token is None else on_token(rows[at], ids)

            part = self.generate_ids(
                input_ids[rows, -length:],
                max_new_tokens=max_new_tokens,
                seeds=None if seeds is None else [seeds[row] for row in rows.tolist()],
                on_token=of_all,
                **options,
            )
            new_ids[rows, : part.shape[1]] = part
            longest = max(longest, part.shape[1])
        return new_ids[:, :longest]

    def _encode(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        if not prompts:
            raise DistillabError("prompts is empty, expected at least one prompt")
        rows: list[list[int]] = []
        for prompt in prompts:
            ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
            if not ids:
                if self._start_id is None:
                    raise DistillabError(
                        "prompt is empty and the tokenizer has neither a bos token nor "
                        "<|endoftext|>: give at least one token"
                    )
                ids = [self._start_id]
            rows.append(ids)
        return rows


class _Streamer:
    """把逐个到来的 token 变成不断字的文本片段。"""

    def __init__(
        self, generator: TextGenerator, emit: Callable[[str], object], before: list[int]
    ) -> None:
        self._generator, self._emit, self._before = generator, emit, before
        self._ids: list[int] = []
        self._emitted = ""

    def put(self, token: int) -> None:
        if token in self._generator.stop_ids:
            return
        self._ids.append(token)
        # 每次从头解码：有的 tokenizer 会去掉片段开头的空格，分段解码再拼接并不等于整体。
        text = self._text()
        # 一个汉字的几个字节可能分在几个 token 里，没凑齐时解码成 U+FFFD，先扣住不发。
        if not text.endswith("\ufffd"):
            self._send(text)

    def finish(self) -> None:
        self._send(self._text())

    def _text(self) -> str:
        return continuation_text(self._generator.tokenizer, self._before, self._ids)

    def _send(self, text: str) -> None:
        piece = text[len(self._emitted) :]
        self._emitted = text
        if piece:
            self._emit(piece)
