"""训练的序列有多长：不分词，由配方与本地的对话估计。"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config.schema import Recipe
from ..config.sections import DataSection
from ..data.conversations import Conversation
from ..data.pairs import load_pairs
from ..errors import DistillabError
from ..sources import fetch, parse_source

BYTES_PER_TOKEN = 4.3
"""估计文本有多少 token：Qwen 的 tokenizer 读中文维基、SmolLM2 的读英文维基，都是 4.3 到 4.5。"""

SHORT_BYTES_PER_TOKEN, MESSAGE_TOKENS, SYSTEM_TOKENS = 3.0, 8, 24
"""估计一段对话有多少 token，往多里算：每 3 字节一个，每条消息外加模板的，模板还可能补上 system。"""


@dataclass(frozen=True)
class Lengths:
    """一条训练序列的长度，token。"""

    student: int
    teacher: int
    rows: int  # 其中的 response token
    prompt: int  # 采样时的
    examples: int | None = None  # 训练几条；不知道是 None


def find_lengths(recipe: Recipe, student: int, both: int, notes: list[str]) -> Lengths:
    """由配方与本地的数据估计长度，假定了什么添进 ``notes``；``student``、``both`` 是学生、两个模型
    最长的序列。几个来源的，每条都按最长的那个算；第一个来源读完一遍就是一轮。
    """
    data = recipe.data
    found = [_lengths(recipe, source, student, both, notes) for source in data.sources]
    if isinstance(data, DataSection):
        return found[0]
    notes.append("data.mixture: every sequence is taken to be as long as the longest source's")
    own, theirs, responses, prompt = (
        max(getattr(one, side) for one in found)
        for side in ("student", "teacher", "rows", "prompt")
    )
    first, weights = found[0].examples, [source.weight for source in data.mixture]
    rows = None if first is None else int(first * sum(weights) / weights[0])
    return Lengths(own, theirs, responses, prompt, rows)


def _lengths(
    recipe: Recipe, data: DataSection, student: int, both: int, notes: list[str]
) -> Lengths:
    if data.format == "text":
        length = data.max_seq_len or student
        return Lengths(length, length, length, length, _text_sequences(recipe, data, length, notes))
    limit = data.max_seq_len or both
    new = recipe.sampling.max_new_tokens if recipe.responses.on_policy else 0
    if not all(_is_local(source) for source in (data.source, data.teacher_source) if source):
        why = "data.max_seq_len" if data.max_seq_len else "the models' longest, no data.max_seq_len"
        notes.append(
            f"the data is not read: every sequence has {limit:,} tokens in both views ({why}), "
            f"all of them responses"
        )
        return Lengths(limit, limit, limit, max(1, limit - new))
    pairs, _ = load_pairs(data.model_copy(update={"responses": None}), need_response=False)
    written = 0 if data.responses is None else recipe.synthesize.sampling.max_new_tokens
    answer = max(written, new, *(_response(pair.student) for pair in pairs))
    own, theirs = (
        min(both if new else limit, max(map(_prompt, view)) + answer)
        for view in zip(*((pair.student, pair.teacher) for pair in pairs), strict=True)
    )
    notes.append(
        f"{len(pairs):,} records in {data.source}: the longest has about {own:,} tokens, "
        f"{theirs:,} for the teacher, {answer:,} of them its response"
    )
    kept = int(len(pairs) * (1 - data.validation_fraction))
    return Lengths(own, theirs, min(answer, own), max(1, own - answer), kept)


def _text_sequences(recipe: Recipe, data: DataSection, length: int, notes: list[str]) -> int | None:
    size_mb = data.size_mb
    if size_mb is None:
        return None
    if recipe.train.max_steps is None:
        notes.append(
            f"the data is all of size_mb={size_mb:g}, at {BYTES_PER_TOKEN:g} bytes a token"
        )
    kept = size_mb * 1e6 * (1 - data.validation_fraction)
    return int(kept / BYTES_PER_TOKEN / length)


def _is_local(source: str) -> bool:
    try:
        kind = parse_source(source).kind
        return kind in ("path", "shipped") and Path(fetch(source)).exists()
    except DistillabError:
        return False


def _prompt(conversation: Conversation) -> int:
    turns = conversation.prompt
    size = sum(len(turn["content"].encode()) for turn in turns)
    return round(size / SHORT_BYTES_PER_TOKEN) + MESSAGE_TOKENS * (len(turns) + 1) + SYSTEM_TOKENS


def _response(conversation: Conversation) -> int:
    if conversation.response is None:
        return 0
    return round(len(conversation.response.encode()) / SHORT_BYTES_PER_TOKEN) + MESSAGE_TOKENS
