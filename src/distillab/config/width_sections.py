"""配置里与学生的宽度有关的：``student.init`` 的四个键，与一次运行留下了哪些单元。

本模块不导入 torch。
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from ..errors import DistillabError
from .sections import Section

WIDTHS = ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads")
"""能裁的宽度；每个头的宽度不裁，RoPE 在其中成对旋转。"""


class WidthConfig(Section):
    """裁成多宽；没有写的与来源相同。"""

    hidden_size: int | None = Field(None, gt=0, description="Channels kept; default all.")
    intermediate_size: int | None = Field(
        None, gt=0, description="FFN neurons kept in each layer; default all."
    )
    num_heads: int | None = Field(
        None, gt=0, description="Query heads kept in each layer; default all."
    )
    num_kv_heads: int | None = Field(
        None, gt=0, description="Key/value heads kept in each layer; default all."
    )

    @property
    def given(self) -> list[str]:
        """写了的键。"""
        return [name for name in WIDTHS if getattr(self, name) is not None]

    @property
    def narrows(self) -> bool:
        """写了宽度。"""
        return bool(self.given)

    def widths(self, source: Any) -> dict[str, int]:
        """裁后的四个宽度；``source`` 有同名的四个属性，裁不成的是 ``DistillabError``。"""
        found = {name: getattr(self, name) or getattr(source, name) for name in WIDTHS}
        for name, width in found.items():
            whole = getattr(source, name)
            if width > whole:
                raise DistillabError(
                    f"student.init.{name}={width} is larger than the {whole} of its source; "
                    f"expected at most {whole}"
                )
        heads, kv_heads, hidden = (
            found[name] for name in ("num_heads", "num_kv_heads", "hidden_size")
        )
        if heads % kv_heads:
            fitting = [n for n in range(1, source.num_kv_heads + 1) if heads % n == 0]
            raise DistillabError(
                f"student.init: num_heads={heads} is not divisible by num_kv_heads={kv_heads}; "
                f"expected num_kv_heads to be one of {', '.join(map(str, fitting))}"
            )
        if hidden != source.hidden_size or heads != source.num_heads:
            _check_multiple(hidden, heads, source.hidden_size)
        return found

    @model_validator(mode="after")
    def _heads_divide(self) -> WidthConfig:
        if self.num_heads and self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}"
            )
        return self


def _check_multiple(hidden: int, heads: int, most: int) -> None:
    """Transformers 的 Llama 与 Gemma 只读得进 ``hidden_size`` 是头数的倍数的，虽然用不着。"""
    if hidden % heads:
        below = hidden // heads * heads
        near = [size for size in (below, below + heads) if 0 < size <= most]
        raise DistillabError(
            f"student.init: hidden_size={hidden} is not divisible by num_heads={heads}, and "
            f"transformers would not load that; expected {' or '.join(map(str, near))}"
        )


class KeptWidths(Section):
    """留下的单元在来源里的号，升序；``heads``、``kv_heads``、``neurons`` 每层一行。

    ``kv_heads[l][j]`` 是新的第 j 个键值头由原来的哪几个平均而来，通常就一个；``shares`` 是留下的占
    全部激活的几成。
    """

    channels: list[int]
    heads: list[list[int]] = Field(min_length=1)
    kv_heads: list[list[list[int]]] = Field(min_length=1)
    neurons: list[list[int]] = Field(min_length=1)
    shares: dict[str, float]

    @property
    def widths(self) -> dict[str, int]:
        """四个宽度。"""
        sizes = len(self.channels), len(self.neurons[0]), len(self.heads[0]), len(self.kv_heads[0])
        return dict(zip(WIDTHS, sizes, strict=True))
