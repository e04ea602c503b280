"""配方里的字符串在这里、也只在这里变成对象；互相矛盾之处在训练之前查出来。"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerBase

from .config import ModelConfig, ModelSource, Recipe
from .convert import student_from_teacher
from .data import WikiDataset
from .engine import DTYPES, resolve_precision
from .errors import DistillabError
from .language_model import PretrainedLM
from .model import StudentModel
from .pretrained import load_pretrained
from .teachers import LocalTeacher
from .tokenizer import check_tokenizer_fits, load_tokenizer, shared_vocab_size
from .trainer import DistillationTrainer

logger = logging.getLogger("distillab")


@dataclass
class Parts:
    """一份配方装配出来的对象。

    Attributes:
        tokenizer: 学生的 tokenizer。
        teacher: 教师，或 ``None``。
        student: 尚未训练的学生，float32。
        vocab_limit: 教师与学生的 tokenizer 定义相同的 token 数。
    """

    tokenizer: PreTrainedTokenizerBase
    teacher: PretrainedLM | None
    student: StudentModel | PretrainedLM
    vocab_limit: int

    @property
    def parameters(self) -> dict[str, int]:
        """学生与教师（如果有）的参数个数。"""
        models = {"student": self.student, "teacher": self.teacher}
        return {name: model.num_parameters() for name, model in models.items() if model is not None}


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
    teacher = _teacher(recipe)
    if teacher is not None:
        check_tokenizer_fits(teacher_tokenizer or tokenizer, teacher.vocab_size, "teacher")
    student = _student(recipe, teacher)
    check_tokenizer_fits(tokenizer, student.vocab_size, "student")
    if teacher is not None and recipe.teacher is not None:
        teacher.to(teacher_dtype(recipe.teacher, recipe))
    return Parts(tokenizer, teacher, student, vocab_limit)


def teacher_dtype(source: ModelSource, recipe: Recipe) -> torch.dtype:
    """教师权重的类型；``auto`` 跟随训练的计算精度。"""
    if source.dtype == "auto":
        return DTYPES[resolve_precision(recipe.train.precision)]
    dtype: torch.dtype = getattr(torch, source.dtype)
    return dtype


def build_data(recipe: Recipe, parts: Parts) -> tuple[WikiDataset, WikiDataset]:
    """装配训练与验证数据。

    Raises:
        DistillabError: 数据读不了，或序列长度超过模型的上限。
    """
    data = recipe.data
    length = data.max_seq_len or parts.student.max_seq_len
    for name, model in (("student", parts.student), ("teacher", parts.teacher)):
        if model is not None and length > model.max_seq_len:
            raise DistillabError(
                f"data.max_seq_len={length} is above the {name}'s longest sequence "
                f"{model.max_seq_len}"
            )
    return WikiDataset.build(
        data.source,
        parts.tokenizer,
        max_seq_len=length,
        size_mb=data.size_mb,
        validation_fraction=data.validation_fraction,
        text_field=data.text_field,
        subset=data.subset,
        split=data.split,
        seed=recipe.train.seed,
        sha256=data.sha256,
    )


def build_trainer(recipe: Recipe, parts: Parts, run_dir: Path) -> DistillationTrainer:
    """装配训练循环。"""
    train_data, validation_data = build_data(recipe, parts)
    teacher = LocalTeacher(parts.teacher) if parts.teacher is not None else None
    logger.info(
        "%s training tokens, %s for validation, in sequences of %d",
        f"{train_data.num_tokens:,}", f"{validation_data.num_tokens:,}", train_data.max_seq_len,
    )  # fmt: skip
    return DistillationTrainer(
        parts.student,
        teacher,
        train_data,
        validation_data,
        recipe.train,
        run_dir,
        loss=recipe.loss,
        evaluate=recipe.evaluate,
        vocab_limit=parts.vocab_limit,
    )


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


def _teacher(recipe: Recipe) -> PretrainedLM | None:
    source = recipe.teacher
    if source is None:
        return None
    dtype = torch.float32 if recipe.student.init else teacher_dtype(source, recipe)
    return PretrainedLM(
        load_pretrained(
            source.path,
            dtype=dtype,
            sha256=source.sha256,
            trust_remote_code=source.trust_remote_code,
        )
    )


def _student(recipe: Recipe, teacher: PretrainedLM | None) -> StudentModel | PretrainedLM:
    section = recipe.student
    if section.path is not None:
        return PretrainedLM(
            load_pretrained(
                section.path,
                dtype=torch.float32,
                sha256=section.sha256,
                trust_remote_code=section.trust_remote_code,
            )
        )
    if section.init is not None:
        assert teacher is not None  # Recipe 已查过
        layers = section.init.layers or (section.config or ModelConfig()).num_layers
        return student_from_teacher(teacher, layers, section.config)
    return StudentModel(section.config or ModelConfig())
