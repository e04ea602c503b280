"""教师与学生共用的语言模型接口，以及任意 Hugging Face 因果语言模型的包装。

接口的要点：``forward`` 只算到最后一层隐状态，词表投影由 ``head`` 单独给出。词表往往占去近一半
的计算与绝大部分激活显存，乘不乘、分几块乘、乘哪几个位置，要由损失来决定。
"""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..batch import View
from ..errors import DistillabError, foreign
from ..targets import Head
from .abilities import Abilities, find_abilities, static_error, unmasked_right
from .head_fit import fit_head, relative_error, tolerance
from .hf_masks import single_documents
from .kv_cache import dynamic_cache
from .static_cache import places_of, static_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel


logger = logging.getLogger("distillab")

PROBE_TOKENS = 12
"""核对一个模型用的 token 数。"""


class LanguageModel(nn.Module, ABC):
    """教师与学生共用的接口；``StudentModel`` 与 ``PretrainedLM`` 是两个实现。

    Attributes:
        eos_token_ids: 模型自己（``StudentModel`` 则是教它的模型）的配置里写着的停止 token。
    """

    eos_token_ids: frozenset[int] = frozenset()

    @property
    def capturable(self) -> bool:
        """前向能不能录成 CUDA graph：其间不等设备，也不用随机数。"""
        return False

    @abstractmethod
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """``input_ids: [B, T]`` → 最后一层隐状态 ``[B, T, H]``（已归一化，未乘词表）。

        ``position_ids: [B, T]`` 每从 0 重新数起就是另一段文档，互相看不见；给出它时没有另外两样。
        """

    def read(self, view: View) -> Tensor:
        """``[P, H]``：预测 ``view`` 的每个 response token 的隐状态。

        因果注意力看不见右边的填充，``index`` 也不取它们，用不着 mask：SDPA 走最快的内核，
        ``[B, 1, T, T]`` 从不存在。
        """
        mask = None if self.pads_right else view.attention_mask
        return view.rows(self(view.input_ids, mask, position_ids=view.position_ids))

    @property
    @abstractmethod
    def head(self) -> Head:
        """词表投影。"""

    @property
    @abstractmethod
    def max_seq_len(self) -> int:
        """最长序列，单位 token。"""

    @abstractmethod
    def new_cache(self) -> Any:
        """空的 KV cache，交给 ``forward`` 的 ``cache``；``batch_select_indices`` 只留其中几行。

        ``None`` 是这个模型没有可信的缓存：每一步从头算起。
        """

    def static_cache(self, room: int) -> Any:
        """形状固定、放得下 ``room`` 个 token 的空缓存，用法见 ``StaticDecoding``。

        ``None`` 是这个模型没有可信的。
        """
        return None

    @property
    def pads_left(self) -> bool:
        """左边的填充是否不影响真实的 token；否则长短不一的几行不能一起生成。"""
        return True

    @property
    def pads_right(self) -> bool:
        """右边的填充不必告诉它：没有 ``attention_mask``，真实的 token 也是同样的隐状态。"""
        return True

    @abstractmethod
    def enable_activation_checkpointing(self) -> None:
        """训练时不存每层的激活，反向时重算。"""

    @property
    @abstractmethod
    def block_names(self) -> Sequence[str]:
        """各层的类名；分片时一层一层地收齐。"""

    @property
    def blocks(self) -> list[nn.Module]:
        """各层，由前到后；分片与编译都以层为单位。"""
        return [part for part in self.modules() if type(part).__name__ in self.block_names]

    @property
    def vocab_size(self) -> int:
        """``head.weight`` 的行数 V，含填充行。"""
        return int(self.head.weight.shape[0])

    @property
    def hidden_size(self) -> int:
        """隐状态宽度 H。"""
        return int(self.head.weight.shape[1])

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden: [..., H]`` 过 head → logits ``[..., V]``，float32。"""
        return self.head.logits(hidden)

    def num_parameters(self) -> int:
        """参数个数，绑定的参数只数一次。"""
        return sum(parameter.numel() for parameter in self.parameters())


@contextmanager
def evaluating(model: nn.Module, parts: Iterable[nn.Module] | None = None) -> Iterator[None]:
    """暂时切到 eval，退出时逐个模块还原：有的子模块（如冻结的）可能本来就在 eval。

    ``parts`` 是 ``model.modules()``，每步都要切换的先存下来：几千个模块走一遍要十几毫秒。
    """
    training = [module for module in parts or model.modules() if module.training]
    for module in training:
        vars(module)["training"] = False  # nn.Module 的赋值要查好几个字典
    try:
        yield
    finally:
        for module in training:
            vars(module)["training"] = True


def declared_eos(*configs: Any) -> frozenset[int]:
    """各个配置里写着的 ``eos_token_id``，一个或一列都行；``None`` 不算。"""
    found: set[int] = set()
    for config in configs:
        ids = getattr(config, "eos_token_id", None)
        found |= {ids} if isinstance(ids, int) else set(ids or ())
    return frozenset(found)


class PretrainedLM(LanguageModel):
    """把任意 Hugging Face 因果语言模型包装成 ``LanguageModel``。

    Args:
        model: 由 ``AutoModelForCausalLM`` 得到的模型，保存在 ``self.model``。

    Raises:
        DistillabError: 模型没有词表投影，它的 logits 含有 ``Head`` 表达不了的运算，或它不是因果的。
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        # transformers 的若干方法没有类型标注，经 Any 调用。
        self.model: Any = model
        if self.model.get_output_embeddings() is None:
            raise DistillabError(
                f"{type(model).__name__} has no output embedding, expected a causal language model "
                "such as AutoModelForCausalLM returns"
            )
        self._config: Any = model.config.get_text_config()
        capped = any(getattr(part, "attn_logit_softcapping", None) for part in model.modules())
        if capped and self._config._attn_implementation == "sdpa":
            # SDPA 没有 softcap：transformers 5.18 之前不声不响地不做它。
            self.model.set_attn_implementation("eager")
        # 位置编码不靠 position_ids 的模型（ALiBi 等）没有这个参数。
        takes = inspect.signature(self._backbone.forward).parameters
        self._takes_positions = "position_ids" in takes
        # Mamba 一类给缓存起了另一个名字，5.24 起都叫 cache；叫错了不报错，只是不用它。
        names = ("past_key_values", "cache", "cache_params")
        self._cache_name = next((name for name in names if name in takes), None)
        self._scale, self._softcap, self._pads_right = 1.0, None, False
        fitted = self._fitted_head()
        self._scale, self._softcap = fitted.scale, fitted.softcap

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """算出最后一层隐状态。

        Args:
            input_ids: ``[B, T]``，int64。
            attention_mask: ``[B, past + T]``，1 为真实 token；左右填充皆可。
            cache: ``new_cache()`` 的返回值，或 ``None``。
            position_ids: ``[B, T]``，一行里有几段文档时各从 0 数起；transformers 由此认出它们，
                是否真的隔开见 :func:`distillab.data.packing.keeps_documents_apart`。

        Returns:
            ``[B, T, H]``，模型自身的 dtype，已过最终归一化，未乘词表。

        Raises:
            ValueError: 给了 ``position_ids`` 而模型不看它。
        """
        extra: dict[str, Any] = {}
        if position_ids is not None:
            if not self._takes_positions:
                raise ValueError(f"{type(self.model).__name__} takes no position_ids")
            extra["position_ids"] = position_ids
        if attention_mask is not None and self._takes_positions:
            # 不少模型默认从 0 数位置而不看 mask，左填充时结果会变。
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            extra["position_ids"] = positions[:, -input_ids.shape[1] :]
        if cache is not None and self._cache_name is not None:
            extra[self._cache_name] = cache
            places = places_of(cache)
            if places is not None:
                extra["position_ids"], attention_mask = places.step()
            else:
                if attention_mask is None and self._takes_positions:
                    # 不是每个模型都从缓存里数得出已有多少 token。
                    steps = torch.arange(input_ids.shape[1], device=input_ids.device)
                    extra["position_ids"] = steps[None] + cache.length
                cache.length += input_ids.shape[1]
        single = attention_mask is None and position_ids is None
        with single_documents() if single else nullcontext():
            output = self._backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                use_cache=cache is not None,
                return_dict=True,
                **extra,
            )
        hidden: Tensor = output.last_hidden_state
        return hidden

    @property
    def _backbone(self) -> Any:
        """词表投影之前的部分。"""
        base = self.model.base_model
        if base is not self.model:
            return base
        # Llama 4 一类的 ``base_model_prefix`` 写着自己没有的名字，只能从孩子里找。
        inner = [part for part in self.model.children() if hasattr(part, "base_model_prefix")]
        return inner[0] if len(inner) == 1 else base

    @torch.no_grad()
    def _fitted_head(self) -> Head:
        """由几个 token 核对 logits 能由隐状态算出，后面的不影响前面的；记下要不要 mask。"""
        what = f"model_type {self._config.model_type!r} cannot be used here"
        device = self.head.weight.device
        length = min(PROBE_TOKENS, self.max_seq_len)
        ids = torch.arange(1, length + 1, device=device).repeat(2, 1) % self.vocab_size
        ids[1, -1] = (ids[1, -1] + 7) % self.vocab_size
        # dropout 之外，autocast 也要关掉：要比较的是权重自己的类型。
        with evaluating(self), torch.autocast(device.type, enabled=False), foreign(what):
            logits = self.model(input_ids=ids, use_cache=False).logits
            hidden = self(ids)
            self._pads_right = unmasked_right(self, ids, hidden)
        try:
            fitted = fit_head(
                self.head, hidden.flatten(0, 1), logits.flatten(0, 1), vars(self._config)
            )
        except DistillabError as error:
            raise DistillabError(f"{what}: {error}") from None
        before = hidden[:, :-1]
        if relative_error(before[1], before[0]) > tolerance(self.head.weight.dtype):
            raise DistillabError(
                f"{what}: a later token changes its earlier hidden states, "
                "expected a causal language model"
            )
        return fitted

    @property
    def head(self) -> Head:
        """词表投影；每次现取，因为词表可能被 ``resize_token_embeddings`` 换过。"""
        output: Any = self.model.get_output_embeddings()
        return Head(output.weight, getattr(output, "bias", None), self._scale, self._softcap)

    def new_cache(self) -> Any:
        """空的 ``transformers.DynamicCache``，完整注意力的层预留余地；不可信则是 ``None``。"""
        return self._empty_cache() if self._abilities.cached else None

    def static_cache(self, room: int) -> Any:
        """见 ``LanguageModel``；第一次用到时试出来。"""
        return None if self._why_not_static else self._static_cache(room)

    @property
    def pads_left(self) -> bool:
        """见 ``LanguageModel``；第一次用到时试出来。"""
        return self._abilities.pads_left

    @property
    def pads_right(self) -> bool:
        """见 ``LanguageModel``；装入时试出来：用到时权重可能已经分到各进程。"""
        return self._pads_right

    @cached_property
    def _abilities(self) -> Abilities:
        with evaluating(self):
            found = find_abilities(self, self._empty_cache)
        if not found.cached:
            logger.warning(
                f"model_type '{self._config.model_type}': generating without a cache, which is "
                f"slower: {found.why_uncached}"
            )
        return found

    @cached_property
    def _why_not_static(self) -> str:
        if not self._abilities.cached:
            return self._abilities.why_uncached
        with evaluating(self):
            why = static_error(self, self._static_cache, self._abilities.pads_left)
        if why:
            logger.info(
                f"model_type '{self._config.model_type}': sampling with a growing cache: {why}"
            )
        return why

    def _static_cache(self, room: int) -> Any:
        if self._cache_name in (None, "cache_params") or not self._takes_positions:
            raise ValueError("its forward takes no past_key_values or no position_ids")
        return static_cache(self.model.config, room)

    def _empty_cache(self) -> Any:
        if self._cache_name is None:
            raise ValueError("its forward takes no cache")
        return dynamic_cache(self.model.config)

    @property
    def eos_token_ids(self) -> frozenset[int]:  # type: ignore[override]
        """generation_config、配置与其中文字部分的 ``eos_token_id``。"""
        generation = getattr(self.model, "generation_config", None)
        return declared_eos(generation, self.model.config, self._config)

    @property
    def max_seq_len(self) -> int:
        """最长序列；配置里没有上限的模型（如 ALiBi）给出一个用不完的数。"""
        longest = int(getattr(self._config, "max_position_embeddings", None) or 0)
        return longest if longest > 0 else 2**31 - 1

    @property
    def block_names(self) -> list[str]:
        """各层的类名，只列模型里有的：多模态的配置也写着别处的层。"""
        present = {type(part).__name__ for part in self.model.modules()}
        return sorted(present & set(self.model._no_split_modules or ()))

    def enable_activation_checkpointing(self) -> None:
        """训练时不存每层的激活，反向时重算。"""
        options = {"use_reentrant": False}
        if hasattr(self.model, "activation_checkpointing_enable"):
            self.model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        else:  # transformers 5 的早期版本只有这个名字，后来的版本里它会告警
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
