"""太长的对话怎样截断：response 最要紧，其次是 system 与最近的几轮。"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from transformers import PreTrainedTokenizerBase

from ..batch import Tokens
from ..config.style import USUAL, Style
from ..errors import DistillabError
from ..models.tokenizer import leading_count
from .chat import generation_prompt_length, render, render_prompt
from .forms import Message
from .template import LossOn


@dataclass(frozen=True)
class Fitted:
    """截断到 ``max_seq_len`` 的一条数据。"""

    views: tuple[Tokens, ...]  # 学生的；教师的 prompt 不同时还有教师的
    prompt_cut: bool  # 去掉了最早的若干轮，或 prompt 的开头
    response_cut: bool  # 去掉了 response 的结尾


def fit(
    views: Sequence[Sequence[Message]],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_len: int,
    style: Style = USUAL,
    *,
    loss_on: LossOn,
) -> Fitted | None:
    """渲染并截断；两个视角的 response 截得一样多，一个 token 也留不下时为 ``None``。

    先整轮去掉最早的对话（system 与最后一个问题总留着），再去掉学生 prompt 的开头（BOS 除外），只留
    generation prompt，最后才去掉 response 的结尾。教师的 prompt 只整轮地去：截掉经验的教师不再值得
    学，宁可少学一截 response。``views`` 是学生的各轮，以及（不同时）教师的；不以 assistant 结尾的只
    有 prompt，那时要给 response 留出至少一个 token。
    """
    has_response = views[0][-1]["role"] == "assistant"
    limit = max_seq_len if has_response else max_seq_len - 1
    starts = [_turn_starts(view) for view in views]

    @cache
    def without(turns: int) -> list[Tokens]:
        shorter = zip(views, starts, strict=True)
        return [tokens_of([*view[: own[0]], *view[own[turns] :]]) for view, own in shorter]

    def tokens_of(messages: Sequence[Message]) -> Tokens:
        if messages[-1]["role"] != "assistant":
            return Tokens(render_prompt(messages, tokenizer, style), [])
        tokens = render(messages, tokenizer, style, loss_on=loss_on)
        # 最后一个 response token 之后的换行没有人要预测，也没有人要读。
        return Tokens(tokens.ids[: tokens.response[-1] + 1], tokens.response)

    def fits(turns: int) -> bool:
        return all(len(tokens.ids) <= limit for tokens in without(turns))

    most = min(map(len, starts)) - 1
    turns = min(bisect.bisect_left(range(most + 1), True, key=fits), most)
    tokens = without(turns)
    if any(view.labels != tokens[0].labels for view in tokens):
        raise DistillabError("the chat template renders the response differently in the two views")
    if fits(turns):
        return Fitted(tuple(tokens), turns > 0, False)
    header = generation_prompt_length(views[0], tokenizer, style)
    leading = [leading_count(view.ids, tokenizer) for view in tokens]
    shortest = [leading[0] + header, *(len(view.prompt) for view in tokens[1:])]
    response = len(tokens[0].ids) - len(tokens[0].prompt)
    kept = min(response, limit - max(shortest))
    if kept < int(has_response):
        return None
    cut = [_cut(view, kept, limit, own) for view, own in zip(tokens, leading, strict=True)]
    common = min(len(view.response) for view in cut)
    cut = [Tokens(view.ids, view.response[len(view.response) - common :]) for view in cut]
    prompt_cut = turns > 0 or len(tokens[0].prompt) + kept > limit
    return Fitted(tuple(cut), prompt_cut, kept < response)


def _turn_starts(messages: Sequence[Message]) -> list[int]:
    """可以从哪里开始而不丢掉半轮：开头的 system 之后，以及其后每条 user 消息。"""
    roles = [message["role"] for message in messages]
    first = next(i for i, role in enumerate(roles) if role != "system")
    return [first, *(i for i, role in enumerate(roles) if role == "user" and i > first)]


def _cut(tokens: Tokens, kept: int, limit: int, leading: int) -> Tokens:
    """去掉开头的，但留下最前面的 ``leading`` 个：没有 BOS 的上文，模型没有见过。"""
    end = len(tokens.prompt) + kept
    cut = max(0, end - limit)
    start = cut + leading if cut else 0
    response = [position - cut for position in tokens.response if start < position < end]
    return Tokens(tokens.ids[: start - cut] + tokens.ids[start:end], response)
