"""教师分布从哪里来：本机上的模型，每步现算；可以是另一个模型，也可以是关掉 adapter 的学生。"""

from __future__ import annotations

import torch

from .batch import View
from .language_model import LanguageModel, evaluating
from .lora import adapters_off
from .targets import HiddenTargets


class LocalTeacher:
    """冻结的教师模型，只做前向，给出 response token 处的 hidden state。

    Args:
        model: 教师；会被设为 eval 并冻结全部参数。
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def targets(self, view: View, vocab_limit: int) -> HiddenTargets:
        """教师在 ``view`` 上的目标。

        教师以自己的 dtype 计算，不受学生的 autocast 影响。

        Args:
            view: 教师的视角，``P`` 个 response token。
            vocab_limit: 词表只看前若干个 token（两个 tokenizer 定义相同的部分）。

        Returns:
            ``HiddenTargets``，``hidden [P, H_t]``。
        """
        with torch.autocast(view.input_ids.device.type, enabled=False):
            hidden = self.model(view.input_ids, view.attention_mask, position_ids=view.position_ids)
            hidden = view.rows(hidden)
        return HiddenTargets(hidden, self.model.head.cut(vocab_limit))


class AdapterOffTeacher(LocalTeacher):
    """关掉 adapter 的学生：它就是自己的基座，不占第二份内存。

    只在取目标的那一刻切到 eval、关掉 adapter，之后（出错时也）还原；从不冻结任何参数。

    Args:
        model: 装了 LoRA 的学生，与训练的是同一个对象。
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    def targets(self, view: View, vocab_limit: int) -> HiddenTargets:
        """基座在 ``view`` 上的目标；见 ``LocalTeacher.targets``。"""
        with evaluating(self.model), adapters_off(self.model):
            return super().targets(view, vocab_limit)
