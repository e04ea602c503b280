"""裁剪 BPE 分词器：只留语料用到的 token，切出的与原来逐个相同，别的文字仍能编码、解码成自己。

BPE 每一步做 rank 最小的那次合并。留下的合并是原来的一个子集、先后不变，又含有语料里做过的每一次：
那么每一步最小的仍是那一次，结果也就相同。一个 token 是怎样合并出来的，与它两边是什么无关，所以
单独对它做一遍 BPE，就知道要留哪些中间的 token。
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DistillabError
from .tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]
"""SentencePiece 的字节 token。"""

_NEEDED = {*b"\t\n\r", *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1)}
"""写下来的文字用到的字节；有的分词器（SmolLM2）没有 UTF-8 里没有的字节与几个控制字符。"""

_OTHER_FILES = ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json")
"""词表的别的写法；留着就与裁剪过的 ``tokenizer.json`` 矛盾。"""


class BpeRules:
    """一个 BPE 分词器的词表与合并；``bytes`` 是它的字节 token。

    不是 BPE，或没有字节 token（别的文字就编码不了）的，是 ``DistillabError``。
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise _refused(f"a {type(tokenizer).__name__} without a tokenizer.json")
        self.tokenizer = tokenizer
        self.spec: dict[str, Any] = json.loads(backend.to_str())
        model = self.spec["model"]
        if model["type"] != "BPE":
            raise _refused(f"a {model['type']} tokenizer")
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(key):
                raise _refused(f"one with {key}={model[key]!r}")
        self.vocab: dict[str, int] = model["vocab"]
        self.merges: list[tuple[str, str]] = [(left, right) for left, right in model["merges"]]
        self.added: dict[str, int] = {t["content"]: t["id"] for t in self.spec["added_tokens"]}
        self.bytes = self._byte_tokens()

    def _byte_tokens(self) -> list[str]:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        if any("ByteLevel" in _types(self.spec[step]) for step in ("normalizer", "pre_tokenizer")):
            names = [char for _, char in sorted(bytes_to_unicode().items())]
        elif self.spec["model"].get("byte_fallback"):
            names = _FALLBACK
        else:
            raise _refused("one without byte tokens, which could not encode every other text")
        if lacking := [names[byte] for byte in sorted(_NEEDED) if names[byte] not in self.vocab]:
            raise _refused(f"one without {len(lacking)} byte tokens, such as {lacking[0]!r}")
        return [name for name in names if name in self.vocab]

    @cached_property
    def token_of(self) -> dict[int, str]:
        """Id → token，后加的在内。"""
        return {index: token for token, index in (self.vocab | self.added).items()}

    @cached_property
    def ranks(self) -> dict[tuple[str, str], int]:
        """一次合并 → 它的先后。"""
        return {pair: rank for rank, pair in enumerate(self.merges)}

    def kept(self, counts: NDArray[np.int64], coverage: float) -> list[int]:
        """留下的原来的 id，按新的次序；``counts [V]`` 是语料里各个 id 出现的次数。

        由多到少地留，直到占到 ``coverage``，在 ``(0, 1]`` 里；字节、后加的 token 与合并出它们所经过
        的总是留下。新的 id 依原来的先后，没有空洞；不在 BPE 词表里的后加的在最后。
        """
        order = np.argsort(-counts, kind="stable")
        enough = int(np.searchsorted(counts[order].cumsum(), coverage * counts.sum())) + 1
        used = [self.token_of[i] for i in order[:enough].tolist() if counts[i]]
        unknown = self.spec["model"].get("unk_token")
        tokens = {*used, *self.bytes, *self.added, *([unknown] if unknown in self.vocab else [])}
        for token in list(tokens):
            tokens.update(self._ancestors(token))
        own = sorted(self.vocab[token] for token in tokens & self.vocab.keys())
        return own + sorted(self.added[token] for token in tokens - self.vocab.keys())

    def pieces(self, token: str, ranks: dict[tuple[str, str], int] | None = None) -> list[str]:
        """一个 token 的文字照 ``ranks``（缺省是全部的合并）切成哪几个 token。"""
        return self._merged(token, self.ranks if ranks is None else ranks)[0]

    def _ancestors(self, token: str) -> list[str]:
        """合并出 ``token`` 所经过的；不是合并出来的（``ignore_merges`` 整个取的等）为空。"""
        if token not in self.vocab:
            return []
        pieces, made = self._merged(token, self.ranks)
        return made if pieces == [token] else []

    def _merged(self, token: str, ranks: dict[tuple[str, str], int]) -> tuple[list[str], list[str]]:
        parts = list(token)
        if self.spec["model"].get("byte_fallback"):  # 词表里没有的字退到它的字节
            known = self.vocab
            parts = [
                part
                for char in parts
                for part in ([char] if char in known else [_FALLBACK[b] for b in char.encode()])
            ]
        made, never = list(parts), len(self.merges)
        while len(parts) > 1:
            found = [ranks.get(pair, never) for pair in pairwise(parts)]
            best = min(found)
            if best == never:
                break
            at = found.index(best)  # 先后相同的，左边的先合并
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
            made.append(parts[at])
        return parts, made

    def write(self, kept: Sequence[int], directory: Path) -> PreTrainedTokenizerBase:
        """把只有 ``kept`` 的分词器写进 ``directory``，返回读回来的；读回来的不同是错误。

        chat template 与其余的设置照旧；原来的 id 都换成新的。
        """
        new = {old: index for index, old in enumerate(kept)}
        vocab = {self.token_of[old]: index for old, index in new.items()}
        model = self.spec["model"]
        spec = self.spec | {
            "truncation": None,
            "padding": None,
            "added_tokens": [
                added | {"id": new[added["id"]]}
                for added in sorted(self.spec["added_tokens"], key=lambda added: new[added["id"]])
            ],
            "post_processor": _renumbered(self.spec["post_processor"], new),
            "model": model
            | {
                "vocab": {token: i for token, i in vocab.items() if token in self.vocab},
                "merges": [list(pair) for pair in self.merges_within(vocab)],
            },
        }
        self.tokenizer.save_pretrained(directory)
        for name in _OTHER_FILES:
            (directory / name).unlink(missing_ok=True)
        text = json.dumps(spec, ensure_ascii=False)
        (directory / "tokenizer.json").write_text(text, encoding="utf-8")
        config = directory / "tokenizer_config.json"
        settings = json.loads(config.read_text(encoding="utf-8"))
        if decoder := settings.get("added_tokens_decoder"):
            settings["added_tokens_decoder"] = {new[int(i)]: t for i, t in decoder.items()}
            config.write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
        tokenizer = load_tokenizer(str(directory))
        if tokenizer.get_vocab() != vocab:
            raise _refused(f"a {type(self.tokenizer).__name__}, which reads its trimmed files anew")
        return tokenizer

    def merges_within(self, tokens: Iterable[str]) -> list[tuple[str, str]]:
        """两边与结果都在 ``tokens`` 里的合并，先后不变。"""
        known = set(tokens) & self.vocab.keys()
        return [
            (left, right)
            for left, right in self.merges
            if left in known and right in known and left + right in known
        ]

    def first_pieces(self, kept: Sequence[int]) -> dict[int, int]:
        """去掉的 id → 它的文字用 ``kept`` 的分词器切，第一个 token 的新 id。"""
        new = {self.token_of[old]: index for index, old in enumerate(kept)}
        ranks = {pair: rank for rank, pair in enumerate(self.merges_within(new))}
        found = {}
        for token, index in self.vocab.items():
            if token not in new:
                first = self.pieces(token, ranks)[0]
                found[index] = new[first] if first in new else new[_FALLBACK[first.encode()[0]]]
        return found


def ids_before(
    trimmed: PreTrainedTokenizerBase, whole: PreTrainedTokenizerBase
) -> list[int] | None:
    """``trimmed`` 的每个 id 在 ``whole`` 里的 id；前者不是由后者裁剪出的，是 ``None``。"""
    try:
        part, full = BpeRules(trimmed), BpeRules(whole)
    except DistillabError:
        return None
    known = full.vocab | full.added
    tokens = [part.token_of.get(index) for index in range(len(part.token_of))]
    same = all(part.spec[step] == full.spec[step] for step in ("normalizer", "pre_tokenizer"))
    if not same or part.merges != full.merges_within(part.vocab):
        return None
    found = [known[token] for token in tokens if token in known]
    return found if len(found) == len(tokens) else None


def _types(step: Any) -> set[str]:
    """``tokenizer.json`` 里一个步骤与它里面的各步的 ``type``。"""
    if isinstance(step, list):
        return set().union(*map(_types, step))
    if not isinstance(step, dict):
        return set()
    return {str(step.get("type"))}.union(*map(_types, step.values()))


def _renumbered(processor: Any, new: dict[int, int]) -> Any:
    """后处理器，里面的 id 换成新的。"""
    if processor is None:
        return None
    found = dict(processor)
    if "processors" in found:
        found["processors"] = [_renumbered(inner, new) for inner in found["processors"]]
    if isinstance(special := found.get("special_tokens"), dict):
        found["special_tokens"] = {
            name: token | {"ids": [new[i] for i in token["ids"]]} for name, token in special.items()
        }
    for side in {"sep", "cls"} & found.keys():
        token, index = found[side]
        found[side] = [token, new[index]]
    return found


def _refused(found: str) -> DistillabError:
    return DistillabError(
        f"student.vocab cannot trim this tokenizer: found {found}, expected a byte-level BPE, or a "
        f"BPE with byte fallback"
    )
