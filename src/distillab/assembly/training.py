"""由配方与装配好的模型得出数据与训练循环。"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler
from transformers import PreTrainedTokenizerBase

from ..batch import Batch, Example, chunk_documents, chunk_example, collate_text
from ..config.mixture import Mixture, MixtureSource, keyed, sampling_of
from ..config.schema import Recipe, TrainingConfig
from ..config.sections import DataSection, ResponsesConfig, TextConfig
from ..config.style import Style
from ..data.aligned_batches import AlignedCollate
from ..data.alignment import Audit
from ..data.chat_dataset import ChatDataset, LengthGroupedSampler
from ..data.chunks import WikiDataset
from ..data.corpus import Corpus
from ..data.left_out import LeftOut, count_left_out
from ..data.mixing import Ingredient, MixedValidation, MixtureStream, Row, shares
from ..data.packing import PackedDataset, collate_rows, keeps_documents_apart
from ..data.streams import TextStream
from ..data.turn_end import turn_end
from ..errors import DistillabError
from ..generate.generator import TextGenerator
from ..generate.stops import pad_id, stop_ids
from ..models.token_bytes import token_bytes
from ..models.tokenizer import document_separator
from ..train.loaders import evenly
from ..train.on_policy import OnPolicy
from ..train.rollout import Rollout, answered
from ..train.trainer import DistillationTrainer
from ..train.two_tokenizers import Across, byte_counts
from .parts import Parts
from .splits import SourceSplits, Splits
from .teacher_store import stored_teacher

logger = logging.getLogger("distillab")

AUDITED = 64
"""训练开始时看这么多条数据，两个分词器对得有多齐。"""


@dataclass
class Data:
    """训练循环要的数据；``sampler`` 是训练集的次序，``None`` 为随机打乱；有 ``separator`` 的，块里
    的文章互相看不见。
    """

    train: Dataset[Any]
    validation: Dataset[Any]
    collate: Callable[[Sequence[Any]], Batch]
    sampler: Sampler[int] | None = None
    separator: int | None = None


def build_data(recipe: Recipe, parts: Parts, splits: Splits) -> Data:
    """训练与验证数据；``splits`` 是这份配方的。

    Raises:
        DistillabError: 数据读不了，序列长度超过模型的上限，或有教师读不了的 token。
    """
    models = {"student": parts.student, "teacher": parts.teacher}
    longest = {name: model.max_seq_len for name, model in models.items() if model is not None}
    left = LeftOut.of("student", parts.tokenizer, parts.vocabulary)
    rows = None if parts.teacher is None else parts.teacher.vocab_size
    found = []
    for (key, source), split in zip(keyed(recipe.data), splits.sources, strict=True):
        length = source.max_seq_len
        for name, limit in longest.items():
            if length is not None and length > limit:
                raise DistillabError(
                    f"{key}.max_seq_len={length} is above the {name}'s longest sequence {limit}"
                )
        if source.format == "chat":
            data = _chat_data(recipe, parts, split, length or min(longest.values()))
        else:
            data = _text_data(recipe, parts, split, length or longest["student"])
        found.append(data)
        where = f" of {source.name}" if isinstance(source, MixtureSource) else ""
        for name, part in (("training data", data.train), ("validation data", data.validation)):
            if left.tokens:
                items = None if isinstance(part, TextStream) else _items(part)
                count_left_out(name + where, items, left, rows)
    return found[0] if isinstance(recipe.data, DataSection) else _mixed(recipe, parts, found)


def _mixed(recipe: Recipe, parts: Parts, found: list[Data]) -> Data:
    """几个来源混成一个流；它们的一批怎样拼是同样的。"""
    assert isinstance(recipe.data, Mixture)
    packed = any(isinstance(data.train, PackedDataset) or data.separator for data in found)
    ingredients = []
    for source, data in zip(recipe.data.mixture, found, strict=True):
        as_row = partial(_row, data=data, packed=packed)
        one = Ingredient(source.name, source.weight, data.train, data.validation, as_row)
        ingredients.append(one)
    for one, share in zip(ingredients, shares([one.weight for one in ingredients]), strict=True):
        size = "a stream" if isinstance(one.train, TextStream) else f"{len(one.train):,} sequences"
        logger.info(f"{one.name}: {share:.1%} of every step's sequences, from {size}")
    train = MixtureStream(ingredients, _window(recipe.train), recipe.train.seed)
    validation = MixedValidation(ingredients, recipe.evaluate.max_sequences)
    collate: Callable[[Sequence[Any]], Batch] = found[0].collate
    if parts.sides is None:
        padding = pad_id(parts.tokenizer, stop_ids(parts.tokenizer, parts.student)) or 0
        collate = partial(collate_rows, pad_id=padding, vocabulary=parts.vocabulary)
    return Data(train, validation, collate)


def _row(item: Any, data: Data, packed: bool) -> Row:
    """一个来源的一项，变成混在一起时的一行：``packed`` 的一行里可以有几条。"""
    if isinstance(data.collate, AlignedCollate) and isinstance(item, dict):
        item = data.collate.example(item)
    elif isinstance(item, dict) and data.separator is not None:
        item = chunk_documents(item, data.separator)
    elif isinstance(item, dict):
        item = chunk_example(item)
    return (item,) if packed and isinstance(item, Example) else item


def _window(config: TrainingConfig) -> int:
    """一个 optimizer 步的序列数，所有进程合计。"""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return config.batch_size * config.gradient_accumulation_steps * processes


def _items(data: Dataset[Any]) -> Iterator[Example | dict[str, Tensor]]:
    for i in range(len(data)):  # type: ignore[arg-type]
        item = data[i]
        yield from item if isinstance(item, tuple) else (item,)


def _text_data(recipe: Recipe, parts: Parts, split: SourceSplits, max_seq_len: int) -> Data:
    if parts.sides is not None:
        return Data(*split.of(parts.tokenizer, max_seq_len), aligned_collate(parts))
    packed = _packs(split.data, recipe.responses, parts)
    separator = document_separator(parts.tokenizer) if packed else None
    collate = partial(collate_text, vocabulary=parts.vocabulary, separator=separator)
    return Data(*split.of(parts.tokenizer, max_seq_len), collate, separator=separator)


def aligned_collate(parts: Parts) -> AlignedCollate:
    """教师用自己的分词器时，怎样拼成一批。"""
    assert parts.sides is not None
    assert parts.teacher is not None
    pads = (parts.tokenizer, parts.student), (parts.teacher_tokenizer, parts.teacher)
    own, theirs = (pad_id(one, stop_ids(one, model)) or 0 for one, model in pads)
    return AlignedCollate(parts.sides, (own, theirs), parts.teacher.max_seq_len)


def build_text(config: TextConfig, tokenizer: PreTrainedTokenizerBase) -> WikiDataset:
    """``evaluate.texts`` 的一项：这份文本的验证部分；错误见 ``WikiDataset.build``。"""
    return WikiDataset.of(Corpus.of(config), tokenizer)[1]


def _chat_data(recipe: Recipe, parts: Parts, split: SourceSplits, max_seq_len: int) -> Data:
    only_prompts = recipe.responses.only_sampled
    theirs = None if parts.sides is None else parts.teacher_tokenizer
    train, validation = split.of(parts.tokenizer, max_seq_len, theirs)
    stops = stop_ids(parts.tokenizer, parts.student)
    _check_stops(train, parts.tokenizer, stops, split.data.style)
    config, window = recipe.train, _window(recipe.train)
    padding = pad_id(parts.tokenizer, stops) or 0
    collate: Callable[[Sequence[Any]], Batch]
    collate = partial(collate_rows, pad_id=padding, vocabulary=parts.vocabulary)
    if parts.sides is not None:
        collate = aligned_collate(parts)
    if _packs(split.data, recipe.responses, parts):
        rows = PackedDataset(train, max_seq_len, config.seed)
        of_student, of_teacher = rows.filled
        logger.info(
            f"packed {len(train):,} conversations into {len(rows):,} rows of {max_seq_len} tokens: "
            f"{of_student:.1%} of the student's are filled, {of_teacher:.1%} of the teacher's"
        )
        # 行一样长，所以只是打乱；一轮仍是整数步，怎样切成 micro-batch、分给几个进程都相同。
        shuffled = LengthGroupedSampler([max_seq_len] * len(rows), window, config.seed)
        return Data(rows, validation, collate, shuffled)
    sampler = LengthGroupedSampler(train.lengths, window, config.seed)
    if only_prompts and parts.teacher is not None:
        return Data(train, _answered(validation, recipe, parts), collate, sampler)
    return Data(train, validation, collate, sampler)


def _check_stops(
    train: ChatDataset,
    tokenizer: PreTrainedTokenizerBase,
    stops: frozenset[int],
    style: Style,
) -> None:
    """学生学不学得会停下；补了模板没有写的结尾也要说一声。"""
    turn = turn_end(tokenizer, style)
    if turn is not None and turn.unwritten:
        logger.info(
            f"the chat template writes nothing after the last response: {turn.text!r} is trained "
            f"there, so that the student learns to stop"
        )
    unstopped = train.unstopped(stops)
    if unstopped > len(train) / 2:
        logger.warning(
            f"{unstopped:,} of {len(train):,} responses do not end with a token that stops "
            f"generation: the student cannot learn to stop; the chat template's generation blocks "
            f"may leave it out, or data.max_seq_len may cut it off"
        )


def _packs(data: DataSection, responses: ResponsesConfig, parts: Parts) -> bool:
    """要不要、也能不能让一行里的几段互不相见；不能就在日志里说。"""
    if not data.packing:
        return False
    if responses.on_policy:
        logger.warning(
            "data.packing: sampled responses have no length before they are sampled: "
            "padding batches of similar length instead"
        )
        return False
    chat = data.format == "chat"
    otherwise = "padding batches of similar length" if chat else "letting them see each other"
    for name, model in {"student": parts.student, "teacher": parts.teacher}.items():
        if model is not None and not keeps_documents_apart(model):
            logger.warning(
                f"data.packing: the attention of the {name} does not keep documents apart: "
                f"{otherwise} instead"
            )
            return False
    return True


def _answered(validation: ChatDataset, recipe: Recipe, parts: Parts) -> Dataset[Any]:
    """验证集里只有 prompt 的，由教师来回答：验证要有一份不随学生而变的 response。"""
    examples = [validation[i] for i in evenly(len(validation), recipe.evaluate.max_sequences)]
    missing = sum(not example.student.response for example in examples)
    if not missing:
        return validation
    logger.info("the teacher answers the %d validation prompts that have no response", missing)
    size, length = recipe.synthesize.batch_size, recipe.sampling.max_new_tokens
    with parts.as_teacher() as teacher:
        generator = TextGenerator(teacher, parts.teacher_tokenizer, parts.teacher_vocabulary)
        return [  # type: ignore[return-value]  # 列表也是 map-style 的数据集
            example
            for start in range(0, len(examples), size)
            for example in answered(
                examples[start : start + size],
                generator,
                length,
                parts.sides,
                parts.student.max_seq_len,
            )
        ]


def across(parts: Parts, data: Data, divergence: str) -> Across:
    """两边的字节数；教师用自己的分词器时还有它的词表、两边都有的 token 与对得有多齐，写进日志。"""
    sides = parts.sides
    if sides is None:
        stops = stop_ids(parts.tokenizer, parts.student)
        with suppress(DistillabError):  # 有的分词器说不出一个 token 是哪几个字节
            return Across(byte_counts(token_bytes(parts.tokenizer, stops, "student")))
        return Across()
    assert isinstance(data.collate, AlignedCollate)
    audit = Audit(data.collate.aligner)
    for part in (data.train, data.validation):
        if not isinstance(part, IterableDataset) and not audit.tokens[0]:  # 只有 prompt 的没有
            chosen = [part[i] for i in evenly(len(part), AUDITED)]  # type: ignore[arg-type]
            items = [one for item in chosen for one in (item if type(item) is tuple else (item,))]
            audit.add(map(data.collate.example, items))
    for line in audit.lines():
        logger.info("%s", line)
    ours, theirs = (byte_counts(side.bytes) for side in sides)
    shared = sides.projected if divergence == "projected_kl" else sides.shared
    return Across(ours, theirs, parts.teacher_vocabulary, shared, audit.summary())


def build_trainer(
    recipe: Recipe, parts: Parts, run_dir: Path, splits: Splits
) -> DistillationTrainer:
    """训练循环；参数见 ``build_data``。"""
    data = build_data(recipe, parts, splits)
    on_policy = None
    if recipe.responses.on_policy:
        generator = TextGenerator(parts.student, parts.tokenizer, parts.vocabulary)
        limit = None if parts.teacher is None else parts.teacher.max_seq_len
        rollouts = [
            Rollout(generator, sampling_of(source, recipe.sampling), limit, parts.sides)
            if source.format == "chat"
            else None
            for source in recipe.data.sources
        ]
        on_policy = OnPolicy(rollouts, recipe.responses, data.collate, recipe.train.seed)
    teacher, collate = stored_teacher(recipe, parts, data.collate)
    return DistillationTrainer(
        parts.student,
        teacher,
        data.train,
        data.validation,
        recipe.train,
        run_dir,
        loss=recipe.loss,
        evaluate=recipe.evaluate,
        vocabulary=parts.vocabulary,
        collate=collate,
        train_sampler=data.sampler,
        on_policy=on_policy,
        across=across(parts, data, recipe.loss.divergence),
    )
