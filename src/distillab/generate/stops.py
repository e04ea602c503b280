"""在哪些 token 停下：生成、采样、合成、考试与导出共用这一份答案。

各处写的都不全：Gemma 的 tokenizer 只说 ``<eos>``，``<end_of_turn>`` 写在 generation_config 里；Qwen
的 base 与 chat 各以 ``<|endoftext|>`` 与 ``<|im_end|>`` 之一为 eos，另一个同样表示说完了；文本训练
在文章之间学的是分隔 token，聊天训练学的是模板写在一轮之后的那个。所以取并集。
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..data.chat import turn_end
from ..models.interface import LanguageModel
from ..models.tokenizer import document_separator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_END_TOKENS = ("<|endoftext|>", "<|im_end|>")


def stop_ids(
    tokenizer: PreTrainedTokenizerBase, model: LanguageModel | None = None
) -> frozenset[int]:
    """生成到其中任何一个就停。

    Args:
        tokenizer: 它的 eos、文章之间的分隔、chat template 写在 assistant 一轮之后的 token。
        model: 再加上它的配置与 generation_config 里的 eos。

    Returns:
        token id；tokenizer 与模型都没有写 eos 时可能为空。
    """
    special = {
        str(token): index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
    found = {special[token] for token in _END_TOKENS if token in special}
    if tokenizer.eos_token_id is not None:
        found |= {int(tokenizer.eos_token_id), document_separator(tokenizer)}
    turn = turn_end(tokenizer, {})
    if turn is not None:
        found.add(turn.token)
    return frozenset(found | getattr(model, "eos_token_ids", frozenset()))


def generation_ids(
    tokenizer: PreTrainedTokenizerBase, model: LanguageModel
) -> dict[str, int | list[int] | None]:
    """导出的 generation_config 里的特殊 token：``model.generate()`` 停在我们停的每一个 token。

    Args:
        tokenizer: 模型的 tokenizer。
        model: 要导出的模型。

    Returns:
        ``bos_token_id``、``eos_token_id``（tokenizer 的 eos 在最前，只有一个时是整数）与
        ``pad_token_id``（没有就用 eos，否则 transformers 每次生成都要警告）。
    """
    own: Any = tokenizer.eos_token_id
    stops = sorted(stop_ids(tokenizer, model), key=lambda index: (index != own, index))
    pad = tokenizer.pad_token_id
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": stops if len(stops) > 1 else next(iter(stops), None),
        "pad_token_id": next(iter(stops), None) if pad is None else pad,
    }
