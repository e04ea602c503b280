"""被评测的模型：一次运行的教师与训练前后的学生，以及任意别的模型。"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from ..assembly.parts import Parts
from ..config.model_sections import ModelSource, StudentSection
from ..config.run_dir import exported_model
from ..errors import DistillabError
from ..figures import AFTER, BEFORE, LABELS, TEACHER, WITHOUT
from ..models.interface import LanguageModel, PretrainedLM, evaluating
from ..models.lora import adapters_off, base_parameters, has_lora
from ..models.pretrained import load_pretrained, resolve_model
from ..models.tokenizer import check_tokenizer_fits, load_tokenizer, shared_vocabulary
from ..train.checkpoint import load_student

Side = Literal["student", "teacher"]
"""读一份数据的哪个视角。"""


@dataclass(frozen=True, eq=False)
class Subject:
    """被评测的一个模型。

    ``name`` 是 ``evaluation.json`` 里的键，``source`` 说权重从哪里来；``side`` 是 ``teacher`` 时它
    读得到经验；``adapters`` 为假时关掉 adapter，就是 LoRA 的基座；``same_tokens`` 为假时它的 token
    id 与运行的不同，只能比较文字。
    """

    name: str
    model: LanguageModel
    tokenizer: PreTrainedTokenizerBase
    side: Side = "student"
    source: str = ""
    adapters: bool = True
    same_tokens: bool = True

    @property
    def label(self) -> str:
        """给人看的名字。"""
        return LABELS[self.name].short if self.name in LABELS else self.name

    @contextmanager
    def active(self) -> Iterator[LanguageModel]:
        """处于 eval、不建计算图的模型；退出时还原。"""
        off = nullcontext() if self.adapters else adapters_off(self.model)
        with torch.no_grad(), evaluating(self.model), off:
            yield self.model

    def describe(self) -> dict[str, Any]:
        """``evaluation.json`` 里 ``models`` 的一项。"""
        counted = self.model.parameters() if self.adapters else base_parameters(self.model)
        return {
            "label": self.label,
            "source": self.source,
            "parameters": sum(parameter.numel() for parameter in counted),
            "view": "privileged" if self.side == "teacher" else "same",
            "dtype": str(self.model.head.weight.dtype).removeprefix("torch."),
        }


def run_subjects(
    section: StudentSection,
    source: ModelSource | None,
    parts: Parts,
    checkpoint: Path,
    privileged: bool,
) -> tuple[list[Subject], int]:
    """一次运行自己的模型，和检查点在第几步：教师（如果有）在最前面，然后是训练前与训练后的学生。学
    生的权重换成检查点里的，训练前的另留一份；``privileged``：教师读到学生读不到的。
    """
    student, tokenizer = parts.student, parts.tokenizer
    # 关掉 adapter 就是训练前的学生：B 从 0 开始。
    before = student if has_lora(student) else copy.deepcopy(student)
    step = load_student(student, checkpoint).current_step
    origin = section.path or "random weights"
    if section.init is not None and section.init.source != TEACHER:
        origin = f"layers of {section.init.source}"
    found = []
    if parts.teacher is not None and source is not None:
        if section.init is not None and section.init.source == TEACHER:
            origin = f"layers of {source.path}"
        reads: list[tuple[str, Side]] = [(TEACHER, "student")]
        if privileged:
            reads = [(TEACHER, "teacher"), (WITHOUT, "student")]
        found = [
            Subject(
                name,
                parts.teacher,
                parts.teacher_tokenizer,
                side,
                source.path,
                parts.teacher is not student,
                parts.sides is None,
            )
            for name, side in reads
        ]
    found += [
        Subject(BEFORE, before, tokenizer, source=origin, adapters=before is not student),
        Subject(AFTER, student, tokenizer, source=str(checkpoint)),
    ]
    return found, step


def check_names(names: Sequence[str]) -> list[str]:
    """别的模型的来源，运行目录的是它的导出；与运行自己的模型同名、给了两遍或没有，是
    ``DistillabError``。
    """
    for position, name in enumerate(names):
        if name in LABELS:
            raise DistillabError(
                f"--model {name}: the run's own model has this name; write ./{name}"
            )
        if name in names[:position]:
            raise DistillabError(f"--model {name} is given twice")
    sources = [exported_model(name) for name in names]
    for source in sources:
        resolve_model(source)
    return sources


def other_subject(name: str, source: str, parts: Parts, device: torch.device) -> Subject:
    """装入一个别的模型，看它的 token 与运行的 ``parts`` 是否相同。"""
    tokenizer = load_tokenizer(source)
    model = PretrainedLM(load_pretrained(source, dtype=torch.float32)).to(device)
    check_tokenizer_fits(tokenizer, model.vocab_size, name)
    try:
        same = shared_vocabulary(parts.tokenizer, tokenizer).covers(parts.vocabulary)
    except DistillabError:
        same = False
    return Subject(name, model, tokenizer, source=source, same_tokens=same)
