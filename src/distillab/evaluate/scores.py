"""若干模型读同样的序列：每个 token 的得分，与由它们得出的、带区间的数字。

数字都来自逐个 token 的值：按序列求和，重抽序列，最后除一次。所以怎样分批不改变任何一个。
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..bars import track
from ..batch import Batch, View
from ..errors import DistillabError
from ..figures import AGREEMENT, Figure, exact, perplexity
from ..targets import HiddenTargets
from ..vocabulary import Vocabulary
from .agreement import Rows, score_rows
from .bootstrap import ratio_figure
from .sequences import Sequences
from .subjects import Subject

QUALITY = ("perplexity", "cross_entropy", "bits_per_byte")


@dataclass
class Scores:
    """一个模型在一份数据上的结果：``data`` 是它读的，tokenizer 不同的读同样的文字；``rows`` 的次序
    同 ``data.labels``；``seconds`` 是它的前向与算分用的时间。
    """

    data: Sequences
    rows: Rows
    seconds: float = 0.0

    @property
    def nats(self) -> NDArray[np.float64]:
        """每个序列的总 nat，``[S]``。"""
        return self.data.sums(self.rows["nats"])

    def quality(self, data: Sequences, seed: int) -> dict[str, Any]:
        """困惑度、交叉熵（nat/token）与每字节的比特数；字节从原来的 ``data`` 里数，``self.data`` 是
        别的 token 时前两项没有可比之处。
        """
        nats, bits = self.nats.tolist(), (self.nats / math.log(2)).tolist()
        tokens, found = data.tokens.tolist(), dict.fromkeys(QUALITY, exact(None))
        if self.data is data:
            found["perplexity"] = ratio_figure(nats, tokens, seed, transform=perplexity)
            found["cross_entropy"] = ratio_figure(nats, tokens, seed)
        if data.bytes.any():
            found["bits_per_byte"] = ratio_figure(bits, data.bytes.tolist(), seed)
        return {**found, "items_per_second": round(len(data) / self.seconds, 2)}

    def agreement(self, seed: int) -> dict[str, Figure]:
        """与教师的一致程度，每个 token 平均；见 ``AGREEMENT``。"""
        tokens = self.data.tokens.tolist()
        return {
            name: ratio_figure(self.data.sums(self.rows[name]).tolist(), tokens, seed)
            for name in AGREEMENT
        }


def score(
    data: Sequences, teacher: Subject | None, subjects: Sequence[Subject], batch_size: int
) -> dict[str, Scores]:
    """每个模型把 ``data`` 读一遍，都认得它的 token；教师的前向只做一次，也可以在 ``subjects`` 里。

    没有教师就只有 ``nats``。序列比某个模型的上限长，或显存不够时 ``DistillabError``。
    """
    for reader in subjects if teacher is None else (teacher, *subjects):
        longest, limit = data.longest(reader.side), reader.model.max_seq_len
        if longest > limit:
            raise DistillabError(
                f"{data.name}: a sequence has {longest} tokens, but {reader.label} reads at most "
                f"{limit}"
            )
    found = {subject.name: Scores(data, {}) for subject in subjects}
    for rows, batch in track(data.batches(batch_size), data.name, -(-len(data) // batch_size)):
        batch = batch.to(subjects[0].model.head.weight.device)
        try:
            started = time.perf_counter()
            target = None if teacher is None else _read(teacher, batch, data.vocabulary)
            teacher_seconds = time.perf_counter() - started
            for subject in subjects:
                scores = found[subject.name]
                started = time.perf_counter()
                if subject is teacher and target is not None:
                    scores.seconds += teacher_seconds
                    values = score_rows(target, batch.labels)
                else:
                    own = _read(subject, batch, data.vocabulary)
                    values = score_rows(own, batch.labels, target)
                scores.seconds += time.perf_counter() - started
                for name, value in values.items():
                    scores.rows.setdefault(name, np.empty(len(data.labels)))[rows] = value
        except torch.OutOfMemoryError as error:
            raise DistillabError(
                f"{data.name}: out of memory with {len(batch.student.input_ids)} sequences at "
                f"once: lower evaluate.batch_size={batch_size} in the run's recipe.yaml"
            ) from error
    return found


def _read(subject: Subject, batch: Batch, vocabulary: Vocabulary) -> HiddenTargets:
    view: View = getattr(batch, subject.side)
    with subject.active() as model:
        hidden = model.read(view)
        if hidden.is_cuda:
            torch.cuda.synchronize()  # 各个模型的用时才分得开
        return HiddenTargets(hidden, model.head.cut(vocabulary))
