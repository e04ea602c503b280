"""内容里的控制 token：``<|im_end|>`` 写在谁的话里，都只是几个字符，不是一轮的结束。

内容里有控制 token 时，在它的第一个字符之后放一个记号，再交给模板。渲染出的文字里，完整的控制
token 便都是模板写的，带记号的都是内容里的：前者照常分词，后者所在的一段当作普通文字分词。没有控制
token 的内容不经过这里，分词与以前逐个相同。
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import DistillabError, shown

Span = tuple[int, int]
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Unicode 保证不会是字符的码位。"""
_MARK = re.compile(f"[{_MARKS[0]}-{_MARKS[-1]}]")
_THINKING = {"<think>", "</think>"}
"""模型自己写的标签，按用意就在内容里。"""


def shown_text(text: str) -> str:
    """写进错误信息的样子，不带记号。"""
    return shown(_MARK.sub("", text))


class ControlTokens:
    """一个分词器在一个模板里的控制 token；模板渲染的一小段对话 ``written`` 里有的算，即使没有标成
    special（DeepSeek 的 ``<｜User｜>``）。
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, written: str) -> None:
        self._tokenizer = tokenizer
        added = {
            str(token): token
            for token in tokenizer.added_tokens_decoder.values()
            if len(str(token)) > 1 and not str(token).isspace()
        }
        self._special = {text: token for text, token in added.items() if token.special}
        self._plain = sorted(added.keys() - self._special.keys() - _THINKING)
        self._plain = [text for text in self._plain if text in written]
        self.tokens = sorted((self._special.keys() - _THINKING) | set(self._plain))
        self._in_content = _Finder(self.tokens)
        self._in_text = _Finder({*self._special, *self._plain})

    def first(self, texts: Iterable[str]) -> str | None:
        """这些文字里的第一个控制 token；没有则为 ``None``。"""
        found = (text[a:b] for text in texts for a, b in self._in_content.spans(text))
        return next(found, None)

    @staticmethod
    def mark(texts: Iterable[str]) -> str:
        """这些文字里都没有的记号。"""
        used = set().union(*(_MARK.findall(text) for text in texts))
        if free := [mark for mark in _MARKS if mark not in used]:
            return free[0]
        raise DistillabError("the text holds every noncharacter from U+FDD0 to U+FDEF")

    def marked(self, text: str, mark: str) -> str:
        """把每个控制 token 用记号断开。"""
        while spans := list(self._in_content.spans(text)):
            for start, _ in reversed(spans):
                text = f"{text[: start + 1]}{mark}{text[start + 1 :]}"
        return text

    def encode(self, text: str, mark: str) -> tuple[list[int], list[Span]]:
        """``(token, 每个 token 在 text 里的位置)``，记号不占 token；分词器从普通文字里也认出控制
        token 的，报错。
        """
        ids: list[int] = []
        offsets: list[Span] = []
        for start, end, plain in self._pieces(text, mark):
            piece = text[start:end]
            before = [i for i, char in enumerate(piece) if char != mark]  # 去掉记号之后的 -> 之前的
            before.append(len(piece))
            clean = piece.replace(mark, "")
            found, places = self._encoded(clean, plain, text[:start])
            ids += found
            offsets += [
                (start + before[a], start + (before[b - 1] + 1 if b > a else before[a]))
                for a, b in places
            ]
        return ids, offsets

    def _pieces(self, text: str, mark: str) -> Iterator[tuple[int, int, bool]]:
        """``(开头, 结尾, 当作普通文字)``：两个控制 token 之间有记号的一段，与其余的。"""
        edges = [(0, 0), *self._in_text.spans(text), (len(text), len(text))]
        done = 0
        for (left, start), (end, right) in itertools.pairwise(edges):
            if mark not in text[start:end]:
                continue
            # Phi-3 的 <|end|> 把其后的换行也吃掉：那几个空白跟着它，不属于这一段。
            if self._strips(text[left:start], "rstrip"):
                start += len(text[start:end]) - len(text[start:end].lstrip())
            if self._strips(text[end:right], "lstrip"):
                end = start + len(text[start:end].rstrip())
            if done < start:
                yield done, start, False
            yield start, end, True
            done = end
        if done < len(text):
            yield done, len(text), False

    def _strips(self, token: str, side: str) -> bool:
        return token in self._special and bool(getattr(self._special[token], side))

    def _encoded(self, text: str, plain: bool, before: str) -> tuple[list[int], list[Span]]:
        if not plain:
            encoded = self._tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            return encoded["input_ids"], encoded["offset_mapping"]
        lead = "\n" if before and self._needs_lead else ""
        encoding = self._splitter.encode(lead + text, add_special_tokens=False)
        pairs = [
            (token, (a - len(lead), b - len(lead)))
            for token, (a, b) in zip(encoding.ids, encoding.offsets, strict=True)
            if b > len(lead) or not lead
        ]
        for token, (a, b) in pairs:
            if self._tokenizer.convert_ids_to_tokens(token) in self.tokens:
                raise DistillabError(
                    f"the tokenizer makes a control token of the plain text {text[a:b]!r} in the "
                    f"content; set data.control_tokens to keep, or leave it out of the data"
                )
        return [token for token, _ in pairs], [span for _, span in pairs]

    @cached_property
    def _splitter(self) -> Any:
        """同一个分词器，控制 token 只是文字。"""
        backend = copy.deepcopy(self._tokenizer.backend_tokenizer)
        backend.no_truncation()
        backend.no_padding()
        backend.add_special_tokens(self._plain)  # 没有标成 special 的，下一行管不到
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def _needs_lead(self) -> bool:
        """一段文字单独分词，是否与它跟在控制 token 之后时不同：SentencePiece 在开头添一个空格。"""
        token = next(iter(self._special), "")

        def ids(text: str) -> list[int]:
            found: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            return found

        return ids(f"{token}a")[len(ids(token)) :] != ids("a")


class _Finder:
    """在文字里找一组词，靠左的、长的优先；按首字与长度去查集合，比几千个词连成的正则快得多。"""

    def __init__(self, words: Iterable[str]) -> None:
        self._words = frozenset(words)
        self._lengths: dict[str, list[int]] = {}
        for length, first in sorted({(-len(word), word[0]) for word in self._words}):
            self._lengths.setdefault(first, []).append(-length)
        firsts = "".join(map(re.escape, self._lengths))
        self._first = re.compile(f"[{firsts}]" if firsts else "(?!)")

    def spans(self, text: str) -> Iterator[Span]:
        """各处的 ``[start, end)``，互不重叠。"""
        done = 0
        for found in self._first.finditer(text):
            start = found.start()
            if start < done:
                continue
            for length in self._lengths[text[start]]:
                if text[start : start + length] in self._words:
                    done = start + length
                    yield start, done
                    break
