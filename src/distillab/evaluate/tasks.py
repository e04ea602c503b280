"""训练前后各考一次的任务：教师读着经验答，学生只读问题，对不对由程序核对。

三种：写出回答再核对（``exact``、``regex``、``function``）；``reasoning-gym`` 出题并判分；在选项里
取似然最大的（``choice``）。都分批、由长到短，同一份 prompt 只分词一次。
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

from transformers import PreTrainedTokenizerBase

from ..config.sections import DataSection, SamplingConfig, TaskConfig
from ..config.style import USUAL, Style
from ..data.chat import render_prompt, text_ids
from ..data.conversations import Conversation
from ..data.pairs import Pair, load_pairs, with_experience
from ..errors import DistillabError, located, typed_reason
from ..files import replace_file
from ..generate.generator import TextGenerator
from ..generate.likelihood import likelihoods
from ..generate.respond import respond
from ..models.interface import LanguageModel
from ..models.tokenizer import own_vocabulary
from ..parsing import parse_json
from ..run_file_shapes import ANSWERS_ROW, check
from ..synthesize.filters import make_filter, needs_answer
from ..synthesize.questions import check_tasks
from .problems import Choices, Score, generated, read_choices
from .subjects import Side, Subject

logger = logging.getLogger("distillab")

BATCH_SIZE = 16
"""一起回答的问题数，或一起算的选项数。"""


class _Row(TypedDict):
    id: str
    question: str
    answer: str | None
    response: str
    correct: bool


class TaskRow(_Row, total=False):
    """一个问题的结果，``checks/NAME.MODEL.jsonl`` 里的一行。

    ``score`` 只有 ``reasoning-gym`` 的题才有，``[0, 1]``，1 才算对；``log_likelihoods`` 只有选择题
    才有，是各个选项的 log 似然之和，单位 nat，``response`` 是选中的那个。
    """

    score: float
    log_likelihoods: list[float]


@dataclass(frozen=True)
class TaskSet(ABC):
    """一个任务的全部问题：每个问题的两个视角，与怎样渲染它们。"""

    name: str
    pairs: list[Pair]
    style: Style
    _prompts: dict[tuple[Any, Side], list[list[int]]] = field(
        default_factory=dict, init=False, repr=False
    )

    @staticmethod
    def load(name: str, config: TaskConfig, style: Style = USUAL) -> TaskSet:
        """读入并查对：读不了，两个视角配不上，或有一题没法核对，是 ``DistillabError``。"""
        where = f"evaluate.tasks.{name}"
        match = config.match
        if match is not None and match.choice is None:
            judge: Score = make_filter(match, f"{where}.match")
        if config.generator is not None:
            conversations, judge = generated(config.generator, f"{where}.generator")
        with located(where):
            if config.generator is not None:
                pairs = with_experience(conversations, config)
            else:
                own = config.model_dump(exclude={"generator", "match", "max_new_tokens"})
                pairs, _ = load_pairs(DataSection(format="chat", **own), need_response=False)
            compares = "match" if needs_answer(match) else None
            check_tasks([pair.task("student") for pair in pairs], compares)
        if match is not None and match.choice is not None:
            choices = []
            for pair in pairs:  # 选项写在哪个文件里都行，都写了以学生的为准
                own = {k: v for k, v in pair.student.record.items() if v is not None}
                record = pair.teacher.record | own
                choices.append(read_choices(record, f"{where}: {pair.student.where}"))
            return ChoiceTask(name, pairs, style, choices, match.choice)
        return ResponseTask(name, pairs, style, judge, config.max_new_tokens)

    def check_fits(self, subject: Subject) -> None:
        """训练之前就查每个 prompt 都渲染得出、连同回答放得进模型的上下文。"""
        limit, side = subject.model.max_seq_len, subject.side
        after = self._after(subject.tokenizer)
        for pair, prompt, more in zip(self.pairs, self._read(subject), after, strict=True):
            if len(prompt) + more > limit:
                expected = f", expected fewer than its longest sequence {limit}"
                if more > 1:
                    expected = f" and its longest choice {more}, expected at most {limit} together"
                raise DistillabError(
                    f"{self._where(getattr(pair, side))}: the {side}'s prompt has {len(prompt)} "
                    f"tokens{expected}"
                )

    def ask(self, subject: Subject, save_to: Path | None = None) -> list[TaskRow]:
        """考每个问题，每个一行，按数据的先后；先要 ``check_fits``，使用者的 ``match`` 出错是
        ``DistillabError``。结果写进 ``save_to``；已经有了就读回来，不再问，中断过的运行因而接得上。
        """
        if save_to is not None and save_to.exists():
            with suppress(DistillabError):
                lines = save_to.read_bytes().splitlines()
                saved: list[TaskRow] = [parse_json(line, str(save_to)) for line in lines]
                check(saved, [ANSWERS_ROW], str(save_to))
                if len(saved) == len(self.pairs):
                    return saved
            logger.warning("%s cannot be read: measured again", save_to)
        with subject.active() as model:
            rows = self._rows(model, subject)
        if save_to is not None:
            save_to.parent.mkdir(parents=True, exist_ok=True)
            written = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            replace_file(save_to, "".join(written))
        return rows

    @abstractmethod
    def _after(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """每个 prompt 之后至少要放得下几个 token。"""

    @abstractmethod
    def _rows(self, model: LanguageModel, subject: Subject) -> list[TaskRow]:
        """``model`` 是可以用的 ``subject.model``。"""

    def _read(self, subject: Subject) -> list[list[int]]:
        """每个问题渲染好的 prompt；同一个 tokenizer 只渲染一次。"""
        key = subject.tokenizer, subject.side
        if key not in self._prompts:
            found = []
            for view in (getattr(pair, subject.side) for pair in self.pairs):
                with located(self._where(view)):
                    style = self.style.with_tools(view.tools)
                    found.append(render_prompt(view.prompt, subject.tokenizer, style))
            self._prompts[key] = found
        return self._prompts[key]

    def _where(self, conversation: Conversation) -> str:
        return f"evaluate.tasks.{self.name}: {conversation.where}"


@dataclass(frozen=True)
class ResponseTask(TaskSet):
    """模型贪心地写出回答，再判分；得 1 分才算对，部分分只记在行里。"""

    judge: Score
    max_new_tokens: int

    def _after(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        return [1] * len(self.pairs)

    def _rows(self, model: LanguageModel, subject: Subject) -> list[TaskRow]:
        generator = TextGenerator(model, subject.tokenizer)
        batches = respond(
            generator,
            self._read(subject),
            SamplingConfig(temperature=0.0, max_new_tokens=self.max_new_tokens),
            seeds=[0] * len(self.pairs),
            batch_size=BATCH_SIZE,
            lower=f"evaluate.tasks.{self.name}.max_new_tokens={self.max_new_tokens}",
        )
        answers = {row: generator.decode(ids) for batch in batches for row, ids in batch.items()}
        return [self._row(pair, answers[row]) for row, pair in enumerate(self.pairs)]

    def _row(self, pair: Pair, response: str) -> TaskRow:
        student = pair.student
        try:
            score = self.judge(student.record, student.answer, response)
        except Exception as error:  # 使用者的函数可能抛出任何异常
            raise DistillabError(
                f"evaluate.tasks.{self.name}.match failed on the response to {pair.key!r}: "
                f"{typed_reason(error)}"
            ) from error
        row = TaskRow(
            id=pair.key,
            question=student.question,
            answer=student.answer,
            response=response,
            correct=score >= 1,
        )
        if not isinstance(score, bool):
            row["score"] = score
        return row


@dataclass(frozen=True)
class ChoiceTask(TaskSet):
    """模型在渲染好的 prompt 之后给每个选项的 token 打分，似然最大的就是它的回答，并列取前一个。

    ``sum`` 比较 log 似然之和，同 lm-evaluation-harness 的 ``acc``；``mean`` 除以选项自己的 token
    数，与那里的 ``acc_norm`` 用意相同，但那里除以字符数。说完的标记不算在选项里。
    """

    choices: list[Choices]
    by: Literal["sum", "mean"]
    _texts: dict[Any, list[list[list[int]]]] = field(default_factory=dict, init=False, repr=False)

    def _after(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        return [max(map(len, texts)) for texts in self._encoded(tokenizer)]

    def _encoded(self, tokenizer: PreTrainedTokenizerBase) -> list[list[list[int]]]:
        """各个问题的各个选项的 token。"""
        if tokenizer not in self._texts:
            encoded = []
            for pair, choices in zip(self.pairs, self.choices, strict=True):
                ids = [text_ids(text, tokenizer, self.style) for text in choices.texts]
                if [] in ids:
                    where, text = self._where(pair.student), choices.texts[ids.index([])]
                    raise DistillabError(f"{where}: the choice {text!r} has no token")
                encoded.append(ids)
            self._texts[tokenizer] = encoded
        return self._texts[tokenizer]

    def _rows(self, model: LanguageModel, subject: Subject) -> list[TaskRow]:
        texts = self._encoded(subject.tokenizer)
        requests = [
            (prompt, choice)
            for prompt, choices in zip(self._read(subject), texts, strict=True)
            for choice in choices
        ]
        vocabulary = own_vocabulary(subject.tokenizer)
        found = iter(likelihoods(model, requests, vocabulary=vocabulary, batch_size=BATCH_SIZE))
        rows = []
        for pair, choices in zip(self.pairs, self.choices, strict=True):
            scored = [next(found) for _ in choices.texts]
            values = [one.total / (one.tokens if self.by == "mean" else 1) for one in scored]
            chosen = values.index(max(values))
            rows.append(
                TaskRow(
                    id=pair.key,
                    question=pair.student.question,
                    answer=choices.texts[choices.right],
                    response=choices.texts[chosen],
                    correct=chosen == choices.right,
                    log_likelihoods=[one.total for one in scored],
                )
            )
        return rows


def accuracy(rows: Sequence[TaskRow]) -> float:
    """答对的份额，``[0, 1]``。"""
    return sum(row["correct"] for row in rows) / len(rows)
