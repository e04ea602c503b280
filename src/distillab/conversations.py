"""读出对话：``messages``、``prompt`` / ``completion``、``instruction`` / ``output``、guanaco。

每条记录按它自己的键认出写法；认不出就报错，不猜。
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .articles import hub_records, read_records, text_files
from .errors import DistillabError, nearest
from .sources import fetch

Message = dict[str, str]
"""``{"role": ..., "content": ...}``，chat template 的输入。"""

ROLES = ("system", "user", "assistant", "tool")
FORMS = (
    "messages (or conversations), prompt with completion, instruction with output, "
    "or text with '### Human:' and '### Assistant:' turns"
)
_FORM_KEYS = {"messages", "conversations", "prompt", "instruction"}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_GUANACO_TURN = re.compile(r"### (Human|Assistant):")
# 这些键改变对话的内容；不认识还照样训练，学到的就不是数据里的那段对话。
_UNSUPPORTED = ("tool_calls", "function_call", "reasoning_content", "thinking")


@dataclass(frozen=True)
class Conversation:
    """一段对话。

    Attributes:
        id: 记录里的 ``id``，没有则为 ``None``。
        messages: 各轮；训练用的以 assistant 结尾。
        answer: 记录里的 ``answer``：可以核对的标准答案，不是 response。
        record: 原来的记录。
        where: 出处，写进错误信息。
        unanswered: 结尾去掉了几轮没有回答的问题，只有 guanaco 的写法才会。
    """

    id: str | None
    messages: list[Message]
    answer: str | None
    record: dict[str, Any]
    where: str = ""
    unanswered: int = 0

    @property
    def prompt(self) -> list[Message]:
        """最后一个 response 之前的各轮。"""
        return self.messages[:-1] if self.response is not None else self.messages

    @property
    def response(self) -> str | None:
        """结尾的 assistant 轮；没有则为 ``None``。"""
        last = self.messages[-1]
        return last["content"] if last["role"] == "assistant" else None

    @property
    def question(self) -> str:
        """最后一条 user 消息。"""
        return next(m["content"] for m in reversed(self.messages) if m["role"] == "user")

    @property
    def key(self) -> str:
        """在几个文件之间认出同一段对话：``id``，没有时由最后一个问题得出。"""
        return question_key(self.question) if self.id is None else self.id

    def answered(self, response: str) -> Conversation:
        """同一个 prompt，换一个 response。"""
        messages = [*self.prompt, {"role": "assistant", "content": response}]
        return replace(self, messages=messages)


def question_key(question: str) -> str:
    """没有 ``id`` 的对话的键。

    Args:
        question: 最后一条 user 消息；首尾的空白不计。

    Returns:
        ``q-`` 与 16 位十六进制。
    """
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
    """逐条读出对话。

    Args:
        source: hub id、jsonl / json / parquet 文件或含这些文件的目录，或 ``pypi:`` 来源。
        subset: hub 数据集的 config；本地目录则是子目录。
        split: hub 数据集的 split。
        sha256: 本地文件或 wheel 的摘要，不符则拒绝。
        text_field: guanaco 写法放全文的字段。
        need_response: 每段对话都要以 assistant 结尾；合成与 on-policy 只要 prompt，可以没有。

    Yields:
        ``Conversation``，按来源的顺序。

    Raises:
        DistillabError: 来源读不到，或有一条记录不是能用的对话。
    """
    for where, record in _open_records(source, subset, split, sha256):
        yield parse_conversation(record, where, text_field, need_response)


def parse_conversation(
    record: object, where: str, text_field: str = "text", need_response: bool = True
) -> Conversation:
    """一条记录变成 ``Conversation``。

    Args:
        record: 从 JSON 或 parquet 读出的一条。
        where: 出处，写进错误信息。
        text_field: 见 :func:`read_conversations`。
        need_response: 见 :func:`read_conversations`。

    Returns:
        检查过的对话。

    Raises:
        DistillabError: 不是对象、键认不出、角色不认识、内容不是文字，或没有 response。
    """
    if not isinstance(record, Mapping):
        raise DistillabError(
            f"{where}: expected an object holding a conversation, found {type(record).__name__}"
        )
    # datasets 会给缺的键补上 None。
    known = {str(key): value for key, value in record.items() if value is not None}
    try:
        turns = _messages(known, text_field, need_response)
        # guanaco 的许多条以没有回答的问题结尾；那一轮没有东西可学。
        kept = turns if not need_response or known.keys() & _FORM_KEYS else _answered(turns)
        messages = _checked(kept, need_response)
    except ValueError as error:
        raise DistillabError(f"{where}: {error}") from error
    return Conversation(
        id=_text_or_number(known.get("id")),
        messages=messages,
        answer=_text_or_number(known.get("answer")),
        record=dict(record),
        where=where,
        unanswered=len(turns) - len(kept),
    )


def _open_records(
    source: str, subset: str | None, split: str, sha256: str | None
) -> Iterator[tuple[str, Any]]:
    path = fetch(source, sha256=sha256)
    if isinstance(path, str):
        return hub_records(path, subset, split)
    if split != "train":
        raise DistillabError(f"split {split!r} does not apply to {source!r}; it is for hub ids")
    files = [file for file in text_files(path, subset) if file.suffix != ".txt"]
    if not files:
        raise DistillabError(f"{source!r} is running text; expected .jsonl, .json or .parquet")
    return read_records(files)


# ---------------------------------------------------------------------- 四种写法


def _messages(record: dict[str, Any], text_field: str, need_response: bool) -> list[Message]:
    if "messages" in record:
        return _turns(record["messages"], "messages")
    if "conversations" in record:
        return _turns(record["conversations"], "conversations")
    if "prompt" in record:
        return _joined(record, "prompt", "completion", need_response)
    if "instruction" in record:
        instruction = _content(record["instruction"], "instruction")
        extra = _content(record.get("input", ""), "input")
        question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
        system = _turn("system", record, "system") if record.get("system") else []
        return [*system, {"role": "user", "content": question},
                *_completion(record, "instruction", "output", need_response)]  # fmt: skip
    if isinstance(record.get(text_field), str) and "### Human:" in record[text_field]:
        return _guanaco(record[text_field])
    keys = ", ".join(record) or "none"
    raise ValueError(f"found no conversation; its keys are {keys}; expected {FORMS}")


def _turns(turns: object, key: str) -> list[Message]:
    """``role`` / ``content``，或 ShareGPT 的 ``from`` / ``value``。"""
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"expected a list of turns in {key}, found {_shown(turns)}")
    messages = []
    for number, turn in enumerate(turns):
        name = f"{key}[{number}]"
        if not isinstance(turn, Mapping):
            raise ValueError(f"expected role and content in {name}, found {_shown(turn)}")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        for unsupported in _UNSUPPORTED:
            if turn.get(unsupported):
                raise ValueError(
                    f"{name} has {unsupported}, which is not supported; expected all of the turn "
                    f"in content"
                )
        if role is None or content is None:
            found = ", ".join(str(field) for field in turn) or "nothing"
            raise ValueError(f"expected role and content in {name}, found {found}")
        role = _SHAREGPT_ROLES.get(str(role), str(role))
        if role not in ROLES:
            raise ValueError(f"{name} has the unknown role {role!r}; {nearest(role, ROLES)}")
        messages.append({"role": role, "content": _content(content, name)})
    return messages


def _joined(
    record: dict[str, Any], prompt: str, completion: str, need_response: bool
) -> list[Message]:
    """``prompt`` 与 ``completion`` 各是一段文字或一列消息。"""
    if isinstance(record[prompt], list):
        before = _turns(record[prompt], prompt)
    else:
        before = _turn("user", record, prompt)
    if isinstance(record.get(completion), list):
        return [*before, *_turns(record[completion], completion)]
    return [*before, *_completion(record, prompt, completion, need_response)]


def _completion(
    record: dict[str, Any], prompt: str, completion: str, need_response: bool
) -> list[Message]:
    if completion in record:
        return _turn("assistant", record, completion)
    if need_response:
        keys = ", ".join(record)
        raise ValueError(f"{prompt} comes without {completion}; its keys are {keys}")
    return []


def _turn(role: str, record: dict[str, Any], key: str) -> list[Message]:
    return [{"role": role, "content": _content(record[key], key)}]


def _guanaco(text: str) -> list[Message]:
    """``### Human: ...### Assistant: ...``，标记可以紧跟在前一轮的文字后面。"""
    before, *parts = _GUANACO_TURN.split(_content(text, "text"))
    if before.strip():
        raise ValueError(f"expected '### Human:' at the start of text, found {_shown(before)}")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[role], "content": content.strip()}
        for role, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _answered(turns: list[Message]) -> list[Message]:
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    return turns if last is None else turns[: last + 1]


# ---------------------------------------------------------------------- 检查


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


def _content(content: object, name: str) -> str:
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and part.get("type") == "text" for part in content
    ):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"expected text in {name}, found {_shown(content)}")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode: {error.reason}") from error
    return content


def _text_or_number(value: object) -> str | None:
    return str(value) if isinstance(value, (str, int, float)) else None


def _listed(roles: list[str]) -> str:
    return ", ".join(dict.fromkeys(roles)) or "nothing"


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."
