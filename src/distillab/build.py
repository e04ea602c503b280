"""配方里的字符串在这里、也只在这里变成对象；互相矛盾之处在训练之前查出来。"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from .batch import Batch, collate_examples, collate_text
from .chat_data import ChatDataset, LengthGroupedSampler
from .config import LoraConfig, ModelConfig, ModelSource, Recipe, StudentSection, TextConfig
from .convert import student_from_teacher
from .data import WikiDataset
from .engine import DTYPES, resolve_precision
from .errors import DistillabError
from .generate import TextGenerator
from .language_model import PretrainedLM
from .lora import adapter_parameters, add_lora, base_parameters
from .model import StudentModel
from .on_policy import OnPolicy
from .paired import Pair, load_pairs
from .pretrained import load_pretrained, resolve_model
from .rollout import Rollout
from .teachers import AdapterOffTeacher, LocalTeacher
from .tokenizer import check_tokenizer_fits, load_tokenizer, shared_vocab_size
from .trainer import DistillationTrainer

logger = logging.getLogger("distillab")


@dataclass
class Parts:
    """一份配方装配出来的对象。

    Attributes:
        tokenizer: 学生的 tokenizer。
        teacher: 教师，或 ``None``；关掉 adapter 的学生就是教师时，它就是 ``student`` 那个对象。
        student: 尚未训练的学生；训练的参数是 float32。
        vocab_limit: 教师与学生的 tokenizer 定义相同的 token 数。
    """

    tokenizer: PreTrainedTokenizerBase
    teacher: PretrainedLM | None
    student: StudentModel | PretrainedLM
    vocab_limit: int

    @property
    def parameters(self) -> dict[str, int]:
        """学生与教师（如果有）的参数个数；adapter 只算在学生里。"""
        counts = {"student": self.student.num_parameters()}
        if self.teacher is not None:
            counts["teacher"] = sum(p.numel() for p in base_parameters(self.teacher))
        return counts

    def local_teacher(self) -> LocalTeacher | None:
        """给出教师目标的对象。"""
        if self.teacher is None:
            return None
        if self.teacher is self.student:
            return AdapterOffTeacher(self.teacher)
        return LocalTeacher(self.teacher)


def build_models(recipe: Recipe) -> Parts:
    """装配 tokenizer、教师与学生，并在训练之前查出互相矛盾之处。

    Args:
        recipe: 配方。

    Returns:
        ``Parts``。

    Raises:
        DistillabError: 来源读不到；tokenizer 与模型不符；两个 tokenizer 对同一个 id 说法不一。
    """
    set_seed(recipe.train.seed)
    teacher_tokenizer = _teacher_tokenizer(recipe)
    tokenizer = _student_tokenizer(recipe) or teacher_tokenizer
    assert tokenizer is not None  # Recipe 已查过：没有教师时必有学生自己的
    vocab_limit = shared_vocab_size(
        tokenizer, None if tokenizer is teacher_tokenizer else teacher_tokenizer
    )
    shared = _teacher_is_base_of_student(recipe)
    teacher = None if shared else _teacher(recipe)
    if teacher is not None:
        check_tokenizer_fits(teacher_tokenizer or tokenizer, teacher.vocab_size, "teacher")
    student = _student(recipe, teacher)
    check_tokenizer_fits(tokenizer, student.vocab_size, "student")
    if teacher is not None and recipe.teacher is not None:
        teacher.to(frozen_dtype(recipe.teacher, recipe))
    if shared:
        assert isinstance(student, PretrainedLM)  # 有 LoRA 就是预训练的
        teacher = student
        check_tokenizer_fits(teacher_tokenizer or tokenizer, teacher.vocab_size, "teacher")
        saved = sum(p.numel() * p.element_size() for p in base_parameters(student))
        logger.info(
            "the teacher is the student without its adapters: no second copy, %s bytes saved",
            f"{saved:,}",
        )
    return Parts(tokenizer, teacher, student, vocab_limit)


def frozen_dtype(source: ModelSource | LoraConfig, recipe: Recipe) -> torch.dtype:
    """冻结的权重的类型；``auto`` 跟随训练的计算精度。"""
    if source.dtype == "auto":
        return DTYPES[resolve_precision(recipe.train.precision)]
    dtype: torch.dtype = getattr(torch, source.dtype)
    return dtype


@dataclass
class Data:
    """训练循环要的数据。

    Attributes:
        train: 训练集。
        validation: 验证集。
        collate: 把若干项拼成 ``Batch``。
        sampler: 训练集的次序；``None`` 为随机打乱。
    """

    train: Dataset[Any]
    validation: Dataset[Any]
    collate: Callable[[Sequence[Any]], Batch]
    sampler: Sampler[int] | None = None


def read_pairs(recipe: Recipe) -> list[Pair]:
    """对话数据读入并查对，不需要模型：写错的数据不必等几十亿参数装好才发现。

    Returns:
        各对；数据是文本时为空。

    Raises:
        DistillabError: 见 ``load_pairs``。
    """
    if recipe.data.format != "chat":
        return []
    pairs, notes = load_pairs(recipe.data, need_response=not recipe.responses.only_sampled)
    for note in notes:
        logger.info("%s", note)
    return pairs


def build_data(recipe: Recipe, parts: Parts, pairs: list[Pair]) -> Data:
    """装配训练与验证数据。

    Args:
        recipe: 配方。
        parts: 装配好的模型。
        pairs: ``read_pairs`` 的返回值。

    Raises:
        DistillabError: 数据读不了，或序列长度超过模型的上限。
    """
    data = recipe.data
    models = {"student": parts.student, "teacher": parts.teacher}
    longest = {name: model.max_seq_len for name, model in models.items() if model is not None}
    for name, limit in longest.items():
        if data.max_seq_len is not None and data.max_seq_len > limit:
            raise DistillabError(
                f"data.max_seq_len={data.max_seq_len} is above the {name}'s longest sequence "
                f"{limit}"
            )
    if data.format == "chat":
        return _chat_data(recipe, parts, pairs, data.max_seq_len or min(longest.values()))
    train, validation = WikiDataset.build(
        data.source,
        parts.tokenizer,
        max_seq_len=data.max_seq_len or parts.student.max_seq_len,
        size_mb=data.size_mb,
        validation_fraction=data.validation_fraction,
        text_field=data.text_field,
        subset=data.subset,
        split=data.split,
        seed=recipe.train.seed,
        sha256=data.sha256,
    )
    logger.info(
        "%s training tokens, %s for validation, in sequences of %d",
        f"{train.num_tokens:,}", f"{validation.num_tokens:,}", train.max_seq_len,
    )  # fmt: skip
    return Data(train, validation, partial(collate_text, vocab_limit=parts.vocab_limit))


def _chat_data(recipe: Recipe, parts: Parts, pairs: list[Pair], max_seq_len: int) -> Data:
    train, validation, report = ChatDataset.build(
        pairs,
        recipe.data,
        parts.tokenizer,
        max_seq_len=max_seq_len,
        seed=recipe.train.seed,
        only_prompts=recipe.responses.only_sampled,
    )
    for line in report.lines():
        logger.info("%s", line)
    if not validation.num_tokens:  # 只有 on-policy 读得进没有 response 的数据
        raise DistillabError(
            f"{recipe.data.source}: none of the {len(validation)} conversations held out for "
            f"validation has a response to measure on; write some with distillab synthesize RECIPE "
            f"and set data.responses"
        )
    config = recipe.train
    window = config.batch_size * config.gradient_accumulation_steps * _processes()
    collate = partial(
        collate_examples,
        pad_id=TextGenerator(parts.student, parts.tokenizer).pad_id,
        vocab_limit=parts.vocab_limit,
        padding_side=parts.tokenizer.padding_side,
    )
    sampler = LengthGroupedSampler(train.lengths, window, config.seed)
    return Data(train, validation, collate, sampler)


def build_text(config: TextConfig, parts: Parts) -> WikiDataset:
    """``evaluate.texts`` 的一项：这份文本的验证部分。

    Raises:
        DistillabError: 读不了，或比一条序列还短。
    """
    return WikiDataset.build(
        config.source,
        parts.tokenizer,
        max_seq_len=config.max_seq_len,
        size_mb=config.size_mb,
        text_field=config.text_field,
        subset=config.subset,
        split=config.split,
        sha256=config.sha256,
    )[1]


def build_teacher(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, PretrainedLM]:
    """只要教师与它的 tokenizer，供 ``distillab synthesize``。

    Raises:
        DistillabError: 配方里没有教师，或读不了。
    """
    tokenizer = _teacher_tokenizer(recipe)
    if recipe.teacher is None or tokenizer is None:
        raise DistillabError("nobody can answer: set teacher.path, or synthesize.server")
    teacher = _load(recipe.teacher.path, recipe.teacher, frozen_dtype(recipe.teacher, recipe))
    check_tokenizer_fits(tokenizer, teacher.vocab_size, "teacher")
    if torch.cuda.is_available():
        teacher.to("cuda")
    return tokenizer, teacher


def build_trainer(
    recipe: Recipe, parts: Parts, run_dir: Path, pairs: list[Pair]
) -> DistillationTrainer:
    """装配训练循环；参数见 ``build_data``。"""
    data = build_data(recipe, parts, pairs)
    on_policy = None
    if recipe.responses.on_policy:
        generator = TextGenerator(parts.student, parts.tokenizer)
        limit = None if parts.teacher is None else parts.teacher.max_seq_len
        on_policy = OnPolicy(
            Rollout(generator, recipe.sampling, limit),
            recipe.responses,
            data.collate,
            recipe.train.seed,
        )
    return DistillationTrainer(
        parts.student,
        parts.local_teacher(),
        data.train,
        data.validation,
        recipe.train,
        run_dir,
        loss=recipe.loss,
        evaluate=recipe.evaluate,
        vocab_limit=parts.vocab_limit,
        collate=data.collate,
        train_sampler=data.sampler,
        on_policy=on_policy,
    )


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _student_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase | None:
    """学生自己的 tokenizer；``None`` 表示沿用教师的。"""
    student = recipe.student
    source = student.tokenizer or student.path
    if source is None:
        return None
    sha256 = student.sha256 if source == student.path else None
    return load_tokenizer(source, sha256=sha256, trust_remote_code=student.trust_remote_code)


def _teacher_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase | None:
    teacher = recipe.teacher
    if teacher is None:
        return None
    sha256 = teacher.sha256 if teacher.tokenizer is None else None
    return load_tokenizer(
        teacher.tokenizer or teacher.path,
        sha256=sha256,
        trust_remote_code=teacher.trust_remote_code,
    )


def _teacher_is_base_of_student(recipe: Recipe) -> bool:
    """教师是否就是学生冻结的基座：同一个来源，同样的类型。"""
    student, teacher = recipe.student, recipe.teacher
    if student.lora is None or student.path is None or teacher is None:
        return False
    if teacher.trust_remote_code != student.trust_remote_code:
        return False  # 运行的可能不是同一份代码
    found = resolve_model(teacher.path, sha256=teacher.sha256)
    base = resolve_model(student.path, sha256=student.sha256)
    if Path(found).resolve() != Path(base).resolve():
        return False
    dtypes = [frozen_dtype(source, recipe) for source in (teacher, student.lora)]
    if dtypes[0] != dtypes[1]:
        logger.warning(
            "the teacher is the student's base, in %s and %s: two copies; "
            "give teacher.dtype and student.lora.dtype the same value to keep one",
            *(str(dtype).removeprefix("torch.") for dtype in dtypes),
        )
    return dtypes[0] == dtypes[1]


def _load(path: str, source: ModelSource | StudentSection, dtype: torch.dtype) -> PretrainedLM:
    return PretrainedLM(
        load_pretrained(
            path,
            dtype=dtype,
            sha256=source.sha256,
            trust_remote_code=source.trust_remote_code,
        )
    )


def _teacher(recipe: Recipe) -> PretrainedLM | None:
    source = recipe.teacher
    if source is None:
        return None
    dtype = torch.float32 if recipe.student.init else frozen_dtype(source, recipe)
    return _load(source.path, source, dtype)


def _student(recipe: Recipe, teacher: PretrainedLM | None) -> StudentModel | PretrainedLM:
    section = recipe.student
    if section.path is not None:
        dtype = torch.float32 if section.lora is None else frozen_dtype(section.lora, recipe)
        student = _load(section.path, section, dtype)
        if section.lora is not None:
            add_lora(student, section.lora)
            logger.info(
                "LoRA: %s trained parameters over a frozen base of %s in %s",
                *(f"{sum(p.numel() for p in part):,}"
                  for part in (adapter_parameters(student), base_parameters(student))),
                str(frozen_dtype(section.lora, recipe)).removeprefix("torch."),
            )  # fmt: skip
        return student
    if section.init is not None:
        assert teacher is not None  # Recipe 已查过
        layers = section.init.layers or (section.config or ModelConfig()).num_layers
        return student_from_teacher(teacher, layers, section.config)
    return StudentModel(section.config or ModelConfig())
