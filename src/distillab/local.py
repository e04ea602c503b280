"""本地模型当教师：分批左填充、带 KV cache 地生成。

一个回答不取决于它碰巧与谁同批：

* ``temperature: 0`` 是贪心；大于 0 时每个问题用自己的种子取随机数，与批的大小、组成、先后无关。
* 同批的提示补齐之后仍各有 ``max_new_tokens`` 的余地；做不到的只与等长的同批。
* 剩下的差别是浮点舍入：填充与批的大小会改变矩阵乘的求和次序，两个 token 几乎并列时可能选另一个。
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import SamplingConfig
from .errors import DistillabError
from .generate import TextGenerator, filter_top_k, filter_top_p
from .language_model import LanguageModel
from .questions import TOO_LONG, Answer, Outcome, Question
from .targets import Head

__all__ = ["LocalBackend", "sample_tokens"]


def sample_tokens(logits: Tensor, uniform: Tensor) -> Tensor:
    """按 softmax 的概率各取一个 token：累积分布的反函数，每行只用一个随机数。

    Args:
        logits: ``[B, V]``，去掉的 token 为 ``-inf``。
        uniform: ``[B]``，float64，``[0, 1)`` 上的均匀分布。

    Returns:
        ``[B]``，int64。
    """
    # float64：float32 累加十几万项，尾部的概率会被舍入吃掉。
    cumulative = logits.double().softmax(-1).cumsum(-1)  # (B, V)
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


class LocalBackend:
    """由本地模型回答。

    Args:
        model: 教师。
        tokenizer: 它的 tokenizer。
        render_prompt: 消息 → 提示的 token，到轮到教师开口为止。
        sampling: 采样；``top_k`` 与 ``top_p`` 都给时先 k 后 p。
        batch_size: 一起生成的问题数。
        name: 写进每一行的模型名。
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Any,
        render_prompt: Callable[[list[dict[str, Any]]], list[int]],
        sampling: SamplingConfig,
        batch_size: int,
        *,
        name: str,
    ) -> None:
        self.name = name
        self._render = render_prompt
        self._sampling, self._batch_size = sampling, batch_size
        self._tokenizer = tokenizer
        self._model = _SamplingModel(model, sampling)
        self._generator = TextGenerator(self._model, tokenizer)

    def describe(self) -> dict[str, Any]:
        """写进来历的信息。"""
        return {"kind": "local", "model": self.name}

    def answer(
        self, questions: Sequence[Question], stopped: Callable[[], bool]
    ) -> Generator[Sequence[Outcome], None, None]:
        """由长到短一批一批回答：显存不够的话，第一批就知道。

        Raises:
            DistillabError: 显存不够，或提示渲染不出。
        """
        prompts: dict[str, list[int]] = {}
        for question in questions:
            if question.task.id not in prompts:
                prompts[question.task.id] = self._render(question.task.messages)
        limit = self._model.max_seq_len
        too_long = [q for q in questions if len(prompts[q.task.id]) >= limit]
        if too_long:
            yield [self._refused(q, len(prompts[q.task.id])) for q in too_long]
        fitting = [q for q in questions if len(prompts[q.task.id]) < limit]
        for batch in self._batches(fitting, {q.task.id: len(prompts[q.task.id]) for q in fitting}):
            if stopped():
                return
            yield self._answers(batch, [prompts[question.task.id] for question in batch])

    def _batches(
        self, questions: list[Question], lengths: dict[str, int]
    ) -> Generator[list[Question], None, None]:
        roomy = self._model.max_seq_len - self._sampling.max_new_tokens

        def group(question: Question) -> int:
            # 余地不足的，补齐到别人的长度会让它更早停下，所以只与等长的同批。
            return max(lengths[question.task.id], roomy)

        ordered = sorted(questions, key=lambda question: -lengths[question.task.id])
        for _, members in itertools.groupby(ordered, group):
            while batch := list(itertools.islice(members, self._batch_size)):
                yield batch

    def _answers(self, batch: list[Question], prompts: list[list[int]]) -> list[Answer]:
        width = max(map(len, prompts))
        device = self._model.head.weight.device
        pad = self._generator.pad_id
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
        mask = None
        if any(len(prompt) < width for prompt in prompts):
            rows = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
            mask = torch.tensor(rows, device=device)
        self._model.begin([question.seed for question in batch])
        try:
            new_ids = self._generator.generate_ids(
                ids, mask, strategy="greedy", max_new_tokens=self._sampling.max_new_tokens
            )
        except torch.OutOfMemoryError as error:
            raise DistillabError(
                f"out of memory with {len(batch)} prompts of up to {width} tokens at once: "
                f"lower synthesize.batch_size={self._batch_size}"
            ) from error
        return [
            self._answer(question, row)
            for question, row in zip(batch, new_ids.tolist(), strict=True)
        ]

    def _answer(self, question: Question, ids: list[int]) -> Answer:
        stops = self._generator.stop_ids
        end = next((index for index, token in enumerate(ids) if token in stops), None)
        return Answer(
            question,
            self._tokenizer.decode(
                ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
            ),
            finish_reason="length" if end is None else "stop",
            model=self.name,
            tokens=len(ids) if end is None else end + 1,
            seed=question.seed if self._sampling.temperature > 0 else None,
        )

    def _refused(self, question: Question, length: int) -> Answer:
        return Answer(
            question,
            "",
            finish_reason=TOO_LONG,
            model=self.name,
            tokens=0,
            error=f"the prompt has {length} tokens, expected fewer than the context of "
            f"{self._model.max_seq_len}",
        )


class _SamplingModel(LanguageModel):
    """包着教师：它的「贪心」就是按 ``sampling`` 采样，每行用自己的随机数。

    ``TextGenerator`` 的采样整批共用一个随机数发生器，回答就会取决于同批有谁；在 head 的出口
    换掉 logits，仍走它的解码循环。
    """

    def __init__(self, model: LanguageModel, sampling: SamplingConfig) -> None:
        super().__init__()
        self.model = model
        self.sampling = sampling
        self._uniform: list[Tensor] = []

    def begin(self, seeds: Sequence[int]) -> None:
        """开始一批：每行取好全部随机数 ``[N, B]``；在 CPU 上取，换设备也是同一串。"""
        if self.sampling.temperature == 0:
            return
        rows = [
            torch.rand(
                self.sampling.max_new_tokens,
                dtype=torch.float64,
                generator=torch.Generator().manual_seed(seed),
            )
            for seed in seeds
        ]
        self._uniform = list(torch.stack(rows, dim=1).to(self.model.head.weight.device))
        self._uniform.reverse()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: Any = None
    ) -> Tensor:
        """同教师。"""
        hidden: Tensor = self.model(input_ids, attention_mask, cache)
        return hidden

    @property
    def head(self) -> Head:
        """教师的 head；采样时在出口换掉 logits。"""
        head = self.model.head
        if self.sampling.temperature == 0:
            return head
        return _SamplingHead(head.weight, head.bias, head.scale, head.softcap, self._sampled)

    @property
    def max_seq_len(self) -> int:
        """同教师。"""
        return self.model.max_seq_len

    def new_cache(self) -> Any:
        """同教师。"""
        return self.model.new_cache()

    def enable_activation_checkpointing(self) -> None:
        """只用于训练。"""
        self.model.enable_activation_checkpointing()

    def _sampled(self, logits: Tensor) -> Tensor:
        """``[B, V]`` → 选中的为 0、其余为 ``-inf``。"""
        logits = logits / self.sampling.temperature
        if self.sampling.top_k is not None:
            logits = filter_top_k(logits, self.sampling.top_k)
        if self.sampling.top_p is not None:
            logits = filter_top_p(logits, self.sampling.top_p)
        chosen = sample_tokens(logits, self._uniform.pop())
        return torch.full_like(logits, -torch.inf).scatter(1, chosen[:, None], 0.0)


@dataclass(frozen=True)
class _SamplingHead(Head):
    choose: Callable[[Tensor], Tensor] = lambda logits: logits

    def logits(self, hidden: Tensor) -> Tensor:
        return self.choose(super().logits(hidden))

    def cut(self, limit: int) -> Head:
        head = super().cut(limit)
        return _SamplingHead(head.weight, head.bias, head.scale, head.softcap, self.choose)
