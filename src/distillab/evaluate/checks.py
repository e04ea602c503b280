"""训练前后各做一次的检查：任务的正确率，与旁的文本上的困惑度（忘了多少）。"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from ..assembly.parts import Parts
from ..assembly.training import aligned_collate, build_text
from ..batch import Batch, collate_text
from ..config.mixture import Data
from ..config.schema import EvaluateConfig
from ..config.sections import TextConfig
from ..data.chat import question_prompt
from ..errors import DistillabError
from ..figures import AFTER, BEFORE, LABELS, TEACHER, gap_closed
from ..files import replace_file
from ..generate.generator import TextGenerator
from ..models.interface import LanguageModel
from ..parsing import parse_json
from ..run_file_shapes import NUMBER, check
from ..train.trainer import DistillationTrainer
from .harness import check_harness
from .subjects import Subject
from .tasks import TaskSet, accuracy

logger = logging.getLogger("distillab")

When = Literal["student_before", "student_after"]


class Checks:
    """配方 ``evaluate.tasks`` 与 ``evaluate.texts`` 的全部检查，用训练循环的评测。

    结果写在 ``directory``（运行目录里的 ``checks/``）里，被杀之后接着来的运行不再做一遍。任务的
    prompt 放不进模型，或文本读不了时 ``DistillabError``。
    """

    def __init__(
        self,
        texts: Mapping[str, TextConfig],
        tasks: list[TaskSet],
        parts: Parts,
        trainer: DistillationTrainer,
        directory: Path,
    ) -> None:
        self.tasks, self.parts, self.trainer, self.directory = tasks, parts, trainer, directory
        self.teacher: dict[str, float] = {}  # 教师在各份文本上的困惑度：训练不改变它
        for task in tasks:
            for subject in _subjects(parts, BEFORE):
                task.check_fits(subject)
        collate: Callable[[Sequence[Any]], Batch]
        collate = partial(collate_text, vocabulary=parts.vocabulary)
        if parts.sides is not None:
            collate = aligned_collate(parts)
        self.texts = {
            name: trainer.evaluation_loader(
                build_text(config, parts.tokenizer), collate, config.max_sequences
            )
            for name, config in texts.items()
        }

    def measure(self, when: When) -> dict[str, dict[str, Any]]:
        """检查当前的学生，它的成绩以 ``when`` 为名；所有进程都要调用。返回
        ``{"tasks": {NAME: {模型: 正确率}}, "texts": {NAME: {模型: 困惑度}}}``，教师的成绩每次都在，
        没有的一类不出现。
        """
        found: dict[str, dict[str, Any]] = {}
        if self.texts:
            found["texts"] = {name: self._text(name, when) for name in self.texts}
        self.trainer.watch.at("tasks")
        if self.tasks:
            main = self.trainer.accelerator.is_main_process
            with whole_parts(self.parts, self.trainer, main) as parts:
                if main:
                    subjects = _subjects(parts, when)
                    found["tasks"] = {
                        task.name: {one.name: self._score(task, one) for one in subjects}
                        for task in self.tasks
                    }
        self.trainer.accelerator.wait_for_everyone()
        return found

    def _text(self, name: str, when: When) -> dict[str, float]:
        path = self.directory / f"{name}.{when}.json"
        if path.exists():
            with suppress(DistillabError):
                saved: dict[str, float] = parse_json(path.read_bytes(), str(path))
                check(saved, {f"{when}!": NUMBER, "*": NUMBER}, str(path))
                self.teacher |= {name: saved[TEACHER]} if TEACHER in saved else {}
                return saved
            logger.warning("%s cannot be read: measured again", path)
        known = name in self.teacher
        student, teacher = self.trainer.evaluate(loader=self.texts[name], teacher=not known)
        if teacher is not None:
            self.teacher[name] = teacher["perplexity"]
        found = {TEACHER: self.teacher[name]} if name in self.teacher else {}
        found[when] = student["perplexity"]
        shown = f"{student['perplexity']:,.2f}"
        logger.info("%s: perplexity on %s %s", LABELS[when].short, name, shown)
        if self.trainer.accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps(found))
        return found

    def _score(self, task: TaskSet, subject: Subject) -> float:
        save_to = self.directory / f"{task.name}.{subject.name}.jsonl"
        known = save_to.exists()
        started = time.perf_counter()
        rows = task.ask(subject, save_to)
        speed = len(rows) / (time.perf_counter() - started)
        shown = f"{accuracy(rows):.1%}" + ("" if known else f" ({speed:.1f} items/s)")
        logger.info("%s: %s %s", task.name, subject.label, shown)
        return accuracy(rows)


def _subjects(parts: Parts, student: str) -> list[Subject]:
    """教师（如果有）读着经验，学生以 ``student`` 为名。"""
    found = [Subject(student, parts.student, parts.tokenizer)]
    if (teacher := parts.teacher) is not None:
        adapters = teacher is not parts.student
        own = parts.teacher_tokenizer
        found.insert(0, Subject(TEACHER, teacher, own, "teacher", adapters=adapters))
    return found


@contextmanager
def whole_parts(parts: Parts, trainer: DistillationTrainer, keep: bool) -> Iterator[Parts]:
    """权重完整的学生与教师，供一个进程（``keep``）单独生成与导出；所有进程都要调用。"""
    with ExitStack() as stack:
        student: Any = stack.enter_context(trainer.whole_student(keep))
        teacher: Any = parts.teacher
        if teacher is parts.student:
            teacher = student
        elif trainer.teacher is not None:
            teacher = stack.enter_context(trainer.teacher.whole(keep))
        yield replace(parts, student=student, teacher=teacher)


def load_tasks(config: EvaluateConfig, data: Data) -> list[TaskSet]:
    """读入配方的全部任务；早于模型，写错的任务才不会等到训练之后才发现。"""
    if config.lm_eval is not None:
        check_harness(config.lm_eval)
    return [TaskSet.load(name, task, data.style) for name, task in config.tasks.items()]


def sample_prompts(
    config: EvaluateConfig, data: Data, tokenizer: PreTrainedTokenizerBase
) -> list[str] | list[list[int]]:
    """``evaluate.prompts``；对话的问题要经模板，否则学生是在续写它。"""
    if data.chat is None:
        return config.prompts
    return [question_prompt(prompt, tokenizer, data.style) for prompt in config.prompts]


def continued(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[list[int]],
    config: EvaluateConfig,
) -> list[str]:
    """``model`` 贪心地续写的样例。"""
    return TextGenerator(model, tokenizer).generate(
        prompts, strategy="greedy", max_new_tokens=config.max_new_tokens
    )


def merged(*measured: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """把训练前后的结果合起来，并给每个任务加上 ``gap_closed``。"""
    found: dict[str, dict[str, Any]] = {}
    for part in measured:
        for kind, by_name in part.items():
            for name, scores in by_name.items():
                found.setdefault(kind, {}).setdefault(name, {}).update(scores)
    for scores in found.get("tasks", {}).values():
        if {BEFORE, AFTER} <= scores.keys():
            gap = gap_closed({model: [score] for model, score in scores.items()})
            scores["gap_closed"] = gap["value"] if gap else None
    return found
