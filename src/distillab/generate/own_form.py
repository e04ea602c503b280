"""GPU 上解码的一步几乎全是小内核：能经本项目的层来算的 transformers 模型，就经它们来算。"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from ..models.interface import LanguageModel, PretrainedLM
from ..models.own_blocks import SharedDecoder, beside

_FORMS: WeakKeyDictionary[PretrainedLM, tuple[Any, SharedDecoder | None]] = WeakKeyDictionary()
"""模型 → ``(参数与设备, 与它共用参数的)``；参数换过、搬走了就另做。"""


def own_form(model: LanguageModel) -> LanguageModel:
    """与 ``model`` 共用参数、内核更少的；没有就是它自己。装了 adapter 的、分片的没有。"""
    if not isinstance(model, PretrainedLM):
        return model
    weights = [(id(weight), weight.device) for weight in model.parameters()]
    known = _FORMS.get(model)
    if known is None or known[0] != weights:
        known = _FORMS[model] = weights, beside(model)
    return known[1] or model
