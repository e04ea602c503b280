"""教师要回答的问题、它的回答，以及由谁来回答的接口 ``Backend``。"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..data.pairs import Task
from ..errors import DistillabError

TOO_LONG = "prompt_too_long"
"""提示放不进教师的上下文时的 ``finish_reason``：记下来，不再问。"""


def check_tasks(tasks: Sequence[Task], compares: str | None) -> None:
    """提问之前查对：有任务，``id`` 各不相同，要与标准答案比较的（键是 ``compares``）都有答案。"""
    if not tasks:
        raise DistillabError("there is nothing to ask: the data has no tasks")
    twice, count = Counter(task.id for task in tasks).most_common(1)[0]
    if count > 1:
        raise DistillabError(f"the id {twice!r} names {count} tasks, expected one")
    without = [task.id for task in tasks if task.answer is None]
    if compares is not None and without:
        raise DistillabError(
            f"{compares} compares with the record's answer, but {len(without)} of "
            f"{len(tasks)} records have none, such as {without[0]!r}"
        )


@dataclass(frozen=True)
class Question:
    """一个任务的第 ``sample`` 个回答；``seed`` 只由总的种子、任务与 ``sample`` 决定。"""

    task: Task
    sample: int
    seed: int


@dataclass(frozen=True)
class Answer:
    """教师答了；``response`` 不含停止 token。"""

    question: Question
    response: str
    finish_reason: str  # stop 说完了；length 到上限被截断；TOO_LONG；或服务自己的说法
    model: str
    tokens: int | None = None  # 服务不说则为 None
    seed: int | None = None  # 没有用到则为 None
    error: str | None = None  # 为什么没有文字
    reasoning: str | None = None  # 服务另给的思考过程


@dataclass(frozen=True)
class Unanswered:
    """没有答成，不写进文件，下次再问。"""

    question: Question
    reason: str


Outcome = Answer | Unanswered
"""问一个问题的结果。"""


class Backend(Protocol):
    """由谁来回答。"""

    def describe(self) -> dict[str, Any]:
        """模型等写进来历的信息；不能含密钥。"""
        ...

    def answer(
        self, questions: Sequence[Question], stopped: Callable[[], bool]
    ) -> Generator[Sequence[Outcome], None, None]:
        """回答全部问题，次序不限；每给出一批，就会落盘一批。

        ``stopped`` 为真之后不再问新的，把手上已有的给出来就结束。没法继续是 ``DistillabError``，
        在此之前给出的都有效。
        """
        ...
