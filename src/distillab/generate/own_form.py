"""GPU 上解码的一步几乎全是小内核：同样的模型、同样的数，换成内核更少的形式来算。"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..limits import MANY_STEPS
from ..models.decoder import Decoder
from ..models.interface import LanguageModel, PretrainedLM
from ..models.kv_cache import autocast_dtype
from ..models.lora import is_plain_float32
from ..models.own_blocks import SharedDecoder, beside, joined_copy

_FORMS: WeakKeyDictionary[PretrainedLM, tuple[Any, SharedDecoder | None]] = WeakKeyDictionary()
"""模型 → ``(参数与设备, 与它共用参数的)``；参数换过、搬走了就另做。"""


def own_form(model: LanguageModel) -> LanguageModel:
    """经本项目的层来算、与 ``model`` 共用参数的；没有就是它自己。装了 adapter 的、分片的没有。"""
    if not isinstance(model, PretrainedLM):
        return model
    weights = [(id(weight), weight.device) for weight in model.parameters()]
    known = _FORMS.get(model)
    if known is None or known[0] != weights:
        known = _FORMS[model] = weights, beside(model)
    return known[1] or model


def joined_form(model: LanguageModel, steps: int) -> LanguageModel:
    """Autocast 里至少走 ``MANY_STEPS`` 步时，并起读同样输入的线性层，它们是半精度的拷贝。

    Autocast 反正要各抄一份半精度的，所以不多占内存；同样的输入也只转一次。用于此刻的权重。
    """
    half = autocast_dtype(model.head.weight.device)
    if half is None or steps < MANY_STEPS or not isinstance(model, Decoder):
        return model
    linear = [part.weight for part in model.layers.modules() if isinstance(part, nn.Linear)]
    return joined_copy(model, half) if all(map(is_plain_float32, linear)) else model
