"""从 Qwen 的 BPE 词表（``qwen.tiktoken``）造出 transformers 的 ``Qwen2Tokenizer``。

tiktoken 的文件只有 token 与 rank，没有 merges；但 rank 就是合并的先后，所以 merges 可以还原。
transformers 的 ``TikTokenConverter`` 给每个 token 列出所有的拆法，merges 多出一倍：ids 相同，指纹却
不同，已有的运行就接不上了。
"""

from __future__ import annotations

import base64
import binascii
import logging
from itertools import pairwise
from pathlib import Path

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
    """Qwen 词表对应的、``AutoTokenizer`` 能读的目录，第一次用时建好（几秒）。

    词表每行是一个 base64 的 token 与它的 rank；读不懂，或 rank 不是 0..151642，是
    ``DistillabError``。
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
    """只用比它更早的 token 做 BPE，最后剩下的两块就是造出它的那次合并；单个字节没有。"""
    own_rank = ranks[token]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        candidates = [ranks.get(a + b, own_rank) for a, b in pairwise(parts)]
        best = min(candidates)
        if best >= own_rank:
            return None
        at = candidates.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _write_tokenizer(ranks: dict[bytes, int], directory: Path) -> None:
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    alphabet = bytes_to_unicode()

    def spell(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    pairs = [_merge_of(token, ranks) for token in sorted(ranks, key=ranks.__getitem__)]
    tokenizer = Qwen2Tokenizer(
        vocab={spell(token): rank for token, rank in ranks.items()},
        merges=[(spell(pair[0]), spell(pair[1])) for pair in pairs if pair is not None],
        add_prefix_space=False,
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        errors="replace",
        extra_special_tokens=_SPECIAL[1:],
        model_max_length=32768,
        split_special_tokens=False,
        unk_token=None,
    )
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in _PLAIN])
    tokenizer.save_pretrained(directory)
