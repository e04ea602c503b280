"""配方的 ``teacher.cache``：教师的分布存在哪里，凭什么认出是同一个教师、同一套规则。"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

from ..cache import cache_dir, expanded
from ..config.schema import Recipe
from ..data.corpus import cache_key
from ..models.interface import LanguageModel
from ..models.pretrained import resolve_model
from ..models.tokenizer import tokenizer_fingerprint
from ..teachers.store import TargetStore
from ..teachers.stored import Rule, StoredCollate, StoredTeacher, Teacher
from ..train.loaders import Collate
from .parts import Parts, frozen_dtype

logger = logging.getLogger("distillab")

_ENDS = 1 << 20
"""认一个权重文件，看它的大小与两头这么多字节：整个读一遍，70B 的要好几分钟。"""


def stored_teacher(
    recipe: Recipe, parts: Parts, collate: Collate
) -> tuple[Teacher | None, Collate]:
    """``(教师, collate)``：配方写了 ``teacher.cache``，就从存下的取，没有的算了存下。

    别的教师、分词器或规则的存储，与读不了、写不了的，是 ``DistillabError``。
    """
    teacher = parts.local_teacher()
    config = None if recipe.teacher is None else recipe.teacher.cache
    if teacher is None or config is None or recipe.loss.alpha == 0:
        return teacher, collate
    rule = Rule(config, parts.vocabulary.limit)
    fields = _fields(recipe, parts, rule)
    directory = cache_dir() / "targets" / cache_key(fields)
    if config.path is not None:
        directory = expanded(config.path)
    store = TargetStore(directory, fields, rule.layout.size, f"process{os.getpid()}")
    logger.info(
        f"teacher.cache: {directory} holds the teacher's distributions of {len(store):,} texts, "
        f"{rule.layout.size} bytes a token; those that it lacks are computed and added"
    )
    return StoredTeacher(teacher, store, rule), StoredCollate(collate, store, rule)


def _fields(recipe: Recipe, parts: Parts, rule: Rule) -> dict[str, str | int]:
    """认得出同一个存储的各项。"""
    source, config = recipe.teacher, rule.config
    assert source is not None
    vocab = recipe.student.vocab
    return {
        "teacher": _source_digest(resolve_model(source.path, sha256=source.sha256), parts.teacher),
        "dtype": str(frozen_dtype(source, recipe.train.precision)).removeprefix("torch."),
        "tokenizer": tokenizer_fingerprint(parts.tokenizer),
        "vocabulary": cache_key([parts.vocabulary.limit, parts.vocabulary.missing]),
        "outside": "" if vocab is None else vocab.outside,
        "keep": config.keep,
        "tokens": rule.count,
        "seed": config.seed,
    }


def _source_digest(source: Path | str, model: LanguageModel | None) -> str:
    """模型的来源的摘要，16 位十六进制：目录里的各个文件，放在哪里无关；hub 上的是它的 commit。"""
    if isinstance(source, str):
        return cache_key([source, getattr(getattr(model, "config", None), "_commit_hash", None)])
    digest = hashlib.sha256()
    for file in sorted(source.rglob("*")):
        if file.is_file() and not file.name.startswith("."):
            size = file.stat().st_size
            digest.update(f"{file.name} {size} ".encode())
            with file.open("rb") as content:
                digest.update(content.read(_ENDS))
                content.seek(max(size - _ENDS, 0))
                digest.update(content.read(_ENDS))
    return digest.hexdigest()[:16]
