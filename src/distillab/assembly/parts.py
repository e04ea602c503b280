"""配方里的字符串在这里、也只在这里变成对象；互相矛盾之处在训练之前查出来。"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerBase

from ..config.schema import LoraConfig, ModelConfig, ModelSource, Recipe, StudentSection
from ..data.left_out import check_left_out
from ..distributed.engine import DTYPES, resolve_precision
from ..errors import DistillabError
from ..export.convert import student_from_teacher
from ..generate.stops import stop_ids
from ..models.interface import PretrainedLM
from ..models.lora import adapter_parameters, adapters_off, add_lora, base_parameters
from ..models.pretrained import load_pretrained, resolve_model
from ..models.student import StudentModel
from ..models.tokenizer import (
    check_tokenizer_fits,
    load_tokenizer,
    own_vocabulary,
    shared_vocabulary,
)
from ..teachers.in_process import AdapterOffTeacher, LocalTeacher, ShardedTeacher
from ..vocabulary import Vocabulary

logger = logging.getLogger("distillab")


@dataclass
class Parts:
    """一份配方装配出来的对象。

    Attributes:
        tokenizer: 学生的 tokenizer。
        teacher: 教师，或 ``None``；关掉 adapter 的学生就是教师时，它就是 ``student`` 那个对象。
        student: 尚未训练的学生；训练的参数是 float32。
        vocabulary: 教师与学生的 tokenizer 定义相同的 token。
        shard_teacher: 训练时教师的权重分到各进程。
    """

    tokenizer: PreTrainedTokenizerBase
    teacher: PretrainedLM | None
    student: StudentModel | PretrainedLM
    vocabulary: Vocabulary
    shard_teacher: bool = False

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
        return (ShardedTeacher if self.shard_teacher else LocalTeacher)(self.teacher)

    @contextmanager
    def as_teacher(self) -> Iterator[PretrainedLM]:
        """教师模型本身，供它生成；它就是学生时，其间关掉 adapter。要有教师。"""
        assert self.teacher is not None
        with adapters_off(self.teacher) if self.teacher is self.student else nullcontext():
            yield self.teacher


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
    if teacher_tokenizer is None or tokenizer is teacher_tokenizer:
        vocabulary = own_vocabulary(tokenizer)
    else:
        vocabulary = shared_vocabulary(tokenizer, teacher_tokenizer)
    shared = _teacher_is_base_of_student(recipe)
    teacher = None if shared else _teacher(recipe)
    if teacher is not None:
        check_tokenizer_fits(teacher_tokenizer or tokenizer, teacher.vocab_size, "teacher")
    student = _student(recipe, teacher)
    check_tokenizer_fits(tokenizer, student.vocab_size, "student")
    if teacher is not None and isinstance(student, StudentModel):
        # 从零开始的学生没有自己的配置：停在哪里也跟教师学。
        student.eos_token_ids = frozenset(i for i in teacher.eos_token_ids if i in vocabulary)
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
    if teacher is not None and teacher_tokenizer is not None:
        check_left_out(
            vocabulary,
            [
                ("student", tokenizer, stop_ids(tokenizer, student)),
                ("teacher", teacher_tokenizer, stop_ids(teacher_tokenizer, teacher)),
            ],
        )
    shard = recipe.teacher is not None and recipe.teacher.shard
    return Parts(tokenizer, teacher, student, vocabulary, shard)


def frozen_dtype(source: ModelSource | LoraConfig, recipe: Recipe) -> torch.dtype:
    """冻结的权重的类型；``auto`` 跟随训练的计算精度。"""
    if source.dtype == "auto":
        return DTYPES[resolve_precision(recipe.train.precision)]
    dtype: torch.dtype = getattr(torch, source.dtype)
    return dtype


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
