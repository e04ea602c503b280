"""本地模型当教师；一个回答不取决于它碰巧与谁同批，见 ``generate/respond.py``。"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

from ..config.sections import SamplingConfig
from ..data.pairs import Task
from ..generate.generator import TextGenerator
from ..generate.respond import respond
from ..models.interface import LanguageModel
from .questions import TOO_LONG, Answer, Outcome, Question


class LocalBackend:
    """由本地模型回答。``prompt`` 给出任务的提示的 token，到轮到教师开口为止；``temperature`` 大于 0
    时每个问题用自己的种子；``name`` 是写进每一行的模型名。
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
        self._generator = TextGenerator(model, tokenizer)

    def describe(self) -> dict[str, Any]:
        """写进来历的信息。"""
        return {"kind": "local", "model": self.name}

    def answer(
        self, questions: Sequence[Question], stopped: Callable[[], bool]
    ) -> Generator[Sequence[Outcome], None, None]:
        """由长到短一批一批回答；显存不够，或提示渲染不出，就是 ``DistillabError``。"""
        tasks = {question.task.id: question.task for question in questions}
        prompts = {key: self._prompt(task) for key, task in tasks.items()}
        limit = self._generator.model.max_seq_len
        too_long = [q for q in questions if len(prompts[q.task.id]) >= limit]
        if too_long:
            yield [self._refused(q, len(prompts[q.task.id]), limit) for q in too_long]
        fitting = [q for q in questions if len(prompts[q.task.id]) < limit]
        batches = respond(
            self._generator,
            [prompts[q.task.id] for q in fitting],
            self._sampling,
            [q.seed for q in fitting],
            batch_size=self._batch_size,
            lower=f"synthesize.batch_size={self._batch_size}",
        )
        while not stopped() and (batch := next(batches, None)):
            yield [self._answer(fitting[row], ids) for row, ids in batch.items()]

    def _answer(self, question: Question, ids: list[int]) -> Answer:
        return Answer(
            question,
            self._generator.decode(ids),
            finish_reason="stop" if ids[-1] in self._generator.stop_ids else "length",
            model=self.name,
            tokens=len(ids),
            seed=question.seed if self._sampling.temperature > 0 else None,
        )

    def _refused(self, question: Question, length: int, limit: int) -> Answer:
        return Answer(
            question,
            "",
            finish_reason=TOO_LONG,
            model=self.name,
            tokens=0,
            error=f"the prompt has {length} tokens, expected fewer than the context of {limit}",
        )
