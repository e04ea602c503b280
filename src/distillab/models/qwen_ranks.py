"""从 Qwen 的 BPE 词表（``qwen.tiktoken``）造出与 Qwen2.5 一致的快速分词器。

tiktoken 的文件只有 token 与 rank，没有 merges；但 rank 就是合并的先后，所以 merges 可以还原。
结果存成 Hugging Face 的目录，由 ``AutoTokenizer`` 读入，导出的学生模型可以原样带走。
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..cache import build_once, cache_dir, file_sha256
from ..errors import DistillabError

logger = logging.getLogger("distillab")

NUM_RANKS = 151_643
# Qwen2.5 tokenizer_config.json 里的顺序，id 从 151643 起。
_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
# 这些不算 special：decode(skip_special_tokens=True) 时仍要读出来。
_PLAIN = [
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
]
# 预分词的正则，与 Qwen2 在 transformers 中的相同：数字逐个切开，不像 GPT-4 那样三个一组。
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen2.5 的 ChatML：没有 system 消息时补一条默认的。
_CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def qwen_tokenizer_dir(path: Path) -> Path:
    """Qwen 词表对应的分词器目录，第一次用时建好（几秒），之后直接返回。

    Args:
        path: ``qwen.tiktoken``：每行一个 base64 的 token 与它的 rank。

    Returns:
        ``AutoTokenizer`` 能读的目录，共 151,665 个 token。

    Raises:
        DistillabError: 有一行读不懂，或 rank 不是 0..151642。
    """
    target = cache_dir() / "tokenizers" / f"qwen-{file_sha256(path)[:16]}-v1"
    with build_once(target) as directory:
        if directory is not None:
            ranks = _read_ranks(path)
            logger.info("building the Qwen tokenizer from %s (once)", path.name)
            _write_tokenizer(ranks, directory)
    return target


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DistillabError(
                f"{path}:{number}: expected a base64 token and its rank, found {line[:40]!r}"
            ) from error
    if sorted(ranks.values()) != list(range(NUM_RANKS)):
        raise DistillabError(
            f"{str(path)!r} holds {len(ranks)} ranks; expected Qwen's {NUM_RANKS}, numbered from 0"
        )
    return ranks


def _merge_of(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """只用比它更早的 token 做 BPE，最后剩下的两块就是造出它的那次合并。"""
    own_rank = ranks[token]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        candidates = [ranks.get(a + b, own_rank) for a, b in pairwise(parts)]
        best = min(candidates)
        if best >= own_rank:
            return None
        at = candidates.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1])


def _write_tokenizer(ranks: dict[bytes, int], directory: Path) -> None:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    alphabet = _byte_alphabet()

    def spell(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    pairs = (
        _merge_of(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1
    )
    merges = [(spell(pair[0]), spell(pair[1])) for pair in pairs if pair is not None]
    tokenizer = Tokenizer(BPE({spell(token): rank for token, rank in ranks.items()}, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        AddedToken(name, special=name in _SPECIAL, normalized=False) for name in _SPECIAL + _PLAIN
    ]
    tokenizer.add_tokens(added)
    tokenizer.save(str(directory / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(NUM_RANKS + offset): {
                "content": token.content,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": token.special,
            }
            for offset, token in enumerate(added)
        },
        "additional_special_tokens": _SPECIAL[1:],
        "bos_token": None,
        "chat_template": _CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "unk_token": None,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def _byte_alphabet() -> list[str]:
    """GPT-2 的约定：每个字节写成一个可见字符，不可见的字节依次借用 U+0100 起的字符。"""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    borrowed = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(borrowed)) for byte in range(256)]
