"""读出对话；一条记录的写法在 ``forms.py`` 里辨认。"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import DistillabError
from ..sources import fetch
from .articles import hub_records, read_records, text_files
from .forms import Message, read_dialogue


@dataclass(frozen=True)
class Conversation:
    """一段对话；训练用的以 assistant 结尾。"""

    id: str | None
    messages: list[Message]
    answer: str | None  # 可以核对的标准答案，不是 response
    record: dict[str, Any]  # 原来的记录
    where: str = ""  # 出处，写进错误信息
    unanswered: int = 0  # 结尾去掉了几轮没有回答的问题，只有 guanaco 的写法才会
    tools: list[dict[str, Any]] | None = None  # 模型可以调用的工具
    unread: frozenset[str] = frozenset()  # 记录里没有读的键，轮里的写成 turn.KEY

    @property
    def prompt(self) -> list[Message]:
        """最后一个 response 之前的各轮，不说哪一轮训练。"""
        return [{k: v for k, v in turn.items() if k != "train"} for turn in self._before]

    @property
    def final(self) -> Message | None:
        """结尾的 assistant 轮；没有则为 ``None``。"""
        return self.messages[-1] if self.messages[-1]["role"] == "assistant" else None

    @property
    def response(self) -> str | None:
        """结尾的 assistant 轮说了什么；没有则为 ``None``。"""
        return None if self.final is None else self.final["content"]

    @property
    def question(self) -> str:
        """最后一条 user 消息。"""
        return str(next(m["content"] for m in reversed(self.messages) if m["role"] == "user"))

    @property
    def key(self) -> str:
        """在几个文件之间认出同一段对话：``id``，没有时由最后一个问题得出。"""
        return question_key(self.question) if self.id is None else self.id

    def answered(self, response: str | Message) -> Conversation:
        """同一个 prompt，换一个 response。"""
        if isinstance(response, str):
            response = {"role": "assistant", "content": response}
        return replace(self, messages=[*self._before, response])

    @property
    def _before(self) -> list[Message]:
        return self.messages if self.final is None else self.messages[:-1]


def question_key(question: str) -> str:
    """没有 ``id`` 的对话的键，由最后一条 user 消息得出，首尾的空白不计。"""
    return f"q-{hashlib.sha256(question.strip().encode()).hexdigest()[:16]}"


def read_conversations(
    source: str,
    *,
    subset: str | None = None,
    split: str = "train",
    sha256: str | None = None,
    text_field: str = "text",
    need_response: bool = True,
) -> Iterator[Conversation]:
    """按来源的顺序逐条读出对话；来源读不到，或有一条记录不是能用的对话，是 ``DistillabError``。

    前四个参数见 ``WikiDataset.build``；``text_field`` 是 guanaco 写法放全文的字段；
    ``need_response``：每段都要以 assistant 结尾，合成与 on-policy 只要 prompt。
    """
    path = fetch(source, sha256=sha256)
    if isinstance(path, str):
        records = hub_records(path, subset, split)
    else:
        files = [file for file in text_files(path, subset, split) if file.suffix != ".txt"]
        if not files:
            raise DistillabError(f"{source!r} is running text; expected .jsonl, .json or .parquet")
        records = read_records(files)
    for where, record in records:
        yield parse_conversation(record, where, text_field, need_response)


def parse_conversation(
    record: object, where: str, text_field: str = "text", need_response: bool = True
) -> Conversation:
    """JSON 或 parquet 的一条记录 → 检查过的对话；不能用是 ``DistillabError``，以出处 ``where`` 开
    头。
    """
    if not isinstance(record, Mapping):
        raise DistillabError(
            f"{where}: expected an object holding a conversation, found {type(record).__name__}"
        )
    # datasets 会给缺的键补上 None。
    known = {str(key): value for key, value in record.items() if value is not None}
    try:
        dialogue = read_dialogue(known, text_field, need_response)
        messages = _checked(_until_trained(dialogue.messages, need_response), need_response)
    except ValueError as error:
        raise DistillabError(f"{where}: {error}") from error
    return Conversation(
        id=_text_or_number(known.get("id")),
        messages=messages,
        answer=_text_or_number(known.get("answer")),
        record=dict(record),
        where=where,
        unanswered=dialogue.cut,
        tools=dialogue.tools,
        unread=dialogue.unread,
    )


# ---------------------------------------------------------------------- 检查


def _until_trained(messages: list[Message], need_response: bool) -> list[Message]:
    """到最后一个要训练的 assistant 轮为止：其后的各轮不训练，也没有谁要读它们。"""
    if messages[-1].get("train", True):
        return messages
    trained = [
        i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("train", True)
    ]
    if not trained and need_response:
        raise ValueError("no assistant turn is to be trained on: the weight of each is 0")
    return messages[: trained[-1] + 1] if trained else messages


def _checked(messages: list[Message], need_response: bool) -> list[Message]:
    roles = [message["role"] for message in messages]
    blank = [
        i for i, m in enumerate(messages) if m["role"] == "assistant" and not m["content"].strip()
    ]
    if not need_response and blank and blank[-1] == len(messages) - 1:
        messages, roles = messages[:-1], roles[:-1]
        blank.pop()
    if blank:
        raise ValueError(f"turn {blank[0] + 1} of {len(messages)}, an assistant's, is empty")
    if "user" not in roles:
        raise ValueError(f"found no user turn, only {_listed(roles)}")
    if need_response and "assistant" not in roles:
        raise ValueError(f"found no assistant turn to train on, only {_listed(roles)}")
    if need_response and roles[-1] != "assistant":
        raise ValueError(f"the last turn is the {roles[-1]}'s; expected the assistant's response")
    return messages


def _text_or_number(value: object) -> str | None:
    return str(value) if isinstance(value, (str, int, float)) else None


def _listed(roles: list[str]) -> str:
    return ", ".join(dict.fromkeys(roles)) or "nothing"
