"""lm-evaluation-harness 的模型接口，由 ``LanguageModel`` 实现；导入它要有 ``lm_eval``。

分词、截断与滑动窗口照 ``lm_eval.models.huggingface``，结果因而可与发表的相比；只有两处不同：词表
末尾没有文字的填充行没有概率，生成停在 ``stops.stop_ids`` 里的任何一个，不只是 eos。
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from ..config.sections import SamplingConfig
from ..errors import DistillabError, nearest
from ..generate.generator import TextGenerator
from ..generate.likelihood import likelihoods
from ..generate.respond import respond
from ..generate.sampling import row_seeds
from ..models.interface import LanguageModel
from ..models.tokenizer import own_vocabulary

SAMPLING = ("temperature", "top_k", "top_p")
"""任务的 ``generation_kwargs`` 里认得的采样参数。"""

SEED = 1234
"""采样的种子，与 lm-evaluation-harness 的 ``torch_random_seed`` 相同。"""


class HarnessLM(TemplateLM):  # type: ignore[misc]
    """``lm_eval.evaluator.evaluate`` 的 ``lm``；``batch_size`` 是一起算的序列数。"""

    def __init__(
        self, model: LanguageModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self._generator = TextGenerator(model, tokenizer)

    @property
    def eot_token_id(self) -> int:
        """一段文字结束的 token。"""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """上文是空的时候放在最前面的 token：bos，没有就是 eos。"""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """分词；``add_special_tokens`` 缺省随 tokenizer，已经以 bos 开头的不再添。"""
        if add_special_tokens is None:
            start = self.tokenizer.decode([self.prefix_token_id])
            add_special_tokens = not string.startswith(start)
        ids: list[int] = self.tokenizer(
            string, add_special_tokens=add_special_tokens, verbose=False
        )["input_ids"]
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        limit = self.model.max_seq_len
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > limit:
            raise DistillabError(
                f"evaluate.lm_eval: a continuation has {longest} tokens, expected at most the "
                f"model's longest sequence {limit}"
            )
        found = likelihoods(
            self.model,
            # 放不下就从左边截断上文；最后一个 token 只被预测，不占位置。
            [(context[-(limit + 1 - len(text)) :], text) for _, context, text in requests],
            vocabulary=own_vocabulary(self.tokenizer),
            batch_size=self.batch_size,
        )
        return [(one.total, one.greedy) for one in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        """整段文字的 log 似然，单位 nat：每个 token 预测一次，太长的分成几窗。"""
        windows = [
            [
                (None, *make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.model.max_seq_len,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        found = iter(self._loglikelihood_tokens([window for part in windows for window in part]))
        return [sum(next(found)[0] for _ in part) for part in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """写到 ``until`` 里的任何一段文字为止，不含它；同样参数的一起生成，由长到短。"""
        groups: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(index)
        seeds = row_seeds(SEED, len(requests))
        found = [""] * len(requests)
        for indices in groups.values():
            options = normalize_gen_kwargs(requests[indices[0]].args[1])
            room = self.model.max_seq_len - options["max_gen_toks"]
            if room < 1:
                raise DistillabError(
                    f"evaluate.lm_eval: {requests[indices[0]].task_name} generates up to "
                    f"{options['max_gen_toks']} tokens, expected fewer than the model's longest "
                    f"sequence {self.model.max_seq_len}"
                )
            until = [text for text in options["until"] if text]
            batches = respond(
                self._generator,
                [self.tok_encode(requests[i].args[0])[-room:] for i in indices],
                _sampling(options),
                [seeds[i] for i in indices],
                batch_size=self.batch_size,
                until=until,
            )
            for batch in batches:
                for row, ids in batch.items():
                    text = self._generator.decode(ids)
                    found[indices[row]] = postprocess_generated_text(text, until, None)
        return found


def _sampling(options: dict[str, Any]) -> SamplingConfig:
    """任务的 ``generation_kwargs`` → 采样参数；不采样就是贪心。"""
    known = ("until", "max_gen_toks", "do_sample", *SAMPLING)
    for key in options:
        if key not in known:
            raise DistillabError(
                f"evaluate.lm_eval: the generation option {key!r} of a task is not supported; "
                f"{nearest(key, known)}"
            )
    given = {key: options[key] for key in SAMPLING if options.get(key) is not None}
    chosen = {"temperature": 1.0} | given if options.get("do_sample") else {"temperature": 0.0}
    try:
        sampling = SamplingConfig.model_validate(chosen)
    except ValueError as error:
        raise DistillabError(
            f"evaluate.lm_eval: a task samples with {given}, expected at most one of top_k and "
            f"top_p, within their bounds"
        ) from error
    return sampling.model_copy(update={"max_new_tokens": options["max_gen_toks"]})
