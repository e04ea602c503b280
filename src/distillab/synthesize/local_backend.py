"""本地模型当教师：分批左填充、带 KV cache 地生成。

一个回答不取决于它碰巧与谁同批：

* ``temperature: 0`` 是贪心；大于 0 时每个问题用自己的种子取随机数，与批的大小、组成、先后无关。
* 同批的提示补齐之后仍各有 ``max_new_tokens`` 的余地；做不到的只与等长的同批。
* 剩下的差别是浮点舍入：填充与批的大小会改变矩阵乘的求和次序，两个 token 几乎并列时可能选另一个。
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch

from ..config.sections import SamplingConfig
from ..data.pairs import Task
from ..errors import DistillabError
from ..generate.generator import TextGenerator, left_pad, until_stop
from ..generate.sampling import sampling_options
from ..models.interface import LanguageModel
from .questions import TOO_LONG, Answer, Outcome, Question

__all__ = ["LocalBackend"]


class LocalBackend:
    """由本地模型回答。

    Args:
        model: 教师。
        tokenizer: 它的 tokenizer。
        prompt: 任务 → 提示的 token，到轮到教师开口为止。
        sampling: 采样。
        batch_size: 一起生成的问题数。
        name: 写进每一行的模型名。
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Any,
        prompt: Callable[[Task], list[int]],
        sampling: SamplingConfig,
        batch_size: int,
        *,
        name: str,
    ) -> None:
        self.name = name
        self._prompt = prompt
        self._sampling, self._batch_size = sampling, batch_size
        self._model = model
        self._generator = TextGenerator(model, tokenizer)

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
                prompts[question.task.id] = self._prompt(question.task)
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
        device = self._model.head.weight.device
        ids, mask = left_pad(prompts, self._generator.pad_id, device)
        strategy, options = sampling_options(self._sampling)
        try:
            new_ids = self._generator.generate_ids(
                ids,
                mask,
                strategy=strategy,
                max_new_tokens=self._sampling.max_new_tokens,
                seeds=[question.seed for question in batch],
                **options,
            )
        except torch.OutOfMemoryError as error:
            raise DistillabError(
                f"out of memory with {len(batch)} prompts of up to {ids.shape[1]} tokens at once: "
                f"lower synthesize.batch_size={self._batch_size}"
            ) from error
        return [
            self._answer(question, row)
            for question, row in zip(batch, new_ids.tolist(), strict=True)
        ]

    def _answer(self, question: Question, row: list[int]) -> Answer:
        ids = until_stop(row, self._generator.stop_ids)
        return Answer(
            question,
            self._generator.decode(ids),
            finish_reason="stop" if ids[-1] in self._generator.stop_ids else "length",
            model=self.name,
            tokens=len(ids),
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
