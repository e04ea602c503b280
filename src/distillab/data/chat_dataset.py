"""对话数据集：配对、渲染、截断、拆分，全部算清楚之后才开始训练。"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from array import array
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from ..bars import track
from ..batch import Example, Tokens
from ..config.sections import DataSection
from ..config.style import Style
from ..errors import DistillabError, located
from .chat import control_token
from .conversations import Conversation
from .pairs import Pair
from .sides import response_segments
from .template import render_conversations_ahead
from .truncate import Fitted, fit

_TOGETHER = 64
"""一起渲染的对话数。"""
TOO_LONG = "too long for data.max_seq_len={}: no room for a response"


@dataclass
class DataReport:
    """数据从读入到能训练，每一步去掉了什么，以条计；``tokens`` 以下是学生视角的 token 数。
    ``duplicates`` 与前面某一条的两个视角都相同，仍然留着；``control_tokens`` 只数每条的第一个。
    """

    read: int = 0
    train: int = 0
    validation: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    control_tokens: Counter[str] = field(default_factory=Counter)
    kept_control_tokens: bool = False
    truncated_prompts: int = 0
    truncated_responses: int = 0
    tokens: int = 0
    response_tokens: int = 0
    longest: int = 0
    longest_teacher: int = 0

    @property
    def kept(self) -> int:
        """留下的条数。"""
        return self.train + self.validation

    def lines(self) -> list[str]:
        """给日志的几行英文；没有发生的事不提。"""
        lines = [
            f"{self.read:,} conversations: {self.train:,} for training, "
            f"{self.validation:,} for validation"
        ]
        lines += [f"dropped {count:,}: {reason}" for reason, count in self.dropped.items()]
        counted = {
            "prompts were cut to fit data.max_seq_len": self.truncated_prompts,
            "responses were cut to fit data.max_seq_len": self.truncated_responses,
            "conversations repeat an earlier one": self.duplicates,
        }
        lines += [f"{count:,} {what}" for what, count in counted.items() if count]
        if self.control_tokens:
            lines.append(
                f"{self.control_tokens.total():,} conversations hold control tokens such as "
                f"{self.control_tokens.most_common(1)[0][0]!r} in what is said; they are "
                f"{'kept as control tokens' if self.kept_control_tokens else 'encoded as text'} "
                f"(data.control_tokens)"
            )
        teacher = ""
        if self.longest_teacher != self.longest:
            teacher = f", at most {self.longest_teacher:,} with what only the teacher reads"
        mean, share = self.tokens / max(self.kept, 1), self.response_tokens / max(self.tokens, 1)
        lines.append(
            f"{mean:,.0f} tokens on average, at most {self.longest:,}{teacher}; {share:.0%} of "
            f"them in responses"
        )
        return lines


class ChatDataset(Dataset[Example]):
    """每项是一个 ``Example``，每个视角最多 ``max_seq_len`` 个 token；分词一次，留在内存里。

    ``num_tokens`` 是训练的（response）token 数；``lengths`` 是每条两个视角一共要算多少 token，供按
    长度分批；``fingerprint``：有一个 token 不同，或 ``name``（``train`` 或 ``validation``）不同，就
    不同。
    """

    def __init__(self, examples: Iterable[Example], *, max_seq_len: int, name: str = "") -> None:
        self.max_seq_len = max_seq_len
        self.num_tokens = 0
        self.lengths: list[int] = []
        # 每个 token 4 字节；Python 的 list 要 36 字节。
        self._views: list[tuple[tuple[array[int], array[int]], ...]] = []
        self._across = False
        digest = hashlib.sha256(str(max_seq_len).encode())
        for example in examples:
            self._across |= example.segments is not None
            views = example.views
            packed = tuple((array("i", view.ids), array("i", view.response)) for view in views)
            self._views.append(packed)
            self.num_tokens += len(example.student.response)
            self.lengths.append(sum(len(view.ids) for view in views))
            for part in (part for view in packed for part in view):
                digest.update(len(part).to_bytes(8, "little") + part.tobytes())
        self.fingerprint = f"{digest.hexdigest()[:16]}-{name}"

    @property
    def view_lengths(self) -> list[tuple[int, int]]:
        """每条 ``(学生, 教师)`` 两个视角各多长，单位 token。"""
        return [(len(views[0][0]), len(views[-1][0])) for views in self._views]

    def unstopped(self, stops: Container[int]) -> int:
        """有几条的 response 不以 ``stops`` 里的 token 结尾；只有 prompt 的不算。"""
        return sum(
            bool(response) and ids[response[-1]] not in stops for (ids, response), *_ in self._views
        )

    @classmethod
    def build(
        cls,
        pairs: list[Pair],
        data: DataSection,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_seq_len: int,
        seed: int = 0,
        only_prompts: bool = False,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> tuple[ChatDataset, ChatDataset, DataReport]:
        """渲染、截断，切成 ``(训练集, 验证集, 报告)``；prompt 相同的对话总在同一边。

        ``only_prompts``：训练集只要 prompt，response 全由学生采样，数据里的不能占掉 prompt 的位置。
        ``teacher_tokenizer``：教师的分词器不同时，它的视角由它自己的模板渲染，各自截断。
        渲染不出，或剩下的不同 prompt 不足两个，是 ``DistillabError``。
        """
        report = DataReport(read=len(pairs), kept_control_tokens=data.control_tokens == "keep")
        kept: list[tuple[str, Example, Example]] = []
        seen: set[str] = set()
        shown = track(pairs, "tokenising", len(pairs), at_least=2000)

        def fitted(pair: Pair, only_prompts: bool) -> Fitted | None:
            style = _style(pair, data)

            def read(sides: Iterable[Conversation], own: PreTrainedTokenizerBase) -> Fitted | None:
                views = [side.prompt if only_prompts else side.messages for side in sides]
                return fit(views, own, max_seq_len, style, loss_on=data.loss_on)

            with located(pair.student.where):
                if teacher_tokenizer is None:
                    return read(pair.sides, tokenizer)
                student = read([pair.student], tokenizer)
                teacher = read([pair.teacher], teacher_tokenizer)
            if student is None or teacher is None:
                return None
            return Fitted(
                student.views + teacher.views,
                student.prompt_cut or teacher.prompt_cut,
                student.response_cut or teacher.response_cut,
            )

        def example_of(found: Fitted) -> Example:
            student, teacher = found.views[0], found.views[-1]
            if teacher_tokenizer is None:
                return Example(student, teacher)
            return Example(student, teacher, response_segments(student, teacher))

        for pair in _rendered_ahead(shown, tokenizer, teacher_tokenizer, data):
            whole = fitted(pair, only_prompts=False)
            if whole is None:
                report.dropped[TOO_LONG.format(max_seq_len)] += 1
                continue
            views = whole.views
            example = example_of(whole)
            trained = example
            if only_prompts:
                prompts = fitted(pair, only_prompts=True)
                assert prompts is not None  # 放得下 response，就放得下 prompt
                trained = example_of(prompts)
            kept.append((_identity(pair.student.prompt), trained, example))
            identity = _identity([pair.student.messages, pair.teacher.messages])
            report.duplicates += identity in seen
            seen.add(identity)
            style = _style(pair, data)
            found = (control_token(side.messages, tokenizer, style) for side in pair.sides)
            report.control_tokens.update(itertools.islice(filter(None, found), 1))
            report.truncated_prompts += whole.prompt_cut
            report.truncated_responses += whole.response_cut
            report.tokens += len(views[0].ids)
            report.response_tokens += len(views[0].response)
            report.longest = max(report.longest, len(views[0].ids))
            report.longest_teacher = max(report.longest_teacher, len(views[-1].ids))
        held_out = _held_out({prompt for prompt, *_ in kept}, data, seed, report)
        train = [trained for prompt, trained, _ in kept if prompt not in held_out]
        validation = [example for prompt, _, example in kept if prompt in held_out]
        report.train, report.validation = len(train), len(validation)
        return (
            cls(train, max_seq_len=max_seq_len, name="train"),
            cls(validation, max_seq_len=max_seq_len, name="validation"),
            report,
        )

    def __len__(self) -> int:
        return len(self._views)

    def __getitem__(self, index: int) -> Example:
        views = [Tokens(ids.tolist(), response.tolist()) for ids, response in self._views[index]]
        segments = response_segments(views[0], views[-1]) if self._across else None
        return Example(views[0], views[-1], segments)


class LengthGroupedSampler(Sampler[int]):
    """随机的顺序，但每 ``window`` 条一组的长度（``lengths``）相近，组内由短到长，padding 才少。

    一组是一个 optimizer 步的全部数据，所以一步怎样切成 micro-batch、分给几个进程，数据都相同。每轮
    剩下的不足一组，这一轮不训练，剩下谁是随机的；总共不足一组时，全部算一组。顺序只由 ``seed`` 与轮
    次决定，恢复训练时跳过前几批就回到原处。
    """

    _GROUPS_SORTED_TOGETHER = 50

    def __init__(self, lengths: Sequence[int], window: int, seed: int = 0) -> None:
        self.lengths = lengths
        self.window = max(1, min(window, len(lengths)))
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """换到另一轮的顺序；Accelerate 的 DataLoader 会调用它。"""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) // self.window * self.window

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        size, full = self.window, len(order) // self.window
        # 小数据集也至少分成四段，否则每一轮都是同样的几条在一起。
        together = size * max(1, min(self._GROUPS_SORTED_TOGETHER, math.ceil(full / 4)))
        groups: list[list[int]] = []
        for start in range(0, full * size, together):
            part = order[start : min(start + together, full * size)]
            part.sort(key=self.lengths.__getitem__)
            groups += [part[i : i + size] for i in range(0, len(part), size)]
        for position in torch.randperm(len(groups), generator=generator).tolist():
            yield from groups[position]


def _style(pair: Pair, data: DataSection) -> Style:
    return data.style.with_tools(pair.student.tools)


def _rendered_ahead(
    pairs: Iterable[Pair],
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    data: DataSection,
) -> Iterator[Pair]:
    pairs = iter(pairs)
    while group := list(itertools.islice(pairs, _TOGETHER)):
        views = {tokenizer: [(one, pair) for pair in group for one in pair.sides]}
        if teacher_tokenizer is not None:
            views = {
                tokenizer: [(pair.student, pair) for pair in group],
                teacher_tokenizer: [(pair.teacher, pair) for pair in group],
            }
        for own, read in views.items():
            sides = ((one.messages, _style(pair, data)) for one, pair in read)
            render_conversations_ahead(sides, own, data.loss_on)
        yield from group


def _identity(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _held_out(prompts: set[str], data: DataSection, seed: int, report: DataReport) -> set[str]:
    """哪些 prompt 进验证集：由内容与种子决定，与文件里的先后无关。"""
    if len(prompts) < 2:
        reasons = "; ".join(f"dropped {n}: {reason}" for reason, n in report.dropped.items())
        raise DistillabError(
            f"{data.source} leaves {len(prompts)} different prompts; expected at least 2, one for "
            f"training and one for validation" + (f" ({reasons})" if reasons else "")
        )
    ranked = sorted(prompts, key=lambda prompt: _identity([seed, prompt]))
    count = round(len(ranked) * data.validation_fraction)
    return set(ranked[: min(max(1, count), len(ranked) - 1)])
