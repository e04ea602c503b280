"""教师比学生多读到了什么，学生会不会也读到。"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Sequence

from .conversations import Conversation
from .forms import Message

SHORTEST_LEAK = 16
"""教师多读到的一行少于这么多字符时不算泄漏：一个数字、一个词也会碰巧出现在问题里。"""


def leaks(added: list[tuple[str, str]], student: Conversation) -> bool:
    """教师多读到的（角色与一行），是否有一半以上学生也读得到；引用 user 的话不算多读到的。"""
    question = squeezed([student.question])
    quoted = question in squeezed(line for _, line in added)
    asked = squeezed(turn["content"] for turn in student.prompt if turn["role"] == "user")
    known = {"tool": asked, "assistant": asked}
    lines = [line for role, line in added if line not in known.get(role, question * quoted)]
    text = squeezed(turn["content"] for turn in student.prompt)
    leaked = sum(len(line) for line in lines if len(line) >= SHORTEST_LEAK and line in text)
    return leaked > 0 and leaked >= sum(map(len, lines)) / 2


def added_lines(student: Sequence[Message], teacher: Sequence[Message]) -> list[tuple[str, str]]:
    """教师的 prompt 比学生的多了哪几行，连同说它的角色：先对上相同的消息（教师可以在中间多几轮），
    对不上的从最后一条起逐条对照，去掉首尾相同的部分。
    """
    ours, theirs = (
        [(turn["role"], squeezed([turn["content"]])) for turn in part]
        for part in (student, teacher)
    )
    lines: list[tuple[str, str]] = []
    matcher = difflib.SequenceMatcher(None, ours, theirs, autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            continue
        for our, their in itertools.zip_longest(reversed(student[a:b]), reversed(teacher[c:d])):
            if their is None:
                break
            same_role = our is not None and our["role"] == their["role"]
            new = _middle(our["content"] if same_role else "", their["content"])
            lines += [(their["role"], line) for line in new.splitlines()]
    found = [(role, squeezed([line])) for role, line in lines]
    return [(role, line) for role, line in found if line]


def _middle(before: str, after: str) -> str:
    shorter = min(len(before), len(after))
    start = next((i for i in range(shorter) if before[i] != after[i]), shorter)
    rest = range(shorter - start)
    end = next((i for i in rest if before[-1 - i] != after[-1 - i]), shorter - start)
    return after[start : len(after) - end]


def squeezed(texts: Iterable[str]) -> str:
    """换行与缩进不同的两段话是同一段话。"""
    return " ".join(" ".join(texts).split())
