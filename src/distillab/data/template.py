"""一个 tokenizer 的 chat template：读一段对话，渲染它的各个开头，再分词。"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from ..config.style import USUAL, Style
from ..errors import DistillabError, nearest
from .control_tokens import ControlTokens, shown_text
from .forms import KEPT, Message
from .rendering import Rendered, Request, Span, render_ahead, rendered

LossOn = Literal["all", "last"]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_RESERVED = {"messages", "add_generation_prompt"}
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""模板给思考过程起的名字。"""
_SAYS: Message = {"role": "user", "content": "x"}
_ANSWERS: Message = {"role": "assistant", "content": "x"}
_CONTROLS: WeakKeyDictionary[Any, dict[tuple[str, int], ControlTokens]] = WeakKeyDictionary()


class Template:
    """一个 tokenizer 的 chat template，连同选项；一次读一段对话。"""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, style: Style = USUAL) -> None:
        self.tokenizer, self.style, self.options = tokenizer, style, dict(style.options)
        self._mark: str | None = None
        self._messages: list[Message] = []
        self._wanted: list[tuple[int, bool]] = []
        self._rendered: dict[tuple[int, bool], Rendered] = {}
        try:
            source: str = tokenizer.get_chat_template(tools=self.options.get("tools"))
        except ValueError:
            name = tokenizer.name_or_path or type(tokenizer).__name__
            raise DistillabError(
                f"tokenizer {name!r} has no chat template; use the tokenizer of an instruct model"
            ) from None
        self.source = source
        self.has_blocks = _GENERATION.search(source) is not None
        for key in self.options:
            if key == "tools" and not re.search(r"\btools\b", source):
                raise DistillabError(
                    "the conversation has tools, but the chat template reads none; leave tools out "
                    "of the file, or write them into the system message"
                )
            if key in _RESERVED or not re.search(rf"\b{re.escape(key)}\b", source):
                names = set(re.findall(r"\b(\w+) is (?:not )?defined", source)) - _RESERVED
                raise DistillabError(
                    f"template_options: the chat template reads no option {key!r}; "
                    f"{nearest(key, names) if names else 'it has none'}"
                )

    def read(self, messages: Sequence[Message], loss_on: LossOn | None = None) -> list[Message]:
        """要渲染的对话：内容里的控制 token 断开（不许有的拒绝）；``loss_on`` 为 ``None`` 是只有
        prompt。
        """
        style, tools = self.style.control_tokens, self.options.get("tools")
        token = None if style == "keep" else self.controls.first(self.said(messages))
        if token is not None and style == "refuse":
            raise DistillabError(
                f"the conversation holds the control token {token!r} in what is said; leave it out "
                f"of the data, or set data.control_tokens to split"
            )
        if token is not None:
            self._mark = self.controls.mark(self.said(messages))
            messages = [self._marked(message) for message in messages]
            if tools is not None:
                self.options["tools"] = self._marked(tools)
        self._messages, self._rendered = list(messages), {}
        self._wanted = _wanted(messages, loss_on)
        return self._messages

    @property
    def asked(self) -> Request:
        """:meth:`read` 过的对话用得到的几次渲染。"""
        return self._request(self._messages, self._wanted)

    def text(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """整段对话；``prompt`` 时再加上 generation prompt。"""
        return self._result(messages, prompt).text

    def blocks(self, messages: Sequence[Message]) -> list[Span] | None:
        """模板自己用 ``{% generation %}`` 圈出的部分；模板没有这种标记则为 ``None``。"""
        if not self.has_blocks:
            return None
        found = self._result(messages, prompt=False)
        return [(start, len(found.text[:end].rstrip())) for start, end in found.blocks]

    def encode(self, text: str) -> tuple[list[int], list[Span]]:
        """``(token, 每个 token 在 text 里的位置)``；模板已经写好了 bos，不再添。"""
        if not self.tokenizer.is_fast:
            raise DistillabError(
                f"tokenizer {self.tokenizer.name_or_path!r} does not tell where its tokens are in "
                f"the text; expected one with a tokenizer.json"
            )
        if self._mark is not None and self._mark in text:
            return self.controls.encode(text, self._mark)
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return encoded["input_ids"], encoded["offset_mapping"]

    def said(self, messages: Sequence[Message]) -> Iterator[str]:
        """内容里的各段文字，连同工具的说明。"""
        return _texts([*messages, self.options.get("tools")])

    @property
    def controls(self) -> ControlTokens:
        """这个分词器与模板的控制 token；看一次，记住。"""
        known = _CONTROLS.setdefault(self.tokenizer, {})
        key = self.source, len(self.tokenizer)
        if key not in known:
            asked = self._request([_SAYS, _ANSWERS, _SAYS], [(1, True), (3, False)])
            written = "".join(one.text for one in rendered(self.source, asked))
            known[key] = ControlTokens(self.tokenizer, written)
        return known[key]

    def _result(self, messages: Sequence[Message], prompt: bool) -> Rendered:
        if list(messages) != self._messages[: len(messages)]:
            self._messages, self._rendered, self._wanted = list(messages), {}, []
        key = len(messages), prompt
        if key not in self._rendered:
            wanted = self._wanted if key in self._wanted else [key]
            done = rendered(self.source, self._request(self._messages, wanted))
            self._rendered |= dict(zip(wanted, done, strict=True))
        found = self._rendered[key]
        if found.error is not None:
            roles = ", ".join(message["role"] for message in messages)
            raise DistillabError(f"the chat template refuses the turns {roles}: {found.error}")
        return found

    def _request(self, messages: list[Message], wanted: list[tuple[int, bool]]) -> Request:
        return Request(
            [self._turn(message) for message in messages],
            wanted,
            {**self.tokenizer.special_tokens_map, **self.options},
            self.has_blocks,
            self.style.today,
        )

    def _marked(self, value: Any) -> Any:
        if isinstance(value, str):
            assert self._mark is not None
            return self.controls.marked(value, self._mark)
        if isinstance(value, Mapping):
            return {key: self._marked(inner) for key, inner in value.items()}
        return [self._marked(inner) for inner in value] if isinstance(value, list) else value

    def _turn(self, message: Message) -> Message:
        """模板读的那些键；它不读的思考过程与名字不能悄悄丢掉。"""
        turn: Message = {"role": message["role"], "content": message["content"]}
        for key in message.keys() & set(KEPT):
            names = _REASONING if key == "reasoning_content" else (key,)
            name = next((n for n in names if re.search(rf"(\.|['\"]){n}\b", self.source)), None)
            if name is not None:
                turn[name] = message[key]
            elif turn["role"] != "tool":  # 哪个工具、哪次调用只是标识
                raise DistillabError(
                    f"the {turn['role']} message {shown_text(turn['content'])} has {key}, which "
                    f"the chat template does not read; write it into content, or leave it out"
                )
        return turn


def render_conversations_ahead(
    conversations: Iterable[tuple[Sequence[Message], Style]],
    tokenizer: PreTrainedTokenizerBase,
    loss_on: LossOn,
) -> None:
    """先渲染好接下来要训练的（不以 assistant 结尾的，是要推理的）几段，快得多。"""
    templates = []
    for messages, style in conversations:
        with suppress(DistillabError):  # 轮到它时再报，那时说得出是哪一条
            template = Template(tokenizer, style)
            template.read(messages, loss_on if messages[-1]["role"] == "assistant" else None)
            templates.append(template)
    for source, group in itertools.groupby(templates, lambda template: template.source):
        render_ahead(source, [template.asked for template in group])


def _wanted(messages: Sequence[Message], loss_on: LossOn | None) -> list[tuple[int, bool]]:
    """训练（或推理）一段对话要渲染哪些开头：``(前几轮, 要不要 generation prompt)``。"""
    whole = len(messages)
    if loss_on is None:
        return [(whole, True)]
    ends = [whole - 1]
    if loss_on == "all":
        ends += [i for i in range(1, whole - 1) if messages[i]["role"] == "assistant"]
    return [pair for i in ends if i for pair in ((i, True), (i + 1, False))]


def _texts(value: Any) -> Iterator[str]:
    """其中的各段文字。"""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)
