"""每个 token 是哪几个 UTF-8 字节：由分词器的解码规则得出，字节级 BPE 的一个 token 可以是半个字。"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..errors import DistillabError
from .tokenizer import leading_ids, vocab_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END = b"\xff"
"""说完了、文章完了的 token 都当作这个字节：UTF-8 里没有它，两边的名字不同也对得上。"""

_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SAMPLE = "Tokens 词 1\n\t x=2.5; naïve 😀"


def token_bytes(tokenizer: PreTrainedTokenizerBase, ends: Iterable[int], what: str) -> list[bytes]:
    """``[id]`` → 它的字节；``ends`` 里的是 ``END``，分词器自己加在文字之前的、没有定义的是空的。

    后加的 token 是它写出来的样子：对方也许把同样的文字当作普通文字。编码再拼起来不是原文的分词器
    （变成小写的，WordPiece 等）是 ``DistillabError``，``what`` 是谁的。
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    backend = getattr(tokenizer, "backend_tokenizer", None)
    kinds = set() if backend is None or backend.decoder is None else _kinds(backend.decoder)
    by_char = {char: byte for byte, char in bytes_to_unicode().items()}
    added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
    silent, ending = set(leading_ids(tokenizer)), set(ends)
    found = [b""] * vocab_limit(tokenizer)
    for token, index in tokenizer.get_vocab().items():
        if index in ending:
            found[index] = END
        elif "ByteFallback" in kinds and (byte := _FALLBACK.fullmatch(token)):
            found[index] = bytes([int(byte[1], 16)])
        elif index in added:
            found[index] = b"" if index in silent else added[index].encode()
        elif "ByteLevel" in kinds:
            found[index] = bytes(by_char[char] for char in token if char in by_char)
        else:
            found[index] = token.replace("\u2581", " ").encode("utf-8", "surrogatepass")
    ids = tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]
    written = b"".join(found[index] for index in ids)
    if written.removeprefix(b" ") != _SAMPLE.encode():
        raise DistillabError(
            f"the {what}'s tokenizer writes {_SAMPLE!r} as {written.decode('utf-8', 'replace')!r}: "
            f"text cannot be aligned by bytes; expected a BPE tokenizer with byte tokens"
        )
    return found


def _kinds(decoder: Any) -> set[str]:
    """解码的各步。"""
    state = json.loads(decoder.__getstate__())
    return {part["type"] for part in state.get("decoders", [state])}
