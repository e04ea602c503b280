"""学生自己的词表：数一遍训练的文字，裁剪分词器，教师也只留同样的行。

运行目录的 ``tokenizer/`` 里是裁剪过的分词器与 ``vocabulary.json``：恢复、评测、导出都从那里读，
不再数。
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ..cache import build_once, cache_dir
from ..config.model_sections import ModelConfig, ModelSource, StudentSection, VocabConfig
from ..config.schema import Recipe
from ..data.corpus import cache_key
from ..data.token_counts import count_articles, count_conversations
from ..errors import DistillabError, foreign
from ..figures import TEACHER
from ..files import replacing_directory
from ..models.interface import PretrainedLM
from ..models.tokenizer import load_tokenizer, tokenizer_fingerprint
from ..models.trimmed_model import trim_model
from ..models.trimming import BpeRules
from ..parsing import parse_json
from ..teachers.outside import Outside
from ..vocabulary import Vocabulary
from .splits import Splits

logger = logging.getLogger("distillab")

_FILE, _FORMAT = "vocabulary.json", 1


def tokenizer_of(section: ModelSource | StudentSection) -> PreTrainedTokenizerBase:
    """一个模型的分词器：另给的，或与它在一起的。"""
    source = own_tokenizer(section)
    assert source is not None  # Recipe 已查过：没有教师时必有学生自己的
    sha256 = section.sha256 if source == section.path else None
    return load_tokenizer(source, sha256=sha256, trust_remote_code=section.trust_remote_code)


def own_tokenizer(section: ModelSource | StudentSection) -> str | None:
    """学生自己的 tokenizer 从哪里来；``None`` 是用教师的。"""
    init = section.init if isinstance(section, StudentSection) else None
    pruned = None if init is None or init.source == TEACHER else init.source
    return section.tokenizer or section.path or pruned


@dataclass(frozen=True)
class StudentVocabulary:
    """裁剪出的词表。

    Attributes:
        directory: 裁剪过的分词器所在的目录。
        tokenizer: 从那里读出的。
        kept: 每个新的 id 原来的 id。
        before: 原来有几个 id。
        counted: 数到的 token 总数。
        covered: 其中留下的。
        into: ``bucket`` 时，去掉的 id → 概率并到哪个新的 id。
    """

    directory: Path
    tokenizer: PreTrainedTokenizerBase
    kept: list[int]
    before: int
    counted: int
    covered: int
    into: dict[int, int] | None

    @classmethod
    def read(cls, directory: Path) -> StudentVocabulary:
        """读回一个目录；不是完整的是 ``DistillabError``。"""
        file = directory / _FILE
        with foreign(f"{directory} is not the vocabulary of this run"):
            values = parse_json(file.read_bytes(), str(file))
            into, kept = values["into"], [int(index) for index in values["kept"]]
            numbers = {key: int(values[key]) for key in ("before", "counted", "covered")}
            moved = None if into is None else {int(old): int(new) for old, new in into.items()}
        return cls(directory, load_tokenizer(str(directory.resolve())), kept, **numbers, into=moved)

    def copy_to(self, directory: Path) -> None:
        """放进运行目录；已经在那里的不动。"""
        if not (directory / _FILE).exists():
            with replacing_directory(directory) as partial:
                shutil.copytree(self.directory, partial, dirs_exist_ok=True, ignore=_hidden)

    def sized(self, student: StudentSection) -> StudentSection:
        """学生的 ``config.vocab_size`` 换成裁剪出的；写了别的大小是 ``DistillabError``。"""
        if student.path is not None or (student.init is not None and student.config is None):
            return student
        config, size = student.config or ModelConfig(), len(self.kept)
        if "vocab_size" in config.model_fields_set and config.vocab_size != size:
            raise DistillabError(
                f"student.config.vocab_size={config.vocab_size} and student.vocab disagree: the "
                f"trimmed vocabulary has {size} tokens; drop vocab_size (or set it to null)"
            )
        config = config.model_copy(update={"vocab_size": size})
        return student.model_copy(update={"config": config})

    def renumbered(self, full: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> Vocabulary:
        """``vocabulary``（原来的 id）里留下的，新的 id；``full`` 不是裁剪之前的是错误。"""
        names = {index: token for token, index in full.get_vocab().items()}
        own = {index: token for token, index in self.tokenizer.get_vocab().items()}
        differing = [i for i, old in enumerate(self.kept) if own.get(i) != names.get(old)]
        if differing or len(own) != len(self.kept):
            raise DistillabError(
                f"{self.directory} is not the vocabulary of this run: it was trimmed from another "
                f"tokenizer"
            )
        return Vocabulary.of(i for i, old in enumerate(self.kept) if old in vocabulary)

    def trim(self, model: PretrainedLM, vocabulary: Vocabulary) -> Outside:
        """``model`` 就地裁剪；返回去掉的，``vocabulary`` 是裁剪之前有概率的 id。"""
        kept, rows = set(self.kept), min(vocabulary.limit, model.vocab_size)
        dropped = [i for i in range(rows) if i in vocabulary and i not in kept]
        into = None if self.into is None else torch.tensor([self.into[i] for i in dropped])
        return Outside(trim_model(model, self.kept, dropped), into)

    def figures(self) -> dict[str, float]:
        """``summary.json`` 里 ``vocabulary`` 的一项。"""
        return {
            "tokens": len(self.kept),
            "before": self.before,
            "coverage": self.covered / max(self.counted, 1),
        }


def student_vocabulary(recipe: Recipe, splits: Splits, saved: Path) -> StudentVocabulary | None:
    """配方要裁剪词表时，裁剪出的：``saved``（运行目录里的）已有就读它，否则数一遍，放在缓存里。

    分词器裁剪不了、数据读不了是 ``DistillabError``。
    """
    config = recipe.student.vocab
    if config is None:
        return None
    if (saved / _FILE).exists():
        return StudentVocabulary.read(saved)
    student = recipe.student
    teacher = None if own_tokenizer(student) else recipe.teacher
    full = tokenizer_of(teacher or student)
    rules, seed = BpeRules(full), recipe.train.seed
    counts = sum(
        count_conversations(split.pairs, split.data, full, seed)
        if split.data.format == "chat"
        else count_articles(split.data, full, seed)
        for split in splits.sources
    )
    assert not isinstance(counts, int)
    kept = rules.kept(counts, config.coverage)
    numbers = {
        "before": len(full.get_vocab()),
        "counted": int(counts.sum()),
        "covered": int(counts[[i for i in kept if i < len(counts)]].sum()),
    }
    key = cache_key([_FORMAT, tokenizer_fingerprint(full), kept, numbers, config.outside])
    directory = cache_dir() / "tokenizers" / f"trimmed-{key}"
    with build_once(directory) as building:
        if building is not None:
            rules.write(kept, building)
            into = rules.first_pieces(kept) if config.outside == "bucket" else None
            values = {"kept": kept, **numbers, "into": into}
            (building / _FILE).write_text(json.dumps(values))
    found = StudentVocabulary.read(directory)
    streams = any(source.streaming for source in recipe.data.sources)
    streamed = " of the stream's beginning" if streams else ""
    logger.info(
        f"the student's vocabulary: {len(kept):,} of {found.before:,} tokens, "
        f"{found.covered / max(found.counted, 1):.4%} of the {found.counted:,} counted{streamed}"
    )
    return found


def saved_vocabulary(config: VocabConfig | None, saved: Path) -> StudentVocabulary | None:
    """一次运行已经裁剪好的；没有是 ``DistillabError``。"""
    return None if config is None else StudentVocabulary.read(saved)


def _hidden(_: str, names: list[str]) -> list[str]:
    """缓存自己的记录不跟过来。"""
    return [name for name in names if name.startswith(".")]
