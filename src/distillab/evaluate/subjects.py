"""被评测的模型：一次运行的教师与训练前后的学生，以及任意别的模型。"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..assembly.parts import Parts
from ..config.run_dir import exported_model
from ..config.schema import Recipe
from ..errors import DistillabError
from ..models.interface import LanguageModel, PretrainedLM, evaluating
from ..models.lora import adapters_off, base_parameters, has_lora
from ..models.pretrained import load_pretrained, resolve_model
from ..models.tokenizer import check_tokenizer_fits, load_tokenizer, shared_vocabulary
from ..train.checkpoint import load_student

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEACHER, WITHOUT, BEFORE, AFTER = "teacher", "teacher_without", "student_before", "student_after"
"""一次运行自己的四个模型；``WITHOUT`` 是教师读学生的 prompt，没有特权信息时没有它。"""

LABELS = {
    TEACHER: "teacher",
    WITHOUT: "teacher without",
    BEFORE: "student before",
    AFTER: "student after",
}


@dataclass(frozen=True, eq=False)
class Subject:
    """被评测的一个模型。

    Attributes:
        name: ``evaluation.json`` 里的键。
        label: 给人看的名字。
        source: 权重从哪里来。
        model: 模型。
        tokenizer: 它的 tokenizer。
        view: 读哪个视角；``privileged`` 是教师带经验的。
        adapters: ``False`` 时关掉 adapter，就是 LoRA 的基座。
        same_tokens: 它的 token id 与运行的是否相同；不同就只能比较文字。
    """

    name: str
    label: str
    source: str
    model: LanguageModel
    tokenizer: PreTrainedTokenizerBase
    view: Literal["same", "privileged"] = "same"
    adapters: bool = True
    same_tokens: bool = True

    @property
    def side(self) -> Literal["student", "teacher"]:
        """数据里它读的那一边。"""
        return "teacher" if self.view == "privileged" else "student"

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
            "view": self.view,
            "dtype": str(self.model.head.weight.dtype).removeprefix("torch."),
        }


def run_subjects(
    recipe: Recipe, parts: Parts, checkpoint: Path, privileged: bool
) -> tuple[list[Subject], int]:
    """一次运行自己的模型：教师（如果有）、训练前与训练后的学生。

    Args:
        recipe: 配方。
        parts: 刚装配好的模型；学生的权重被换成检查点里的，训练前的另留一份。
        checkpoint: 训练后的学生。
        privileged: 教师是否读到学生读不到的东西。

    Returns:
        ``(各个模型, 检查点在第几步)``；教师在最前面。

    Raises:
        DistillabError: 检查点损坏，或与配方不符。
    """
    student, tokenizer, section = parts.student, parts.tokenizer, recipe.student
    # 关掉 adapter 就是训练前的学生：B 从 0 开始。
    before = student if has_lora(student) else copy.deepcopy(student)
    step = load_student(student, checkpoint).current_step
    origin = section.path or "random weights"
    found = []
    if parts.teacher is not None and recipe.teacher is not None:
        path, adapters = recipe.teacher.path, parts.teacher is not student
        if section.init is not None:
            origin = f"layers of {path}"
        for name in (TEACHER, WITHOUT) if privileged else (TEACHER,):
            view: Literal["same", "privileged"] = (
                "privileged" if privileged and name == TEACHER else "same"
            )
            found.append(
                Subject(name, LABELS[name], path, parts.teacher, tokenizer, view, adapters)
            )
    found += [
        Subject(BEFORE, LABELS[BEFORE], origin, before, tokenizer, adapters=before is not student),
        Subject(AFTER, LABELS[AFTER], str(checkpoint), student, tokenizer),
    ]
    return found, step


def check_names(names: Sequence[str]) -> list[str]:
    """别的模型的来源；装配任何模型之前就查。

    Args:
        names: 命令行给出的：运行目录、模型目录、hub id 或 ``pypi:``。

    Returns:
        每个的来源；运行目录的是它的导出。

    Raises:
        DistillabError: 与一次运行自己的模型同名，给了两遍，或没有这样的模型。
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
    """装入一个别的模型。

    Args:
        name: 命令行给出的，也是它的名字。
        source: ``check_names`` 的返回值。
        parts: 运行的模型，用来比较 tokenizer。
        device: 放在哪里。

    Raises:
        DistillabError: 读不了，或模型与它的 tokenizer 不符。
    """
    tokenizer = load_tokenizer(source)
    model = PretrainedLM(load_pretrained(source, dtype=torch.float32)).to(device)
    check_tokenizer_fits(tokenizer, model.vocab_size, name)
    try:
        same = shared_vocabulary(parts.tokenizer, tokenizer).covers(parts.vocabulary)
    except DistillabError:
        same = False
    return Subject(name, name, source, model, tokenizer, same_tokens=same)
