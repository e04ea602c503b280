"""chat template 用哪个 token 结束 assistant 的一轮：由它渲染一段小对话得出，从不按名字猜。

多数模板在一轮之后写一个结束标记（``<|im_end|>``、``</s>``）。有的不写，下一轮的角色标记就是（GLM 的
``<|user|>``）；最后一轮之后就什么也没有，而学生总得有一个 token 可学。只用普通文字分隔各轮的模板，
由 eos 结束。
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from ..config.style import USUAL, Style
from ..errors import DistillabError
from .forms import Message
from .template import Template

_QUESTION: Message = {"role": "user", "content": "question"}
_RESPONSE: Message = {"role": "assistant", "content": "qzxresponse"}
_KNOWN: WeakKeyDictionary[Any, dict[Hashable, TurnEnd | None]] = WeakKeyDictionary()


@dataclass(frozen=True)
class TurnEnd:
    """一轮 assistant 的结束。"""

    token: int
    text: str  # 这个 token 的文字
    unwritten: str  # 最后一轮之后模板没有写、要补上的，以 text 结尾；模板自己写了则为空
    markers: tuple[str, ...]  # 这个分词器的控制 token

    def end_of(self, text: str, start: int) -> int:
        """``text[start:]`` 是一段 response 与模板写在它之后的，response 在哪里结束；结束标记之后的
        换行与别的标记（Phi-3 在整段对话之后还写一个 eos）不算。
        """
        end = len(text.rstrip())
        if not text.endswith(self.text, start, end):
            found = self._closed.search(text, start, end)
            end = end if found is None else found.end(1)
        return end

    def ends(self, text: str, end: int) -> bool:
        """``text[:end]`` 是否以一个控制 token 结尾。"""
        return text.endswith(self.markers, 0, end)

    def next_marker(self, text: str, end: int) -> int:
        """紧跟在 ``end`` 之后的控制 token 到哪里为止；不紧跟着就是 ``end``。"""
        found = self._leading.match(text, end)
        return end if found is None else found.end()

    @cached_property
    def _leading(self) -> re.Pattern[str]:
        return _leading(self.markers)

    @cached_property
    def _closed(self) -> re.Pattern[str]:
        return re.compile(rf"({re.escape(self.text)})(?:\s|{_any(self.markers)})*\Z")


def turn_end(tokenizer: PreTrainedTokenizerBase, style: Style = USUAL) -> TurnEnd | None:
    """结束 assistant 一轮的 token；没有模板，或它渲染不了、不照写 response，是 ``None``。"""
    own = {key: value for key, value in style.options.items() if key != "tools"}
    try:
        template = Template(tokenizer, Style(options=own))
    except DistillabError:
        return None
    options = json.dumps(own, sort_keys=True, default=repr)
    # 模板与特殊 token 可以改：改了就要再看一遍。
    key = (template.source, options, len(tokenizer), tokenizer.eos_token)
    known = _KNOWN.setdefault(tokenizer, {})
    if key not in known:
        known[key] = _find(template)
    return known[key]


def _find(template: Template) -> TurnEnd | None:
    special, markers = _markers(template.tokenizer)
    leading, eos = _leading(markers), template.tokenizer.eos_token
    after = _after_response(template, [_QUESTION, _RESPONSE])
    if after is None:
        return None
    if found := leading.match(after):
        text, unwritten = found[1], ""
    elif found := leading.match(
        _after_response(template, [_QUESTION, _RESPONSE, _QUESTION]) or ""  # 也许只会一问一答
    ):
        text, unwritten = found[1], found[0]
    elif eos in markers:
        text = unwritten = eos
    else:
        return None
    return TurnEnd(markers[text], text, unwritten, (text, *special))


def _markers(tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], dict[str, int]]:
    """``(特殊 token, 可能结束一轮的 token 与 id)``，长的在前；没有标成 special 的，写在尖括号里才可
    能。
    """
    added = sorted(tokenizer.added_tokens_decoder.items(), key=lambda item: -len(str(item[1])))
    named = {str(token): index for index, token in added if str(token).strip()}
    special = [str(token) for _, token in added if token.special and str(token) in named]
    return special, {
        text: index
        for text, index in named.items()
        if text in special or text[0] + text[-1] == "<>"
    }


def _after_response(template: Template, messages: list[Message]) -> str | None:
    """Response 之后是什么；模板渲染不了，或不照写 response，是 ``None``。"""
    try:
        _, found, after = template.text(messages).rpartition(_RESPONSE["content"])
    except DistillabError:
        return None
    return after if found else None


def _any(markers: Iterable[str]) -> str:
    return "|".join(map(re.escape, markers)) or r"(?!)"


def _leading(markers: Iterable[str]) -> re.Pattern[str]:
    return re.compile(rf"\s*({_any(markers)})")
