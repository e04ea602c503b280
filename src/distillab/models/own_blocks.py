"""Qwen、Llama、Mistral、Gemma 结构的冻结教师经本项目的层来算：内核少，建 mask 时也不等设备。

权重是同一块内存，不复制。结构合不合适由配置（``hf_layout.py``）与权重的名字决定，装入时再与
transformers 的隐状态核对一次；不合适的仍由 transformers 来算，什么都不少。
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn

from ..config.model_sections import ModelConfig
from ..errors import DistillabError, reason
from .blocks import (
    GQAAttention,
    SwiGLUFFN,
    TransformerBlock,
    apply_rotary,
    rotation,
)
from .decoder import Decoder
from .head_fit import relative_error, tolerance
from .hf_layout import config_from_hf
from .hf_names import hf_name
from .interface import PROBE_TOKENS, LanguageModel, PretrainedLM, evaluating
from .rope import as_bits

logger = logging.getLogger("distillab")


class JoinedAttention(GQAAttention):
    """q、k、v 一次乘出、q 与 k 一起旋转的 ``plain``；它没有 q_norm 与 k_norm。"""

    def __init__(self, plain: GQAAttention, dtype: torch.dtype | None = None) -> None:
        nn.Module.__init__(self)
        self.head_dim, self.group_size = plain.head_dim, plain.group_size
        self.dropout, self.scale, self.softcap = plain.dropout, plain.scale, plain.softcap
        self.qkv_proj = _joined(plain.q_proj, plain.k_proj, plain.v_proj, dtype=dtype)
        self.o_proj = plain.o_proj
        self._kv_heads = plain.k_proj.out_features // plain.head_dim

    def heads(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """见 ``GQAAttention``。"""
        heads = self.qkv_proj(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        turned, value = heads[:, : -self._kv_heads], heads[:, -self._kv_heads :]
        turned = apply_rotary(turned, cos, sin)  # (B, nh + nkv, T, hd)
        return turned[:, : -self._kv_heads], turned[:, -self._kv_heads :], value


class JoinedFFN(SwiGLUFFN):
    """gate 与 up 一次乘出的 ``plain``。"""

    def __init__(self, plain: SwiGLUFFN, dtype: torch.dtype | None = None) -> None:
        nn.Module.__init__(self)
        self.gate_up_proj = _joined(plain.gate_proj, plain.up_proj, dtype=dtype)
        self.down_proj = plain.down_proj
        self.activation = plain.activation

    def forward(self, hidden: Tensor) -> Tensor:
        """见 ``SwiGLUFFN``。"""
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        output: Tensor = self.down_proj(self.activation(gate) * up)
        return output


def _joined(*parts: nn.Linear, dtype: torch.dtype | None) -> nn.Linear:
    """首尾相接的一个线性层；``parts`` 的参数随即放掉，内存仍只有一份。

    给了 ``dtype`` 则是那个类型的一份拷贝，``parts`` 不变。
    """
    whole = nn.Linear(
        parts[0].in_features,
        sum(part.out_features for part in parts),
        bias=parts[0].bias is not None,
        device="meta",
    )
    for name, _ in list(whole.named_parameters()):
        own = [getattr(part, name) for part in parts]
        data = torch.cat([parameter.data for parameter in own])
        setattr(whole, name, nn.Parameter(data.to(dtype or data.dtype), requires_grad=False))
        for parameter in own if dtype is None else ():
            parameter.data = parameter.data.new_empty(0)
    return whole


class SharedDecoder(Decoder):
    """一个 transformers 模型的权重，经本项目的层来算；只做前向，不训练也不存盘。

    ``rotary`` 是它的 RoPE 模块：频率就用它算好的。
    """

    def __init__(self, config: ModelConfig, rotary: nn.Module) -> None:
        with torch.device("meta"):
            super().__init__(config)
        self._factors = {}
        # Gemma 3 有两份，其中用不到的没有；别家只有一份，没有前缀。
        kinds = ("full_attention_", "sliding_attention_", "")
        found = [kind for kind in kinds if hasattr(rotary, f"{kind}inv_freq")]
        for local, kind in ((False, found[0]), (True, found[-1])):
            bits = as_bits(getattr(rotary, f"{kind}inv_freq"))
            self.register_buffer(f"_bits_{local}", bits, persistent=False)
            self._factors[local] = float(getattr(rotary, f"{kind}attention_scaling"))

    def join(self) -> SharedDecoder:
        """并起各层里读同样输入的线性层；有 q_norm 与 k_norm 的，q、k、v 并了也要拆开抄出来。"""
        for block in self.layers:
            assert isinstance(block, TransformerBlock)
            block.ffn = JoinedFFN(block.ffn)
            if block.attention.q_norm is None:
                block.attention = JoinedAttention(block.attention)
        return self

    def rotary(self, positions: Tensor, *, local: bool = False) -> tuple[Tensor, Tensor]:
        """``(cos, sin)``，权重的 dtype：与 transformers 的舍入次序一致。"""
        bits, factor = getattr(self, f"_bits_{local}"), self._factors[local]
        dtype = self.embedding.weight.dtype
        cos, sin = rotation(positions, bits.view(torch.float32))
        return (cos * factor).to(dtype), (sin * factor).to(dtype)


def joined_copy(decoder: Decoder, dtype: torch.dtype) -> Decoder:
    """``decoder``，读同样输入的线性层并起来，此刻的 ``dtype`` 拷贝；其余共用，都在 eval。"""
    form: Decoder = _shallow(decoder)
    form.layers = nn.ModuleList(map(_shallow, decoder.layers))
    for block in form.layers:
        assert isinstance(block, TransformerBlock)
        block.ffn = JoinedFFN(block.ffn, dtype)
        if block.attention.q_norm is None:
            block.attention = JoinedAttention(block.attention, dtype)
    return form.eval()


def _shallow(module: Any) -> Any:
    """另一个模块，子模块与参数是同样的；给它换子模块不影响 ``module``。"""
    result = copy.copy(module)  # 编译过的、录下的前向不会跟过来
    result._modules = dict(module._modules)
    return result


def through_own_blocks(model: PretrainedLM) -> LanguageModel:
    """合适就返回接过 ``model`` 的权重的 ``SharedDecoder``，``model`` 不能再用；不然原样返回。"""
    shared = beside(model)
    return model if shared is None else shared.join()


def beside(model: PretrainedLM) -> SharedDecoder | None:
    """与 ``model`` 共用参数的 ``SharedDecoder``，``model`` 照常用、照常训练；不合适是 ``None``。"""
    try:
        shared = _shared(model)
        why = _difference(shared, model)
        if not why:
            return shared
    except (
        DistillabError,
        LookupError,
        AttributeError,
        ValueError,
        RuntimeError,
    ) as error:  # 配置、权重、版本
        why = reason(error)
    logger.debug(f"{type(model.model).__name__} runs through transformers: {why}")
    return None


def _shared(model: PretrainedLM) -> SharedDecoder:
    """权重就是 ``model`` 的；设置不合适，或权重多一个、少一个、形状不同，都是错误。"""
    hf, head = model.model, model.head
    config = config_from_hf(hf.config)
    found = {
        "module": type(hf).__module__.partition(".")[0],
        "is_causal": getattr(hf.config, "is_causal", True),
        "quantizer": getattr(hf, "hf_quantizer", None),
        "head": (head.bias, head.scale, head.softcap),
    }
    own = ("transformers", True, None, (None, 1.0, config.logit_softcap))
    for (name, value), expected in zip(found.items(), own, strict=True):
        if value != expected:
            raise ValueError(f"{name} is {value}, not {expected}")
    state: dict[str, Tensor] = hf.state_dict(keep_vars=True)  # 参数本身：换类型、搬走都只有一份
    tied = hf.get_output_embeddings().weight is hf.get_input_embeddings().weight
    config = config.model_copy(update={"tie_embeddings": tied, "max_seq_len": model.max_seq_len})
    decoder = SharedDecoder(config, hf.base_model.rotary_emb)
    layers = range(config.num_layers)
    names = {name: hf_name(name, layers, config.post_norms) for name in decoder.state_dict()}
    unknown = state.keys() - set(names.values())
    if unknown:
        raise RuntimeError(f"unexpected {min(unknown)}")
    frozen = [each for each in model.parameters() if not each.requires_grad]
    try:
        decoder.load_state_dict({name: state[own] for name, own in names.items()}, assign=True)
    finally:  # assign 把它们都改成要梯度的
        for each in frozen:
            each.requires_grad_(False)
    decoder.eos_token_ids = model.eos_token_ids
    return decoder.eval()


@torch.no_grad()
def _difference(shared: SharedDecoder, model: PretrainedLM) -> str:
    """十几个 token 的隐状态与 transformers 的不同在哪里；相同是空串。"""
    weight = model.head.weight
    ids = torch.arange(1, min(PROBE_TOKENS, model.max_seq_len) + 1, device=weight.device)
    ids = ids[None] % model.vocab_size
    with evaluating(model), torch.autocast(weight.device.type, enabled=False):
        error = float(relative_error(shared(ids), model(ids)))
    return "" if error <= tolerance(weight.dtype) else f"hidden states differ by {error:.1e}"
