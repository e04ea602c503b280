"""``data``：一个来源，或按权重混在一起的几个（``mixture``），各有自己的格式、视角与采样。本模块不导入
torch。
"""

from __future__ import annotations

import re
from collections import Counter
from datetime import date
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from .sections import DataSection, FileName, SamplingConfig, Section
from .style import USUAL, Style


class MixtureSource(DataSection):
    """几个来源中的一个：``data`` 的其他各个键，还有名字、权重与采样。"""

    name: FileName = Field("", description="In metrics and the report; default: of the file.")
    weight: float = Field(1.0, gt=0, description="Share of a step's sequences, among the sources.")
    sampling: SamplingConfig | None = Field(
        None, description="Of this source's responses, on-policy; default: the recipe's."
    )

    @model_validator(mode="after")
    def _named(self) -> MixtureSource:
        if not self.name:
            path = PurePosixPath(self.source.replace("\\", "/"))
            stem = (
                path.stem if path.suffix in (".json", ".jsonl", ".parquet", ".txt") else path.name
            )
            self.name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-")
        return self


class Mixture(Section):
    """几个来源，每一步都按权重从各个来源取序列；一轮是第一个来源读完一遍。"""

    mixture: list[MixtureSource] = Field(
        description="Instead of source: several, each with the keys of data and a weight."
    )

    @model_validator(mode="before")
    @classmethod
    def _only_sources(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and (others := [key for key in raw if key != "mixture"]):
            raise ValueError(
                f"{others[0]} and mixture disagree: every source of the mixture has its own keys; "
                f"move {others[0]} into them"
            )
        if isinstance(raw, dict) and isinstance(raw["mixture"], list) and len(raw["mixture"]) < 2:
            raise ValueError("a mixture has at least 2 sources; one alone is data itself")
        return raw

    @model_validator(mode="after")
    def _different_names(self) -> Mixture:
        names = [source.name for source in self.mixture]
        if "" in names:
            raise ValueError(f"mixture.{names.index('')} has no name: give it one")
        name, count = Counter(names).most_common(1)[0]
        if count > 1:
            raise ValueError(f"{count} sources are named {name!r}: give each its own name")
        return self

    @property
    def sources(self) -> tuple[DataSection, ...]:
        """各个来源。"""
        return tuple(self.mixture)

    @property
    def chat(self) -> DataSection | None:
        """第一个对话的来源；全是文本的没有。"""
        return next((source for source in self.mixture if source.format == "chat"), None)

    @property
    def style(self) -> Style:
        """任务与样例怎样渲染：同第一个对话的来源。"""
        return USUAL if self.chat is None else self.chat.style


TAGS = ("data: one source", "data: a mixture")
"""pydantic 报错的位置里，这两种写法的名字。"""


def _kind(value: Any) -> str:
    several = "mixture" in value if isinstance(value, dict) else isinstance(value, Mixture)
    return TAGS[several]


Data = Annotated[
    Annotated[DataSection, Tag(TAGS[0])] | Annotated[Mixture, Tag(TAGS[1])], Discriminator(_kind)
]


def keyed(data: DataSection | Mixture) -> list[tuple[str, DataSection]]:
    """各个来源，连同它在配方里的键。"""
    if isinstance(data, DataSection):
        return [("data", data)]
    return [(f"data.mixture.{i}", source) for i, source in enumerate(data.mixture)]


def sampling_of(source: DataSection, default: SamplingConfig) -> SamplingConfig:
    """一个来源的 response 怎样采样；没有写的是配方的 ``default``。"""
    own = source.sampling if isinstance(source, MixtureSource) else None
    return own or default


def dated(data: DataSection | Mixture, day: date) -> DataSection | Mixture:
    """没有写日期的对话，模板写的都是 ``day``。"""
    if isinstance(data, Mixture):
        return data.model_copy(update={"mixture": [dated(source, day) for source in data.mixture]})
    undated = data.format == "chat" and data.today is None
    return data.model_copy(update={"today": day}) if undated else data
