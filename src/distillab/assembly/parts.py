"""教师、学生与 tokenizer：由配方里的字符串装配，互相矛盾之处在训练之前查出来。"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerBase

from ..config.model_sections import (
    InitialLayers,
    LoraConfig,
    ModelConfig,
    ModelSource,
    StudentSection,
)
from ..config.schema import Precision, TrainingConfig
from ..data.left_out import check_left_out
from ..data.sides import Side, Sides
from ..distributed.engine import DTYPES, resolve_precision
from ..errors import DistillabError
from ..figures import TEACHER
from ..generate.stops import stop_ids
from ..models.interface import LanguageModel, PretrainedLM
from ..models.lora import adapter_parameters, adapters_off, add_lora, base_parameters
from ..models.own_blocks import through_own_blocks
from ..models.pretrained import load_pretrained, resolve_model
from ..models.student import StudentModel
from ..models.tokenizer import (
    check_tokenizer_fits,
    own_vocabulary,
    shared_vocabulary,
)
from ..models.trimmed_model import trim_model
from ..models.trimming import ids_before
from ..teachers.in_process import AdapterOffTeacher, LocalTeacher, ShardedTeacher
from ..teachers.outside import Outside
from ..vocabulary import Vocabulary
from .initial import initial_student
from .splits import Splits
from .student_vocabulary import StudentVocabulary, own_tokenizer, tokenizer_of

logger = logging.getLogger("distillab")


@dataclass
class Parts:
    """一份配方装配出来的对象。

    关掉 adapter 的学生就是教师时，``teacher`` 就是 ``student`` 那个对象；``vocabulary`` 是两边定义
    相同的 token；``shard_teacher`` 说训练时教师的权重分不分到各进程；``initial`` 说学生由哪些层来，
    不是裁剪出的没有。教师用自己的分词器时，两个分词器在 ``sides`` 里，``vocabulary`` 只是学生的。
    ``trimmed`` 是学生自己的词表，``outside`` 是教师的输出层里因此去掉的。
    """

    tokenizer: PreTrainedTokenizerBase
    teacher: LanguageModel | None
    student: StudentModel | PretrainedLM
    vocabulary: Vocabulary
    shard_teacher: bool = False
    initial: InitialLayers | None = None
    sides: Sides | None = None
    trimmed: StudentVocabulary | None = None
    outside: Outside | None = None

    @property
    def teacher_tokenizer(self) -> PreTrainedTokenizerBase:
        """教师读写用的分词器。"""
        return self.tokenizer if self.sides is None else self.sides.teacher.tokenizer

    @property
    def teacher_vocabulary(self) -> Vocabulary:
        """教师有概率的 token。"""
        return self.vocabulary if self.sides is None else own_vocabulary(self.teacher_tokenizer)

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
        kind = ShardedTeacher if self.shard_teacher else LocalTeacher
        if self.teacher is self.student:
            kind = AdapterOffTeacher
        teacher = kind(self.teacher)
        teacher.outside = self.outside
        return teacher

    @contextmanager
    def as_teacher(self) -> Iterator[LanguageModel]:
        """教师模型本身，供它生成；它就是学生时，其间关掉 adapter。要有教师。"""
        assert self.teacher is not None
        with adapters_off(self.teacher) if self.teacher is self.student else nullcontext():
            yield self.teacher


def build_models(
    student: StudentSection,
    teacher: ModelSource | None,
    train: TrainingConfig,
    splits: Splits | None = None,
    recorded: InitialLayers | None = None,
    *,
    across: bool = False,
    trimmed: StudentVocabulary | None = None,
) -> Parts:
    """装配 tokenizer、教师与学生；来源读不到、彼此不符的都在这里就是 ``DistillabError``。

    ``splits`` 是这份配方的数据，学生要看着它选层时才读；``recorded`` 是这次运行从前选定的层；
    ``across``：教师用自己的分词器，与学生的不必相同；``trimmed`` 是 ``student.vocab`` 裁剪出的，
    三样都只有其中的 token，id 处处是新的。
    """
    set_seed(train.seed)
    precision, outside = train.precision, None
    theirs = tokenizer_of(teacher or student)
    tokenizer, sides, rows = theirs, None, None
    if teacher is not None and own_tokenizer(student):
        tokenizer = tokenizer_of(student)
    if across:
        vocabulary = own_vocabulary(tokenizer)
        sides = Sides(Side(tokenizer, "student"), Side(theirs, "teacher"))
    elif tokenizer is theirs:
        vocabulary = own_vocabulary(tokenizer)
    else:
        try:
            vocabulary = shared_vocabulary(tokenizer, theirs)
        except DistillabError:
            own = student.tokenizer is None or not (student.path or student.init)
            rows = ids_before(tokenizer, theirs) if own else None
            if rows is None:
                raise
            if trimmed is not None:
                raise DistillabError(
                    "student.vocab: the student's tokenizer was cut from the teacher's already; "
                    "drop it, and the teacher keeps the same tokens"
                ) from None
            vocabulary = own_vocabulary(tokenizer)
    whole = vocabulary
    if trimmed is not None:
        two = ("student", tokenizer), ("teacher", theirs)
        check_left_out(whole, [(name, one, stop_ids(one)) for name, one in two])
        student, vocabulary = trimmed.sized(student), trimmed.renumbered(tokenizer, whole)
        tokenizer = theirs = trimmed.tokenizer

    def trim(model: PretrainedLM) -> PretrainedLM:
        nonlocal outside
        if trimmed is not None:
            found = trimmed.trim(model, whole)
            outside = outside or found  # 先装的是教师，或教师就是学生的基座
        return model

    if teacher is None:
        model, initial = _student(student, None, tokenizer, precision, splits, recorded, trim)
        check_tokenizer_fits(tokenizer, model.vocab_size, "student")
        return Parts(tokenizer, None, model, vocabulary, initial=initial, trimmed=trimmed)
    loaded = None
    cut = student.init is not None and student.init.source == TEACHER
    if not _is_frozen_base(teacher, student, precision):
        loaded = trim(_load(teacher, torch.float32 if cut else frozen_dtype(teacher, precision)))
        check_tokenizer_fits(theirs, loaded.vocab_size, "teacher")
        if rows is not None:
            others = set(theirs.get_vocab().values()) - set(rows)
            outside = Outside(trim_model(loaded, rows, sorted(others)))
            theirs = tokenizer
            logger.info(
                f"the student's tokenizer was cut from the teacher's: the teacher keeps the same "
                f"{len(rows):,} tokens"
            )
    reads = theirs if cut else tokenizer  # 学生多出的 token，教师的 embedding 里也许没有
    model, initial = _student(student, loaded, reads, precision, splits, recorded, trim)
    check_tokenizer_fits(tokenizer, model.vocab_size, "student")
    frozen: LanguageModel
    if loaded is not None:
        frozen = _frozen(loaded).to(frozen_dtype(teacher, precision))
        if isinstance(model, StudentModel) and (
            sides is None or tokenizer is theirs
        ):  # 它没有自己的配置：停在哪里也跟教师学
            model.eos_token_ids = frozenset(i for i in frozen.eos_token_ids if i in vocabulary)
    else:
        assert isinstance(model, PretrainedLM)  # 有 LoRA 就是预训练的
        frozen = model
        check_tokenizer_fits(theirs, frozen.vocab_size, "teacher")
        saved = sum(p.numel() * p.element_size() for p in base_parameters(frozen))
        logger.info(
            f"the teacher is the student without its adapters: no second copy, {saved:,} bytes "
            f"saved"
        )
    if sides is None:
        both = (("student", tokenizer, model), ("teacher", theirs, frozen))
        check_left_out(vocabulary, [(name, one, stop_ids(one, of)) for name, one, of in both])
    return Parts(
        tokenizer, frozen, model, vocabulary, teacher.shard, initial, sides, trimmed, outside
    )


def build_teacher(
    teacher: ModelSource, precision: Precision
) -> tuple[PreTrainedTokenizerBase, LanguageModel]:
    """只要教师与它的 tokenizer，供 ``distillab synthesize``。"""
    tokenizer, loaded = tokenizer_of(teacher), _load(teacher, frozen_dtype(teacher, precision))
    check_tokenizer_fits(tokenizer, loaded.vocab_size, "teacher")
    model = _frozen(loaded)
    if torch.cuda.is_available():
        model.to("cuda")
    return tokenizer, model


def frozen_dtype(source: ModelSource | LoraConfig, precision: Precision) -> torch.dtype:
    """冻结的权重的类型；``auto`` 跟随训练的计算精度。"""
    if source.dtype == "auto":
        return DTYPES[resolve_precision(precision)]
    dtype: torch.dtype = getattr(torch, source.dtype)
    return dtype


def _is_frozen_base(teacher: ModelSource, student: StudentSection, precision: Precision) -> bool:
    """教师是否就是学生冻结的基座：同一个来源，同样的类型。"""
    if student.lora is None or student.path is None:
        return False
    if teacher.trust_remote_code != student.trust_remote_code:
        return False  # 运行的可能不是同一份代码
    found = resolve_model(teacher.path, sha256=teacher.sha256)
    base = resolve_model(student.path, sha256=student.sha256)
    if Path(found).resolve() != Path(base).resolve():
        return False
    dtypes = [frozen_dtype(source, precision) for source in (teacher, student.lora)]
    if dtypes[0] != dtypes[1]:
        theirs, ours = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        logger.warning(
            f"the teacher is the student's base, in {theirs} and {ours}: two copies; give "
            f"teacher.dtype and student.lora.dtype the same value to keep one"
        )
    return dtypes[0] == dtypes[1]


def _load(section: ModelSource | StudentSection, dtype: torch.dtype) -> PretrainedLM:
    assert section.path is not None
    return PretrainedLM(
        load_pretrained(
            section.path,
            dtype=dtype,
            sha256=section.sha256,
            trust_remote_code=section.trust_remote_code,
        )
    )


def _frozen(model: PretrainedLM) -> LanguageModel:
    """GPU 上尽可能经本项目的层来算；CPU 上发内核不费时间，仍由 transformers 来算。"""
    return through_own_blocks(model) if torch.cuda.is_available() else model


def _student(
    section: StudentSection,
    teacher: PretrainedLM | None,
    tokenizer: PreTrainedTokenizerBase,
    precision: Precision,
    splits: Splits | None,
    recorded: InitialLayers | None,
    trim: Callable[[PretrainedLM], PretrainedLM],
) -> tuple[StudentModel | PretrainedLM, InitialLayers | None]:
    if section.lora is not None:
        dtype = frozen_dtype(section.lora, precision)
        student = trim(_load(section, dtype))
        add_lora(student, section.lora)
        trained, base = (
            sum(p.numel() for p in part(student)) for part in (adapter_parameters, base_parameters)
        )
        logger.info(
            f"LoRA: {trained:,} trained parameters over a frozen base of {base:,} in "
            f"{str(dtype).removeprefix('torch.')}"
        )
        return student, None
    if section.path is not None:
        return trim(_load(section, torch.float32)), None
    if section.init is not None:
        source = teacher
        if section.init.source != TEACHER:
            source = trim(_load(ModelSource(path=section.init.source), torch.float32))
        assert source is not None  # Recipe 已查过
        return initial_student(section.init, section.config, source, tokenizer, splits, recorded)
    return StudentModel(section.config or ModelConfig()), None
