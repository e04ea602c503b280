"""训练前后各考一次的任务：教师读着经验答，学生只读问题，回答由程序核对。"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from .cache import replace_file
from .chat import render_prompt
from .config import DataSection, SamplingConfig, TaskConfig
from .conversations import Conversation
from .errors import DistillabError
from .filters import Filter, make_filter, needs_answer
from .language_model import LanguageModel
from .local import LocalBackend
from .paired import Pair, load_pairs
from .questions import Answer, Question, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_SIZE = 16
"""一起回答的问题数。"""


class TaskRow(TypedDict):
    """一个问题的结果，``checks/NAME.MODEL.jsonl`` 里的一行。"""

    id: str
    question: str
    answer: str | None
    response: str
    correct: bool


@dataclass(frozen=True)
class TaskSet:
    """一个任务的全部问题。

    Attributes:
        name: 配方里的名字。
        pairs: 每个问题的两个视角。
        match: 回答对不对。
        max_new_tokens: 最长的回答。
        template_options: chat template 的选项。
    """

    name: str
    pairs: list[Pair]
    match: Filter
    max_new_tokens: int
    template_options: Mapping[str, Any]

    @classmethod
    def load(cls, name: str, config: TaskConfig, template_options: Mapping[str, Any]) -> TaskSet:
        """读入并查对；训练之前就知道它能不能考。

        Raises:
            DistillabError: 读不了，两个视角配不上，id 重复，要核对的记录没有 ``answer``。
        """
        where = f"evaluate.tasks.{name}"
        match = make_filter(config.match, f"{where}.match")
        own = config.model_dump(exclude={"match", "max_new_tokens"})
        try:
            pairs, _ = load_pairs(DataSection(format="chat", **own), need_response=False)
        except DistillabError as error:
            raise DistillabError(f"{where}: {error}") from error
        if not pairs:
            raise DistillabError(f"{where}: {config.source} has no question")
        seen: set[str] = set()
        for pair in pairs:
            if pair.key in seen:
                raise DistillabError(
                    f"{where}: {pair.student.where}: the id or question {pair.key!r} is there twice"
                )
            seen.add(pair.key)
            if pair.student.answer is None and needs_answer(config.match):
                raise DistillabError(
                    f"{where}: {pair.student.where}: expected answer, which match compares with"
                )
        return cls(name, pairs, match, config.max_new_tokens, template_options)

    def check_fits(
        self,
        model: LanguageModel,
        tokenizer: PreTrainedTokenizerBase,
        view: Literal["student", "teacher"],
    ) -> None:
        """训练之前就查每个 prompt 都渲染得出、放得进模型的上下文；参数同 ``ask``。

        Raises:
            DistillabError: 有一个渲染不出，或放不下。
        """
        for pair in self.pairs:
            side: Conversation = getattr(pair, view)
            where = f"evaluate.tasks.{self.name}: {side.where}"
            try:
                prompt = render_prompt(
                    side.prompt, tokenizer, template_options=self.template_options
                )
            except DistillabError as error:
                raise DistillabError(f"{where}: {error}") from error
            if len(prompt) >= model.max_seq_len:
                raise DistillabError(
                    f"{where}: the {view}'s prompt has {len(prompt)} tokens, expected fewer than "
                    f"its longest sequence {model.max_seq_len}"
                )

    def ask(
        self,
        model: LanguageModel,
        tokenizer: PreTrainedTokenizerBase,
        view: Literal["student", "teacher"],
        save_to: Path | None = None,
    ) -> list[TaskRow]:
        """贪心地回答每个问题并核对；先要 ``check_fits``。

        Args:
            model: 回答的模型。
            tokenizer: 它的 tokenizer。
            view: 读哪个视角的 prompt。
            save_to: 写下结果的 jsonl；已经有了就读回来，不再问，中断过的运行因而接得上。

        Returns:
            每个问题一行，按数据的先后。

        Raises:
            DistillabError: 使用者的 ``match`` 出错。
        """
        if save_to is not None and save_to.exists():
            with save_to.open(encoding="utf-8") as file:
                return [json.loads(line) for line in file]
        backend = LocalBackend(
            model,
            tokenizer,
            partial(render_prompt, tokenizer=tokenizer, template_options=self.template_options),
            SamplingConfig(temperature=0.0, max_new_tokens=self.max_new_tokens),
            BATCH_SIZE,
            name=view,
        )
        tasks = [
            Task(pair.key, getattr(pair, view).prompt, pair.student.answer, pair.student.record)
            for pair in self.pairs
        ]
        answers = {
            answer.question.task.id: answer
            for batch in backend.answer([Question(task, 0, 0) for task in tasks], lambda: False)
            for answer in batch
            if isinstance(answer, Answer)  # 本地模型总会答
        }
        rows = [self._row(pair, answers[pair.key]) for pair in self.pairs]
        if save_to is not None:
            save_to.parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            replace_file(save_to, "".join(lines))
        return rows

    def _row(self, pair: Pair, answer: Answer) -> TaskRow:
        try:
            correct = self.match(pair.student.record, pair.student.answer, answer.response)
        except Exception as error:  # 使用者的函数可能抛出任何异常
            raise DistillabError(
                f"evaluate.tasks.{self.name}.match failed on the response to {pair.key!r}: "
                f"{type(error).__name__}: {(str(error).splitlines() or ['no detail'])[0]}"
            ) from error
        return TaskRow(
            id=pair.key,
            question=pair.student.question,
            answer=pair.student.answer,
            response=answer.response,
            correct=correct,
        )


def accuracy(rows: Sequence[TaskRow]) -> float:
    """答对的份额，``[0, 1]``。"""
    return sum(row["correct"] for row in rows) / len(rows)


def gap_closed(teacher: float | None, before: float, after: float) -> float | None:
    """``(after - before) / (teacher - before)``；教师不比学生好时没有意义，为 ``None``。"""
    if teacher is None or teacher <= before:
        return None
    return (after - before) / (teacher - before)
