"""本地模型当教师；一个回答不取决于它碰巧与谁同批，见 ``generate/respond.py``。"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from ..config.sections import SamplingConfig
from ..data.pairs import Task
from ..generate.generator import TextGenerator
from ..generate.respond import respond
from .questions import TOO_LONG, Answer, Outcome, Question


@dataclass(frozen=True)
class LocalBackend:
    """由本地模型回答；``temperature`` 大于 0 时每个问题用自己的种子。"""

    generator: TextGenerator
    prompt: Callable[[Task], list[int]]  # 任务的提示的 token，到轮到教师开口为止
    sampling: SamplingConfig
    batch_size: int
    name: str  # 写进每一行的模型名

    def describe(self) -> dict[str, Any]:
        """写进来历的信息。"""
        return {"kind": "local", "model": self.name}

    def answer(
        self, questions: Sequence[Question], stopped: Callable[[], bool]
    ) -> Generator[Sequence[Outcome], None, None]:
        """由长到短一批一批回答；显存不够，或提示渲染不出，就是 ``DistillabError``。"""
        tasks = {question.task.id: question.task for question in questions}
        prompts = {key: self.prompt(task) for key, task in tasks.items()}
        limit = self.generator.model.max_seq_len
        too_long = [q for q in questions if len(prompts[q.task.id]) >= limit]
        if too_long:
            yield [self._refused(q, len(prompts[q.task.id]), limit) for q in too_long]
        fitting = [q for q in questions if len(prompts[q.task.id]) < limit]
        batches = respond(
            self.generator,
            [prompts[q.task.id] for q in fitting],
            self.sampling,
            [q.seed for q in fitting],
            batch_size=self.batch_size,
            lower=f"synthesize.batch_size={self.batch_size}",
        )
        while not stopped() and (batch := next(batches, None)):
            yield [self._answer(fitting[row], ids) for row, ids in batch.items()]

    def _answer(self, question: Question, ids: list[int]) -> Answer:
        return Answer(
            question,
            self.generator.decode(ids),
            finish_reason="stop" if ids[-1] in self.generator.stop_ids else "length",
            model=self.name,
            tokens=len(ids),
            seed=question.seed if self.sampling.temperature > 0 else None,
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
