"""一条记录里的对话有哪些写法，以及哪些键改变对话的内容。

认不出的写法报错，不猜。改变对话的键要么读，要么拒绝：略过它们还照样训练，学到的就不是数据里的
那段对话。其余不认识的键是元数据，名字交回去，由日志说出来。
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..errors import DistillabError, nearest
from ..parsing import parse_json

Message = dict[str, Any]
"""chat template 的一轮：``role`` 与 ``content``，也许还有 ``KEPT`` 里的键。

``train`` 为 ``False`` 的 assistant 轮不训练；它不交给模板。
"""

KEPT = ("reasoning_content", "name", "tool_call_id")
"""交给模板的键；模板读不读，由 ``chat.py`` 查。"""
ROLES = ("system", "user", "assistant", "tool")
FORMS = (
    "messages (or conversations), prompt with completion, instruction with output, "
    "or text with '### Human:' and '### Assistant:' turns"
)
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_GUANACO_TURN = re.compile(r"### (Human|Assistant):")

_READ = {"id", "answer", "system", "system_prompt", "tools"}
_OF_FORM = {
    "messages": {"messages"},
    "conversations": {"conversations"},
    "prompt": {"prompt", "completion", "history"},
    "instruction": {"instruction", "input", "output", "history"},
}
"""各种写法读的键，按辨认的先后。"""
_OF_PROMPT = {
    "messages", "conversations", "conversation", "dialog", "dialogue", "turns", "prompt",
    "instruction", "input", "inputs", "question", "query", "context", "contexts", "document",
    "documents", "passage", "history", "functions", "function_call", "image", "images", "video",
    "videos", "audio", "audios", "chat_template", "chat_template_kwargs",
}  # fmt: skip
_OF_RESPONSE = {
    "completion", "completions", "output", "outputs", "response", "responses", "chosen", "rejected",
    "chosen_response", "rejected_response", "chosen_messages", "rejected_messages",
    "positive_messages", "negative_messages", "kto_tag", "tool_calls", "reasoning",
    "reasoning_content", "thinking", "rationale", "cot", "chain_of_thought",
}  # fmt: skip
_REASONING = ("reasoning_content", "reasoning", "thinking")
_WEIGHTS = ("weight", "train", "loss_mask", "training", "loss")
"""这一轮（或这条记录）训练不训练；各家的名字。"""
_OTHER_WEIGHTS = {"weights", "loss_scale", "mask", "train_detail", "training_detail",
                  "train_on_input", "train_on_inputs"}  # fmt: skip
_OF_RECORD = {"weight", "train", "loss_mask"} | _OTHER_WEIGHTS
_NOT_IN_TURNS = (_OF_PROMPT | _OF_RESPONSE | _OTHER_WEIGHTS | {"refusal", "citations", "text"}) - {
    *_REASONING
}


@dataclass(frozen=True)
class Dialogue:
    """一条记录里的对话；各项见 ``Conversation``。"""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    unread: frozenset[str]
    cut: int  # 结尾去掉了几轮没有回答的问题


def read_dialogue(record: Mapping[str, Any], text_field: str, need_response: bool) -> Dialogue:
    """认出一条记录（没有值为 ``None`` 的键）的写法，取出各轮；guanaco 的全文在 ``text_field`` 里。

    认不出、角色不认识、内容不是文字，或有一个改变对话的键用不上，是 ``ValueError``。不要 response
    时，写 response 的键也不查。
    """
    unread: set[str] = set()
    form = next((key for key in _OF_FORM if key in record), text_field)
    cut = 0
    if form == "prompt":
        messages = _history(record) + _prompt(record, need_response, unread)
    elif form == "instruction":
        messages = _history(record) + _instruction(record, need_response)
    elif form in _OF_FORM:
        messages = _turns(record[form], form, unread)
    elif isinstance(record.get(form), str) and "### Human:" in record[form]:
        turns = _guanaco(record[form])
        messages = _answered(turns) if need_response else turns
        cut = len(turns) - len(messages)
    else:
        keys = ", ".join(record) or "none"
        raise ValueError(f"found no conversation; its keys are {keys}; expected {FORMS}")
    messages = [*_system(record, messages), *messages]
    unread |= _unread(record, form, messages, need_response)
    return Dialogue(messages, _tools(record.get("tools")), frozenset(unread), cut)


# ---------------------------------------------------------------------- 四种写法


def _prompt(record: Mapping[str, Any], need_response: bool, unread: set[str]) -> list[Message]:
    """``prompt`` 与 ``completion`` 各是一段文字或一列消息。"""
    messages: list[Message] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        if key == "completion" and not _answers(record, "prompt", key, need_response):
            continue
        if isinstance(record[key], list):
            messages += _turns(record[key], key, unread)
        else:
            messages.append({"role": role, "content": _content(record[key], key)})
    return messages


def _instruction(record: Mapping[str, Any], need_response: bool) -> list[Message]:
    instruction = _content(record["instruction"], "instruction")
    extra = _content(record.get("input", ""), "input")
    question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    messages = [{"role": "user", "content": question}]
    if _answers(record, "instruction", "output", need_response):
        messages.append({"role": "assistant", "content": _content(record["output"], "output")})
    return messages


def _answers(record: Mapping[str, Any], prompt: str, completion: str, need_response: bool) -> bool:
    if need_response and completion not in record:
        keys = ", ".join(record)
        raise ValueError(f"{prompt} comes without {completion}; its keys are {keys}")
    return completion in record


def _history(record: Mapping[str, Any]) -> list[Message]:
    """Alpaca 与 ms-swift 的 ``history``：以前的各轮，每项一问一答。"""
    messages: list[Message] = []
    history = record.get("history") or []
    if not isinstance(history, list):
        raise ValueError(
            f"expected a list of [user, assistant] in history, found {_shown(history)}"
        )
    if history and isinstance(record.get("prompt"), list):
        raise ValueError("history and a prompt of several messages disagree; drop one")
    for number, pair in enumerate(history):
        name = f"history[{number}]"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"expected [user, assistant] in {name}, found {_shown(pair)}")
        for role, content in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": _content(content, name)})
    return messages


def _guanaco(text: str) -> list[Message]:
    """``### Human: ...### Assistant: ...``，标记可以紧跟在前一轮的文字后面。"""
    before, *parts = _GUANACO_TURN.split(_content(text, "text"))
    if before.strip():
        raise ValueError(f"expected '### Human:' at the start of text, found {_shown(before)}")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[role], "content": content.strip()} for role, content in turns]


def _answered(turns: list[Message]) -> list[Message]:
    """Guanaco 的许多条以没有回答的问题结尾；那一轮没有东西可学。"""
    last = max(
        (i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=len(turns)
    )
    return turns[: last + 1]


# ---------------------------------------------------------------------- 各轮


def _turns(turns: object, key: str, unread: set[str]) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"expected a list of turns in {key}, found {_shown(turns)}")
    return [_read_turn(turn, f"{key}[{number}]", unread) for number, turn in enumerate(turns)]


def _read_turn(turn: object, name: str, unread: set[str]) -> Message:
    """``role`` / ``content``，或 ShareGPT 的 ``from`` / ``value``。"""
    if not isinstance(turn, Mapping):
        raise ValueError(f"expected role and content in {name}, found {_shown(turn)}")
    role, content = _one_of(turn, ("role", "from"), name), _one_of(turn, ("content", "value"), name)
    for key in turn:
        if key in _NOT_IN_TURNS and not _empty(turn[key]) and (content, key) != (None, "text"):
            raise ValueError(
                f"{name} has {key}, which is not supported; expected all of the turn in content"
            )
    if role is None or content is None:
        found = ", ".join(str(field) for field in turn) or "nothing"
        raise ValueError(f"expected role and content in {name}, found {found}")
    role = _SHAREGPT_ROLES.get(str(role), str(role))
    if role not in ROLES:
        raise ValueError(f"{name} has the unknown role {role!r}; {nearest(role, ROLES)}")
    message: Message = {"role": role, "content": _content(content, name)}
    reasoning = _one_of(turn, _REASONING, name)
    if not _empty(reasoning):
        if role != "assistant":
            raise ValueError(f"{name} has reasoning, but it is the {role}'s")
        message["reasoning_content"] = _content(reasoning, f"the reasoning of {name}")
    for key in ("name", "tool_call_id"):
        if not _empty(turn.get(key)):
            message[key] = _content(turn[key], f"{key} of {name}")
    trained = _trained(turn, name)
    if trained and role != "assistant":
        raise ValueError(f"{name} is to be trained on, but it is the {role}'s")
    if trained is False and role == "assistant":
        message["train"] = False
    read = {"role", "from", "content", "value", *_REASONING, *KEPT, *_WEIGHTS}
    unread |= {f"turn.{key}" for key in turn if key not in read and not _empty(turn[key])}
    return message


def _one_of(turn: Mapping[Any, Any], keys: Sequence[str], name: str) -> Any:
    """几个同义的键里写了的那个；都没有为 ``None``。"""
    values = {key: turn[key] for key in keys if turn.get(key) is not None}
    first = next(iter(values.values()), None)
    if any(value != first for value in values.values()):
        raise ValueError(f"{' and '.join(values)} of {name} disagree; drop one")
    return first


def _trained(turn: Mapping[Any, Any], name: str) -> bool | None:
    """要不要训练这一轮；没有说为 ``None``。"""
    value = _one_of(turn, _WEIGHTS, name)
    if value is None:
        return None
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        key = next(key for key in _WEIGHTS if turn.get(key) is not None)
        raise ValueError(
            f"{key} of {name} is {_shown(value)}, expected 0 or 1: a turn is trained on or it is "
            f"not"
        )
    return bool(value)


# ---------------------------------------------------------------------- 其余的键


def _system(record: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """各轮之外另写的 system。"""
    given = {key: record[key] for key in ("system", "system_prompt") if not _empty(record.get(key))}
    if not given:
        return []
    text = _content(_one_of(given, tuple(given), "the record"), next(iter(given)))
    own = [message["content"] for message in messages if message["role"] == "system"]
    if own and own[0].strip() != text.strip():
        raise ValueError(f"{next(iter(given))} and the system turn disagree; drop one")
    return [] if own else [{"role": "system", "content": text}]


def _tools(tools: object) -> list[dict[str, Any]] | None:
    """``tools`` 是一列 JSON Schema；ShareGPT 与 ms-swift 把它写成一段 JSON。"""
    if isinstance(tools, str):
        with suppress(DistillabError):
            tools = parse_json(tools, "tools")
    if _empty(tools):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"expected a list of tools in tools, found {_shown(tools)}")
    return [dict(tool) for tool in tools]


def _unread(
    record: Mapping[str, Any], form: str, messages: list[Message], need_response: bool
) -> set[str]:
    """没有读的键；改变对话的、又不是照抄对话的拒绝。"""
    read = _READ | _OF_FORM.get(form, {form})
    content = _OF_PROMPT | (_OF_RESPONSE if need_response else set())
    contents = [message["content"] for message in messages]
    unread = set()
    for key, value in record.items():
        if key in read or (_empty(value) and key not in _OF_RECORD):
            continue
        if key in _OF_RECORD:
            if not isinstance(value, (bool, int, float)) or value != 1:
                raise ValueError(
                    f"{key} is {_shown(value)}, but a record has no weight: leave the key out of "
                    f"the file, and records that are not to be trained on"
                )
        elif key in content and not _repeats(value, contents):
            raise ValueError(
                f"{key} is part of the conversation, but is not read beside {form}; put it into "
                f"{form}, or leave it out of the file"
            )
        elif key == "text" and not (
            _repeats(value, contents) or all(c.strip() in str(value) for c in contents)
        ):
            raise ValueError(f"text and {form} disagree: only one of them is read; drop one")
        else:
            unread.add(key)
    return unread


def _repeats(value: object, contents: list[str]) -> bool:
    """``value`` 里的文字是否都在某一轮里；许多数据集把问题另写一遍。"""
    if isinstance(value, Mapping):
        value = value.get("content", value.get("value"))
    if isinstance(value, list):
        return all(_repeats(part, contents) for part in value)
    return isinstance(value, str) and any(value.strip() in content for content in contents)


def _empty(value: object) -> bool:
    """``None``、``False``、空白与空的容器；``datasets`` 会给缺的键补上 ``None``。"""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    return value is None or value is False or (isinstance(value, (list, dict)) and not value)


def _content(content: object, name: str) -> str:
    if isinstance(content, list):
        content = "".join(_parts(content, name))
    if not isinstance(content, str):
        raise ValueError(f"expected text in {name}, found {_shown(content)}")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode: {error.reason}") from error
    return content


def _parts(parts: list[Any], name: str) -> Iterator[str]:
    """``[{"type": "text", "text": ...}]``；还有别的东西的，不是一段文字。"""
    for part in parts:
        given = part if isinstance(part, Mapping) else {}
        filled = {key: value for key, value in given.items() if value is not None}
        text = filled.pop("text", None)
        if filled != {"type": "text"} or not isinstance(text, str):
            raise ValueError(f"expected text in {name}, found {_shown(part)}")
        yield text


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."
