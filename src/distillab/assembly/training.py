"""由配方装配数据与训练循环；模型在 ``parts.py`` 里装配。"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from ..batch import Batch, Example, collate_text
from ..config.schema import Recipe
from ..config.sections import TextConfig
from ..data.chat import turn_end
from ..data.chat_dataset import ChatDataset, LengthGroupedSampler
from ..data.chunks import WikiDataset
from ..data.left_out import LeftOut, count_left_out
from ..data.packing import PackedDataset, collate_rows, keeps_documents_apart
from ..data.pairs import Pair, load_pairs
from ..data.streams import TextStream
from ..errors import DistillabError
from ..generate.generator import TextGenerator
from ..models.tokenizer import document_separator
from ..train.loaders import evenly
from ..train.on_policy import OnPolicy
from ..train.rollout import Rollout, answered
from ..train.trainer import DistillationTrainer
from .parts import Parts

logger = logging.getLogger("distillab")


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
        DistillabError: 数据读不了，序列长度超过模型的上限，或有教师读不了的 token。
    """
    data = _data(recipe, parts, pairs)
    left = LeftOut.of("student", parts.tokenizer, parts.vocabulary)
    rows = None if parts.teacher is None else parts.teacher.vocab_size
    for name, part in (("training data", data.train), ("validation data", data.validation)):
        if left.tokens:
            items = None if isinstance(part, TextStream) else _items(part)
            count_left_out(name, items, left, rows)
    return data


def _items(data: Dataset[Any]) -> Iterator[Example | dict[str, Tensor]]:
    for i in range(len(data)):  # type: ignore[arg-type]
        item = data[i]
        yield from item if isinstance(item, tuple) else (item,)


def _data(recipe: Recipe, parts: Parts, pairs: list[Pair]) -> Data:
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
    train, validation = text_splits(
        recipe, parts.tokenizer, data.max_seq_len or parts.student.max_seq_len
    )
    separator = document_separator(parts.tokenizer) if _packs(recipe, parts) else None
    collate = partial(collate_text, vocabulary=parts.vocabulary, separator=separator)
    return Data(train, validation, collate)


def text_splits(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, max_seq_len: int
) -> tuple[WikiDataset | TextStream, WikiDataset]:
    """文本数据的训练集（或流）与验证集；切好的存在缓存里，第二次很快。

    Args:
        recipe: 配方，``data.format`` 是 ``text``。
        tokenizer: 学生的 tokenizer。
        max_seq_len: 每条序列的 token 数。

    Raises:
        DistillabError: 见 ``WikiDataset.build``。
    """
    data = recipe.data
    options: dict[str, Any] = {
        "max_seq_len": max_seq_len,
        "size_mb": data.size_mb,
        "validation_fraction": data.validation_fraction,
        "text_field": data.text_field,
        "subset": data.subset,
        "split": data.split,
        "seed": recipe.train.seed,
        "sha256": data.sha256,
    }
    if data.streaming:
        options["shuffle_buffer"] = data.shuffle_buffer
        stream, validation = TextStream.build(data.source, tokenizer, **options)
        logger.info(
            "streaming the training text; %s tokens for validation, from its beginning, in "
            "sequences of %d", f"{validation.num_tokens:,}", max_seq_len,
        )  # fmt: skip
        return stream, validation
    train, validation = WikiDataset.build(data.source, tokenizer, **options)
    logger.info(
        "%s training tokens, %s for validation, in sequences of %d",
        f"{train.num_tokens:,}", f"{validation.num_tokens:,}", train.max_seq_len,
    )  # fmt: skip
    return train, validation


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
    generator = TextGenerator(parts.student, parts.tokenizer)
    _check_stops(train, generator, recipe.data.template_options)
    config = recipe.train
    window = config.batch_size * config.gradient_accumulation_steps * _processes()
    collate = partial(
        collate_rows,
        pad_id=generator.pad_id,
        vocabulary=parts.vocabulary,
    )
    if _packs(recipe, parts):
        rows = PackedDataset(train, max_seq_len, config.seed)
        logger.info(
            "packed %s conversations into %s rows of %d tokens: %.1f%% of the student's are "
            "filled, %.1f%% of the teacher's",
            f"{len(train):,}", f"{len(rows):,}", max_seq_len, *(100 * f for f in rows.filled),
        )  # fmt: skip
        # 行一样长，所以只是打乱；一轮仍是整数步，怎样切成 micro-batch、分给几个进程都相同。
        shuffled = LengthGroupedSampler([max_seq_len] * len(rows), window, config.seed)
        return Data(rows, validation, collate, shuffled)
    sampler = LengthGroupedSampler(train.lengths, window, config.seed)
    if recipe.responses.only_sampled and parts.teacher is not None:
        return Data(train, _answered(validation, recipe, parts), collate, sampler)
    return Data(train, validation, collate, sampler)


def _check_stops(
    train: ChatDataset, generator: TextGenerator, template_options: Mapping[str, Any]
) -> None:
    """学生学不学得会停下；补了模板没有写的结尾也要说一声。"""
    turn = turn_end(generator.tokenizer, template_options)
    if turn is not None and turn.unwritten:
        logger.info(
            "the chat template writes nothing after the last response: %r is trained there, "
            "so that the student learns to stop", turn.text,
        )  # fmt: skip
    unstopped = train.unstopped(generator.stop_ids)
    if unstopped > len(train) / 2:
        logger.warning(
            "%s of %s responses do not end with a token that stops generation: the student "
            "cannot learn to stop; the chat template's generation blocks may leave it "
            "out, or data.max_seq_len may cut it off", f"{unstopped:,}", f"{len(train):,}",
        )  # fmt: skip


def _packs(recipe: Recipe, parts: Parts) -> bool:
    """要不要、也能不能让一行里的几段互不相见；不能就在日志里说。"""
    if not recipe.data.packing:
        return False
    if recipe.responses.on_policy:
        logger.warning(
            "data.packing: sampled responses have no length before they are sampled: "
            "padding batches of similar length instead"
        )
        return False
    for name, model in {"student": parts.student, "teacher": parts.teacher}.items():
        if model is not None and not keeps_documents_apart(model):
            instead = (
                "padding batches of similar length"
                if recipe.data.format == "chat"
                else "letting them see each other"
            )
            logger.warning(
                "data.packing: the attention of the %s does not keep documents apart: %s instead",
                name, instead,
            )  # fmt: skip
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
        generator = TextGenerator(teacher, parts.tokenizer, parts.vocabulary)
        return [  # type: ignore[return-value]  # 列表也是 map-style 的数据集
            example
            for start in range(0, len(examples), size)
            for example in answered(examples[start : start + size], generator, length)
        ]


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


def build_trainer(
    recipe: Recipe, parts: Parts, run_dir: Path, pairs: list[Pair]
) -> DistillationTrainer:
    """装配训练循环；参数见 ``build_data``。"""
    data = build_data(recipe, parts, pairs)
    on_policy = None
    if recipe.responses.on_policy:
        generator = TextGenerator(parts.student, parts.tokenizer, parts.vocabulary)
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
        vocabulary=parts.vocabulary,
        collate=data.collate,
        train_sampler=data.sampler,
        on_policy=on_policy,
    )


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
