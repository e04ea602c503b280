"""成对的数据：学生读没有经验的 prompt，教师读有经验的，两边是同一个 response。

经验有两种来法：另一个文件里同样的任务（``data.teacher_source``），或者一段文字拼进教师的 system
或最后一条 user 消息（``data.experience``）。对不上的地方一次查清、一起报告，而不是每次只说一处。
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..cache import expanded
from ..config.sections import DataSection, Experience
from ..errors import DistillabError, shown, some
from ..sources import SHIPPED, fetch, require_file
from .conversations import Conversation, read_conversations
from .forms import Message
from .leaks import added_lines, leaks, squeezed
from .responses import usable_responses


@dataclass(frozen=True)
class Task:
    """一个任务。"""

    id: str  # 在全部任务里唯一
    messages: list[dict[str, Any]]  # 教师读到的，经验已在其中，不含回答
    answer: str | None  # 标准答案
    record: dict[str, Any]  # 原始记录，交给使用者的过滤函数
    tools: list[dict[str, Any]] | None = None  # 教师可以调用的工具


@dataclass(frozen=True)
class Pair:
    """一段对话的两个视角。"""

    student: Conversation  # 没有经验的
    teacher: Conversation  # 有经验的，response 与学生的相同；没有特权信息时就是 student

    @property
    def key(self) -> str:
        """这个任务的键，``responses`` 文件里的 ``id``。"""
        return self.student.key

    @property
    def sides(self) -> tuple[Conversation, ...]:
        """学生的；教师的不同时还有教师的。"""
        return (self.student,) if self.teacher is self.student else (self.student, self.teacher)

    def task(self, view: Literal["student", "teacher"]) -> Task:
        """从一个视角提的问题。"""
        conversation: Conversation = getattr(self, view)
        return Task(
            self.key,
            conversation.prompt,
            self.student.answer,
            self.student.record,
            conversation.tools,
        )

    def answered(self, response: str | Message) -> Pair:
        """换一个 response，两个视角一起换。"""
        sides = [side.answered(response) for side in self.sides]
        return Pair(sides[0], sides[-1])


def load_pairs(data: DataSection, *, need_response: bool = True) -> tuple[list[Pair], list[str]]:
    """按配方的 ``data`` 读出全部对话，配好两个视角，查对它们：``(各对, 英文的日志行)``。

    ``need_response``：每段都要有 response，合成（先把 ``data.responses`` 设为 ``None``）与
    on-policy 只要 prompt。来源读不了，或两个视角对不上，是 ``DistillabError``。
    """
    found = _Findings()
    alone = data.teacher_source is None and data.responses is None
    students = _read(data, data.source, data.sha256, need_response and alone)
    students = _within(students, data.size_mb, found)
    if unanswered := sum(conversation.unanswered for conversation in students):
        found.notes.append(f"{data.source}: cut {unanswered} final questions that have no answer")
    found.note_unread(data.source, students)
    if data.teacher_source is not None:
        teachers = list(_read(data, data.teacher_source, None, False))
        found.note_unread(data.teacher_source, teachers)
        pairs = _merged(students, teachers, data, found)
    else:
        pairs = _with_experience(students, data, found)
    if data.responses is not None:
        pairs = _with_responses(pairs, data.responses, found)
    for pair in pairs:
        if need_response and pair.student.response is None:
            found.problem("no response in either file", pair.student)
    found.raise_any(" and ".join(filter(None, (data.source, data.teacher_source))))
    return pairs, found.notes


def with_experience(conversations: list[Conversation], config: Experience) -> list[Pair]:
    """给教师的视角拼上 ``config.experience``；没有经验则两个视角相同，学生已读到它的报错。"""
    found = _Findings()
    pairs = _with_experience(conversations, config, found)
    found.raise_any("experience")
    return pairs


def read_experience(text: str) -> str:
    """配方里的 ``data.experience``：一段文字，或一个文本文件的路径；去掉首尾的空白。没有空白、以
    ``.txt`` / ``.md`` 结尾或以 ``.``、``/``、``~`` 开头的是路径，已存在的文件与 ``shipped:`` 也是。
    """
    content = text
    if re.fullmatch(r"[./~]\S*|\S+\.(txt|md)", text) or _is_file(text):
        path = Path(fetch(text)) if text.startswith(SHIPPED) else expanded(text)
        if not path.exists():
            raise DistillabError(f"data.experience: {text!r} does not exist; expected a text file")
        try:
            content = require_file(path, "a text file").read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DistillabError(
                f"data.experience: {text!r} is not UTF-8 text ({error.reason})"
            ) from error
    if not content.strip():
        raise DistillabError(f"data.experience: {text!r} is empty; expected what the teacher reads")
    return content.strip()


def _is_file(text: str) -> bool:
    try:
        return "\n" not in text and Path(text).is_file()
    except (OSError, ValueError):  # 太长，或有不能出现在路径里的字符
        return False


def _read(
    data: DataSection, source: str, sha256: str | None, need_response: bool
) -> Iterable[Conversation]:
    return read_conversations(
        source,
        subset=data.subset,
        split=data.split,
        sha256=sha256,
        text_field=data.text_field,
        need_response=need_response,
    )


def _within(
    conversations: Iterable[Conversation], size_mb: float | None, found: _Findings
) -> list[Conversation]:
    """最前面的若干段，正文合计不超过 ``size_mb``。"""
    taken: list[Conversation] = []
    total = 0
    for conversation in conversations:
        total += sum(len(message["content"].encode()) for message in conversation.messages)
        if size_mb is not None and total > size_mb * 1e6:
            found.notes.append(
                f"stopped reading after {len(taken)} conversations: size_mb={size_mb:g}"
            )
            break
        taken.append(conversation)
    return taken


# ---------------------------------------------------------------------- 两个文件


def _merged(
    students: list[Conversation],
    teachers: list[Conversation],
    data: DataSection,
    found: _Findings,
) -> list[Pair]:
    by_id = _all_have_ids(students) and _all_have_ids(teachers)
    name = "id" if by_id else "last question"
    left, right = (_unique(part, by_id, name, found) for part in (students, teachers))
    common = [key for key in left if key in right]
    if not common:
        raise DistillabError(
            f"{data.source} and {data.teacher_source} share no {name}: found {some(left)} in the "
            f"first and {some(right)} in the second"
        )
    found.notes.append(f"paired {len(common)} tasks by their {name}")
    for source, only in (
        (data.source, [key for key in left if key not in right]),
        (data.teacher_source, [key for key in right if key not in left]),
    ):
        if only:
            found.notes.append(
                f"left out {len(only)} tasks that are only in {source}: {some(only)}"
            )
    pairs = [Pair(left[key], right[key]) for key in common]
    for pair in pairs:
        _check_pair(pair, data.loss_on, found)
    finals = ((pair.student.final, pair.teacher.final) for pair in pairs)
    if replaced := sum(bool(a and b and _said(a) != _said(b)) for a, b in finals):
        found.notes.append(
            f"{replaced} responses differ between the two files; used those of "
            f"{data.teacher_source}, which were written with experience"
        )
    return [_one_response(pair) for pair in pairs]


def _all_have_ids(conversations: list[Conversation]) -> bool:
    """全有或全无才能用；一部分有 ``id`` 时，没有的那些不知该怎样配。"""
    without = [conversation for conversation in conversations if conversation.id is None]
    if without and len(without) < len(conversations):
        raise DistillabError(
            f"{without[0].where}: {len(without)} of {len(conversations)} conversations have no id; "
            f"give all of them one, or none"
        )
    return not without


def _unique(
    conversations: list[Conversation], by_id: bool, name: str, found: _Findings
) -> dict[str, Conversation]:
    unique: dict[str, Conversation] = {}
    for conversation in conversations:
        key = conversation.key if by_id else conversation.question.strip()
        if unique.setdefault(key, conversation) is not conversation:
            found.problem(f"duplicate {name}", conversation)
    return unique


def _check_pair(pair: Pair, loss_on: str, found: _Findings) -> None:
    student, teacher = pair.student, pair.teacher
    if student.question.strip() not in teacher.question:
        found.problem("the last user messages differ", student)
        return
    if student.tools != teacher.tools:
        found.problem("the tools of the two files differ", student)
    if loss_on == "all" and _assistant_turns(student) != _assistant_turns(teacher):
        found.problem("earlier assistant turns differ (set data.loss_on to last)", student)
    added = added_lines(student.prompt, teacher.prompt)
    if not added:
        found.problem("the teacher's prompt holds nothing that the student's lacks", teacher)
    if leaks(added, student):
        found.problem("the student's prompt holds the experience", student)


def _assistant_turns(conversation: Conversation) -> list[tuple[str, str, bool]]:
    """最后一轮之前的 assistant 轮：说了什么、想了什么、训练不训练。"""
    turns = [turn for turn in conversation.messages if turn["role"] == "assistant"]
    return [(*_said(t), t.get("train", True)) for t in turns if t is not conversation.final]


def _said(turn: Message) -> tuple[str, str]:
    return turn["content"].strip(), turn.get("reasoning_content", "").strip()


def _one_response(pair: Pair) -> Pair:
    """有经验时写下的 response 优先。"""
    student, teacher = pair.student, pair.teacher
    if student.answer is None:
        pair = Pair(replace(student, answer=teacher.answer), teacher)
    response = student.final if teacher.final is None else teacher.final
    return pair if response is None else pair.answered(response)


# ---------------------------------------------------------------------- 一段经验


def _with_experience(
    students: list[Conversation], data: Experience, found: _Findings
) -> list[Pair]:
    if data.experience is None:
        return [Pair(student, student) for student in students]
    experience = read_experience(data.experience)
    text = squeezed([experience])
    pairs = []
    for student in students:
        if text in squeezed(message["content"] for message in student.prompt):
            found.problem("the student's prompt holds the experience", student)
        messages = _joined(student.messages, experience, data)
        pairs.append(Pair(student, replace(student, messages=messages)))
    return pairs


def _joined(messages: list[Message], experience: str, data: Experience) -> list[Message]:
    if data.experience_role == "system":
        at = 0
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": ""}, *messages]
    else:
        at = max(i for i, message in enumerate(messages) if message["role"] == "user")
    values = {"{experience}": experience, "{message}": messages[at]["content"]}
    # 一次替换完：经验里若有字面上的 "{message}"，它只是文字。
    marks = re.compile(r"\{experience\}|\{message\}")
    content = marks.sub(lambda found: values[found[0]], data.experience_template)
    return [*messages[:at], {**messages[at], "content": content.strip()}, *messages[at + 1 :]]


# ---------------------------------------------------------------------- 教师写好的 response


def _with_responses(pairs: list[Pair], source: str, found: _Findings) -> list[Pair]:
    """每个键有几行就有几条；没有一行的任务不训练，它们的回答没有通过过滤。"""
    by_key: dict[str, Pair] = {}
    for pair in pairs:
        if pair.key in by_key:
            what = "duplicate id or question, so responses cannot be told apart"
            found.problem(what, pair.student)
        by_key[pair.key] = pair
    responses, left_out = usable_responses(source, by_key)
    found.notes += left_out
    return [pair.answered(text) for key, pair in by_key.items() for text in responses.get(key, [])]


# ---------------------------------------------------------------------- 报告


class _Findings:
    """说明，与致命的问题：后者最后一起报，数目与最多三个例子。"""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._problems: dict[str, list[str]] = {}

    def note_unread(self, source: str, conversations: list[Conversation]) -> None:
        """没有读的键：以为它们有用的人看得见。"""
        if keys := sorted(set().union(*(conversation.unread for conversation in conversations))):
            self.notes.append(
                f"{source}: keys that are not part of the conversation: {', '.join(keys)}"
            )

    def problem(self, what: str, conversation: Conversation) -> None:
        name = conversation.id or conversation.question
        self._problems.setdefault(what, []).append(f"{shown(name)} at {conversation.where}")

    def raise_any(self, where: str) -> None:
        if self._problems:
            parts = (
                f"{what} ({len(tasks)}: {', '.join(tasks[:3])}{', ...' * (len(tasks) > 3)})"
                for what, tasks in self._problems.items()
            )
            raise DistillabError(f"{where}: {'; '.join(parts)}")
