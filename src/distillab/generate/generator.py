"""自回归文本生成：贪心、top-k、top-p 与纯采样；只依赖 ``LanguageModel`` 接口，教师与学生通用。"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import DistillabError
from ..models.interface import LanguageModel, evaluating
from ..models.tokenizer import continuation_text, own_vocabulary
from ..vocabulary import Vocabulary
from .decoding import CHECK_EVERY, decoding
from .own_form import joined_form, own_form
from .sampling import Strategy, check_options, next_tokens, row_seeds, uniform_draws
from .stops import pad_id, stop_ids, until_stop
from .weights import sampling_logits, sampling_weights

FIXED_SHAPES_ON = ("cuda",)
"""这些设备上用形状固定的缓存，隔几步才问谁停下了；CPU 上多算的比省下的多。"""

OnToken = Callable[[Tensor, Tensor], Tensor | None]
"""每一步得到新 token 后调用；参数与返回值见 ``TextGenerator.generate_ids``。"""


def padded(
    rows: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device,
    side: Literal["left", "right"] = "left",
) -> tuple[Tensor, Tensor | None]:
    """长短不一的几行拼成一批 ``(input_ids [B, T], attention_mask [B, T])``，int64。

    填在左边时最后一列总是真实 token，新 token 才能接在每一行后面。各行一样长时 mask 为 ``None``，
    注意力可以走快速路径。
    """
    width = max(map(len, rows))

    def filled(row: Sequence[int], token: int) -> list[int]:
        rest = [token] * (width - len(row))
        return [*rest, *row] if side == "left" else [*row, *rest]

    input_ids = torch.tensor([filled(row, pad_id) for row in rows], device=device)
    if all(len(row) == width for row in rows):
        return input_ids, None
    mask = [filled([1] * len(row), 0) for row in rows]
    return input_ids, torch.tensor(mask, device=device)


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
        self.pad_id = pad_id(tokenizer, self.stop_ids) or 0
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
        if not rows:
            raise DistillabError("prompts is empty, expected at least one prompt")
        encoded = [self._encoded(prompt) for prompt in rows]
        before = [
            ids if isinstance(prompt, str) else []
            for prompt, ids in zip(rows, encoded, strict=True)
        ]  # 对话的回答自成一段，不接着 prompt 读
        streamer = None
        if stream is not None:
            streamer = _Streamer(lambda ids: self.decode(ids, before[0]), stream)
        new_ids = self.generate_ids(
            *padded(encoded, self.pad_id, self.model.head.weight.device),
            strategy=strategy,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seeds=row_seeds(seed, len(rows)),
            on_token=streamer,
        )
        texts = [self.decode(row, own) for row, own in zip(new_ids.tolist(), before, strict=True)]
        if streamer is not None:
            streamer.send(texts[0])
        return texts

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
        on_token: OnToken | None = None,
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
        if strategy == "greedy":
            seeds = None
        elif seeds is None:
            seeds = row_seeds(None, len(input_ids))
        choose = partial(
            next_tokens, strategy=strategy, temperature=temperature, top_k=top_k, top_p=top_p
        )
        if attention_mask is None or self.model.pads_left:
            return self._continue(
                input_ids, attention_mask, choose, max_new_tokens, seeds, on_token
            )
        # 看得见左填充的模型：只有等长的几行一起算。
        lengths = attention_mask.sum(-1)
        new_ids = input_ids.new_full((len(input_ids), max_new_tokens), self.pad_id)
        longest = 0
        for length in sorted(set(lengths.tolist())):
            rows = (lengths == length).nonzero()[:, 0]

            def of_all(at: Tensor, ids: Tensor, rows: Tensor = rows) -> Tensor | None:
                return None if on_token is None else on_token(rows[at], ids)

            part = self._continue(
                input_ids[rows, -length:],
                None,
                choose,
                max_new_tokens,
                seeds and [seeds[row] for row in rows.tolist()],
                of_all,
            )
            new_ids[rows, : part.shape[1]] = part
            longest = max(longest, part.shape[1])
        return new_ids[:, :longest]

    def _continue(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        choose: Callable[..., Tensor],
        max_new_tokens: int,
        seeds: Sequence[int] | None,
        on_token: OnToken | None,
    ) -> Tensor:
        """``generate_ids`` 的循环；贪心没有 ``seeds``。"""
        batch, width = input_ids.shape
        room = self.model.max_seq_len - width
        if room < 1:
            raise DistillabError(
                f"prompt has {width} tokens, expected fewer than "
                f"max_seq_len={self.model.max_seq_len}: shorten it"
            )
        device = input_ids.device
        on_gpu = device.type in FIXED_SHAPES_ON
        uniform = None  # 或 (B, N)
        if seeds is not None:
            uniform = uniform_draws(seeds, max_new_tokens).to(device)
        limit = min(max_new_tokens, room)
        model = own_form(self.model) if on_gpu else self.model
        with evaluating(self.model), sampling_weights(self.model, batch, limit):
            if on_gpu:
                model = joined_form(model, limit)
            run = decoding(
                static=on_gpu,
                model=model,
                # 填充行与空洞没有对应的文字，不能采到。
                logits=sampling_logits(self.model.head.cut(self.vocabulary)),
                choose=choose,
                input_ids=input_ids,
                mask=attention_mask,
                uniform=uniform,
                stops=torch.tensor(sorted(self.stop_ids), device=device, dtype=torch.long),
                pad_id=self.pad_id,
                limit=limit,
            )
            every = CHECK_EVERY if on_gpu and on_token is None else 1
            while run.done < limit:
                run.advance()
                if on_token is not None:
                    ended = on_token(run.rows, run.chosen.clone())
                    if ended is not None:
                        run.finished.logical_or_(ended.to(device))
                if run.done % every == 0 and not run.drop_finished():
                    break
            return run.new_ids[:, : run.done] if every == 1 else run.result()

    def _encoded(self, prompt: str | list[int]) -> list[int]:
        ids: list[int] = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        if ids:
            return ids
        if self._start_id is None:
            raise DistillabError(
                "prompt is empty and the tokenizer has neither a bos token nor <|endoftext|>: "
                "give at least one token"
            )
        return [self._start_id]


class _Streamer:
    """把逐个到来的 token 变成不断字的文本片段。"""

    def __init__(self, decode: Callable[[list[int]], str], emit: Callable[[str], object]) -> None:
        self._decode, self._emit = decode, emit
        self._ids: list[int] = []
        self._emitted = 0

    def __call__(self, _rows: Tensor, new_ids: Tensor) -> None:
        self._ids.append(int(new_ids[0]))
        # 每次从头解码：有的 tokenizer 会去掉片段开头的空格，分段解码再拼接并不等于整体。
        text = self._decode(self._ids)
        # 一个汉字的几个字节可能分在几个 token 里，没凑齐时解码成 U+FFFD，先扣住不发。
        if not text.endswith("\ufffd"):
            self.send(text)

    def send(self, text: str) -> None:
        piece = text[self._emitted :]
        self._emitted = len(text)
        if piece:
            self._emit(piece)
