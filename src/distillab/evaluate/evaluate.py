"""``distillab evaluate``：一次运行的模型与任意别的模型，在同样的数据上量出 ``evaluation.json``。

学生与别的模型以自己参数的 dtype 计算，不用 autocast；教师以配方说的 dtype。
"""

from __future__ import annotations

import datetime
import itertools
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..assembly.parts import Parts, build_models
from ..assembly.splits import Splits
from ..assembly.student_vocabulary import StudentVocabulary, saved_vocabulary
from ..assembly.training import build_data, build_text
from ..batch import Example, Tokens
from ..config.model_sections import InitialLayers
from ..config.run_dir import RunDirectory, environment
from ..config.schema import Recipe
from ..config.sections import DataSection
from ..data.chat import render_prompt
from ..data.chat_dataset import ChatDataset
from ..data.pairs import Pair
from ..errors import DistillabError, located
from ..figures import AFTER, BEFORE, LABELS, TEACHER, WITHOUT
from ..files import replace_file
from ..generate.generator import TextGenerator
from ..generate.sampling import row_seeds
from ..models.tokenizer import own_vocabulary
from ..train.checkpoint_files import BEST, find_checkpoint
from ..train.loaders import evenly
from ..train.rollout import Rollout
from .bootstrap import SAMPLES
from .checks import continued, load_tasks, sample_prompts
from .evaluation_file import (
    Answers,
    agreement_figures,
    harness_figures,
    on_policy_figures,
    task_figures,
    text_figures,
)
from .harness import evaluate_with_harness
from .scores import Scores, score
from .sequences import Sequences, examples_of, same_text
from .subjects import Subject, check_names, other_subject, run_subjects
from .tasks import TaskSet, accuracy

logger = logging.getLogger("distillab")

FORMAT = 1
VALIDATION = "validation"

PROMPTS = 32
"""从每个学生采样这么多条，量它在自己的样本上与教师的 KL。"""

PROMPT_TOKENS = 32
"""文本没有 prompt：每条验证文本的开头这么多个 token 就是，至多一半。"""

QUESTIONS = 3
"""配方没有 ``evaluate.prompts`` 时，样例用任务的前几个问题。"""


@dataclass
class _Bench:
    """要量的东西，与量到的结果。"""

    recipe: Recipe
    parts: Parts
    pairs: list[Pair]
    tasks: list[TaskSet]
    texts: dict[str, Sequences]
    prompts: list[Example]
    teacher: Subject | None = None
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    scores: dict[str, dict[str, Scores]] = field(default_factory=dict)
    sampled: dict[str, Scores] = field(default_factory=dict)
    answers: dict[str, dict[str, Answers]] = field(default_factory=dict)
    harness: dict[str, dict[str, Any]] = field(default_factory=dict)


def evaluate(
    name: str,
    checkpoint: str,
    models: Sequence[str] = (),
    output: Path | None = None,
    *,
    trust: bool = False,
) -> tuple[dict[str, Any], Path]:
    """量一次运行的教师、训练前后的学生，以及别的模型；``(evaluation.json 的内容, 它的路径)``。

    ``checkpoint`` 是训练后的学生：``best``、``last``，或检查点的名字、路径；``models`` 是运行目录
    （用它的导出）、模型目录、hub id 或 ``pypi:``；``output`` 缺省为运行目录的 ``evaluation.json``；
    ``trust``：不是在这里开始的运行，也运行它的配方指名的代码。没有这样的运行、检查点或模型，数据读
    不了，或放不进模型时 ``DistillabError``。
    """
    run = RunDirectory.find(name)
    recipe, target = run.trusted_recipe(trust), output or run.evaluation_file
    if not target.absolute().parent.is_dir():
        raise DistillabError(f"--output {target}: there is no directory {target.parent}")
    path = find_checkpoint(run.checkpoint_dir(recipe), checkpoint)
    sources = check_names(models)
    trimmed = saved_vocabulary(recipe.student.vocab, run.tokenizer)
    bench = _prepare(recipe, run.initial, trimmed)
    privileged = any(data.privileged for data in bench.texts.values())
    privileged = privileged or any(pair.teacher is not pair.student for pair in bench.pairs)
    privileged = privileged or any(map(_has_views, bench.tasks))
    own, step = run_subjects(recipe.student, recipe.teacher, bench.parts, path, privileged)
    device = bench.parts.student.head.weight.device
    teacher = own[0] if own[0].name == TEACHER else None
    bench.teacher = teacher if teacher is not None and teacher.same_tokens else None
    _measure(bench, own)
    samples = _samples(bench, own)
    for model, source in zip(models, sources, strict=True):
        _measure(bench, [other_subject(model, source, bench.parts, device)])
    seed = recipe.train.seed
    read = [(name, bench.texts[name], scores) for name, scores in bench.scores.items()]
    compared = read if bench.teacher is not None else []
    found = {
        "format": FORMAT,
        "name": run.path.name,
        "checkpoint": f"{checkpoint} (step-{step:08d})" if path.name == BEST else path.name,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seed": seed,
        "bootstrap_samples": SAMPLES,
        "frequency_counts": "labels of the same data",
        "environment": environment(),
        "models": bench.models,
        "texts": {name: text_figures(data, one, seed) for name, data, one in read},
        "agreement": {name: agreement_figures(data, one, seed) for name, data, one in compared},
        "on_policy": {name: on_policy_figures(one, seed) for name, one in bench.sampled.items()},
        "tasks": {name: task_figures(answers, seed) for name, answers in bench.answers.items()},
        "lm_eval": harness_figures(bench.harness, seed) if bench.harness else {},
        "samples": samples,
    }
    replace_file(target, json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False))
    return found, target


def _prepare(
    recipe: Recipe, initial: InitialLayers | None, trimmed: StudentVocabulary | None
) -> _Bench:
    """读入数据、任务与模型；``initial`` 是这次运行的学生从前由哪些层开始。"""
    if VALIDATION in recipe.evaluate.texts:
        raise DistillabError(
            f"evaluate.texts.{VALIDATION}: this name is the run's own validation data; "
            f"name the text differently"
        )
    splits = Splits(recipe)
    pairs = splits.pairs
    tasks = load_tasks(recipe.evaluate, recipe.data)
    parts = build_models(
        recipe.student, recipe.teacher, recipe.train, splits, initial,
        across=recipe.loss.across, trimmed=trimmed,
    )  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for model in (parts.student, parts.teacher):
        if model is not None:
            model.to(device)
    held_out = build_data(recipe, parts, splits).validation
    validation = examples_of(held_out, recipe.evaluate.max_sequences)
    if parts.sides is not None:  # 教师的 token 不同，它读同样的文字，见 _own_tokens
        validation = [Example(example.student, example.student) for example in validation]
    texts = {VALIDATION: Sequences(VALIDATION, validation, parts.tokenizer, parts.vocabulary)}
    for name, config in recipe.evaluate.texts.items():
        with located(f"evaluate.texts.{name}"):
            examples = examples_of(build_text(config, parts.tokenizer), config.max_sequences)
        texts[name] = Sequences(name, examples, parts.tokenizer, parts.vocabulary)
    prompts = [validation[i] for i in evenly(len(validation), PROMPTS)]
    texts_only = {i for i, one in enumerate(recipe.data.sources) if one.format == "text"}
    prompts = [_beginning(one) if one.source in texts_only else one for one in prompts]
    return _Bench(recipe, parts, pairs, tasks, texts, prompts)


def _beginning(example: Example) -> Example:
    """文本的开头，作为 prompt。"""
    ids = example.student.ids
    view = Tokens(ids[: max(1, min(PROMPT_TOKENS, len(ids) // 2))], [])
    return Example(view, view)


def _has_views(task: TaskSet) -> bool:
    return any(pair.teacher is not pair.student for pair in task.pairs)


# ---------------------------------------------------------------------- 量


def _measure(bench: _Bench, subjects: Sequence[Subject]) -> None:
    """把 ``subjects`` 在全部数据、任务与它们自己的样本上的结果记进 ``bench``。"""
    for subject in subjects:
        bench.models[subject.name] = subject.describe()
        for task in bench.tasks:
            task.check_fits(subject)
    size = bench.recipe.evaluate.batch_size
    for name, data in bench.texts.items():
        readers = [one for one in subjects if one.same_tokens and _reads(one, data.privileged)]
        measured = score(data, bench.teacher, readers, size) if readers else {}
        for subject in subjects:
            if not subject.same_tokens:
                try:
                    own = _own_tokens(bench, data, subject)
                except DistillabError as error:
                    if subject.name not in LABELS:
                        raise
                    logger.warning("%s: %s is not measured: %s", name, subject.label, error)
                    continue
                measured |= score(own, None, [subject], size)
        bench.scores.setdefault(name, {}).update(measured)
        labels = ", ".join(one.label for one in subjects if one.name in measured)
        logger.info("%s: measured %s", name, labels)
    if bench.teacher is not None:
        for subject in subjects:
            if subject.same_tokens and subject.name not in (TEACHER, WITHOUT):
                bench.sampled[subject.name] = _on_policy(bench, bench.teacher, subject)
    for task in bench.tasks:
        answers = bench.answers.setdefault(task.name, {})
        for subject in subjects:
            if _reads(subject, _has_views(task)):
                started = time.perf_counter()
                rows = task.ask(subject)
                answers[subject.name] = Answers(rows, time.perf_counter() - started)
                logger.info("%s: %s %s", task.name, subject.label, f"{accuracy(rows):.1%}")
    if (config := bench.recipe.evaluate.lm_eval) is not None:
        for subject in subjects:
            if subject.name != WITHOUT:  # 它的题里没有经验，与教师是同一个模型
                logger.info("lm_eval: measuring %s", subject.label)
                with subject.active() as model:
                    found = evaluate_with_harness(model, subject.tokenizer, config)
                bench.harness[subject.name] = found


def _reads(subject: Subject, privileged: bool) -> bool:
    """没有经验可去掉的地方，不读经验的教师就是教师，不必再量。"""
    return privileged or subject.name != WITHOUT


def _own_tokens(bench: _Bench, data: Sequences, subject: Subject) -> Sequences:
    """同样的文字，换成 ``subject`` 的 token；对话在它的模板之下不再是同样的 response 时不行。"""
    if not bench.pairs or data.name != VALIDATION:
        return same_text(data, bench.parts.tokenizer, subject.tokenizer)
    recipe = bench.recipe
    if not isinstance(recipe.data, DataSection):
        raise DistillabError(
            f"--model {subject.name}: it has another tokenizer, and the validation data is of "
            f"several sources: drop it"
        )
    longest, seed = subject.model.max_seq_len, recipe.train.seed
    _, validation, _ = ChatDataset.build(
        bench.pairs, recipe.data, subject.tokenizer, max_seq_len=longest, seed=seed
    )
    own = examples_of(validation, recipe.evaluate.max_sequences)
    views = [getattr(example, subject.side) for example in own]
    examples = [Example(view, view) for view in views]
    if any(example.student.response for example in examples):  # 否则是教师答的，数据里没有
        vocabulary = own_vocabulary(subject.tokenizer)
        found = Sequences(data.name, examples, subject.tokenizer, vocabulary)
        if found.texts == data.texts:
            return found
    raise DistillabError(
        f"--model {subject.name}: it has another tokenizer, and with its chat template the "
        f"validation responses are not the same text: drop it"
    )


def _on_policy(bench: _Bench, teacher: Subject, subject: Subject) -> Scores:
    """学生自己的样本，由它与教师各读一遍。"""
    recipe, sampling = bench.recipe, bench.recipe.sampling
    if recipe.data.chat is None:  # 不写到训练时没见过的位置
        length = bench.texts[VALIDATION].longest("student")
        room = length - max(len(prompt.student.ids) for prompt in bench.prompts)
        most = max(1, min(sampling.max_new_tokens, room))
        sampling = sampling.model_copy(update={"max_new_tokens": most})
    tokenizer, vocabulary = bench.parts.tokenizer, bench.parts.vocabulary
    seeds = row_seeds(recipe.train.seed, len(bench.prompts))
    with subject.active() as model:
        generator = TextGenerator(model, subject.tokenizer, vocabulary)
        rollout = Rollout(generator, sampling, teacher.model.max_seq_len)
        examples, _ = rollout.sample(bench.prompts, seeds)
    data = Sequences(f"samples of {subject.label}", examples, tokenizer, vocabulary)
    return score(data, teacher, [subject], recipe.evaluate.batch_size)[subject.name]


def _samples(bench: _Bench, subjects: Sequence[Subject]) -> list[dict[str, str | None]]:
    """同样的 prompt，教师（读自己的视角）与学生各自贪心地续写。"""
    config, data = bench.recipe.evaluate, bench.recipe.data
    prompts = config.prompts
    tokenizers = {"student": bench.parts.tokenizer, "teacher": bench.parts.teacher_tokenizer}
    asked: dict[str, Any] = {
        side: sample_prompts(config, data, tokenizer) for side, tokenizer in tokenizers.items()
    }
    if data.chat is not None and not prompts:
        questions = (pair for task in bench.tasks for pair in task.pairs)
        pairs = list(itertools.islice(questions, QUESTIONS))
        prompts = [pair.student.question for pair in pairs]
        asked = {
            side: [
                render_prompt(view.prompt, tokenizers[side], data.style.with_tools(view.tools))
                for view in (getattr(pair, side) for pair in pairs)
            ]
            for side in asked
        }
    if not prompts:
        return []
    rows: list[dict[str, str | None]] = [
        {"prompt": prompt, TEACHER: None, BEFORE: None, AFTER: None} for prompt in prompts
    ]
    for subject in subjects:
        if subject.name == WITHOUT:
            continue
        with subject.active() as model:
            texts = continued(model, subject.tokenizer, asked[subject.side], config)
        for row, text in zip(rows, texts, strict=True):
            row[subject.name] = text
    return rows
