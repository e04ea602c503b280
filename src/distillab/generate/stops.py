"""在哪里停下：生成、采样、合成、考试与导出共用这一份答案。

各处写的都不全：Gemma 的 tokenizer 只说 ``<eos>``，``<end_of_turn>`` 写在 generation_config 里；Qwen
的 base 与 chat 各以 ``<|endoftext|>`` 与 ``<|im_end|>`` 之一为 eos，另一个同样表示说完了；文本训练
在文章之间学的是分隔 token，聊天训练学的是模板写在一轮之后的那个。所以取并集。
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.turn_end import turn_end
from ..models.interface import LanguageModel
from ..models.tokenizer import document_separator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_END_TOKENS = ("<|endoftext|>", "<|im_end|>")


def stop_ids(
    tokenizer: PreTrainedTokenizerBase, model: LanguageModel | None = None
) -> frozenset[int]:
    """生成到其中任何一个就停；tokenizer 与模型都没有写 eos 时可能为空。"""
    special = {
        str(token): index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
    found = {special[token] for token in _END_TOKENS if token in special}
    if tokenizer.eos_token_id is not None:
        found |= {int(tokenizer.eos_token_id), document_separator(tokenizer)}
    turn = turn_end(tokenizer)
    if turn is not None:
        found.add(turn.token)
    return frozenset(found | getattr(model, "eos_token_ids", frozenset()))


def generation_ids(
    tokenizer: PreTrainedTokenizerBase, model: LanguageModel
) -> dict[str, int | list[int] | None]:
    """导出的 generation_config 里的特殊 token：``model.generate()`` 停在我们停的每一个 token。

    ``eos_token_id`` 以 tokenizer 的 eos 为首，只有一个时是整数。
    """
    own = tokenizer.eos_token_id
    stops = sorted(stop_ids(tokenizer, model), key=lambda index: (index != own, index))
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": stops if len(stops) > 1 else next(iter(stops), None),
        "pad_token_id": pad_id(tokenizer, stops),
    }


def pad_id(tokenizer: PreTrainedTokenizerBase, stops: Iterable[int]) -> int | None:
    """补齐用的 token；没有就用 eos 或别的停止 token，否则 transformers 每次生成都要警告。"""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, *sorted(stops))
    return next((index for index in candidates if index is not None), None)


def until_stop(ids: list[int], stop_ids: Container[int]) -> list[int]:
    """到第一个停止 token 为止，含它：学会停下也是要学的。"""
    end = next((index for index, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[: end + 1]


class StopTexts:
    """逐个 token 地看每一行写出了 ``texts`` 之一没有；``rows`` 是各行到停下为止的 token。"""

    def __init__(
        self,
        texts: Sequence[str],
        stop_ids: Container[int],
        decode: Callable[[list[int]], str],
        rows: int,
    ) -> None:
        self.rows: list[list[int]] = [[] for _ in range(rows)]
        self._texts, self._stop_ids, self._decode = texts, stop_ids, decode
        self._ended = [False] * rows
        # 一个 token 至少一个字节，所以停止的文字总在最后这么多个 token 里。
        self._tail = max((len(text.encode()) for text in texts), default=0) + 1

    def __call__(self, rows: Tensor, new_ids: Tensor) -> Tensor:
        """交给 ``generate_ids`` 的 ``on_token``。"""
        for i, token in zip(rows.tolist(), new_ids.tolist(), strict=True):
            if not self._ended[i]:
                self.rows[i].append(token)
                self._ended[i] = token in self._stop_ids or self._seen(self.rows[i])
        return torch.tensor(self._ended, device=rows.device)[rows]

    def _seen(self, ids: list[int]) -> bool:
        text = self._decode(ids[-self._tail :])
        return any(stop in text for stop in self._texts)
