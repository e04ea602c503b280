"""教师写好的 response（``data.responses``）：每个任务有哪几条可以训练，其余的为什么略过。"""

from __future__ import annotations

from collections.abc import Collection

from .cache import expanded
from .errors import DistillabError, some
from .forms import Message
from .responses import Row, read_rows
from .sources import fetch, parse_source, require_file


def usable_responses(
    source: str, keys: Collection[str]
) -> tuple[dict[str, list[str | Message]], list[str]]:
    """读出各个任务的 response；没有通过过滤的、没说完的、空白的都略过。

    Args:
        source: ``distillab synthesize`` 写的 jsonl，或别的每行有 ``id`` 与 ``response`` 的。
        keys: 全部任务的键，即 ``id``。

    Returns:
        ``(键 -> 它的各条 response, 说明)``：带着 ``reasoning`` 的 response 是一条消息，其余是文字；
        说明是英文的日志行，讲略过了什么。

    Raises:
        DistillabError: 没有这个文件，有一行不是 response，或一个任务也没有回答。
    """
    answered: dict[str, list[str | Message]] = {}
    unknown: list[str] = []
    rejected = unfinished = blank = 0
    for number, row in enumerate(_rows(source), start=1):
        key, response = str(row["id"]), row["response"]
        for name, text in (("response", response), ("reasoning", row.get("reasoning") or "")):
            if not isinstance(text, str):
                raise DistillabError(
                    f"{source} line {number}: expected text in {name}, found {type(text).__name__}"
                )
        if row.get("kept", True) is not True:
            rejected += 1
        elif row.get("finish_reason") == "length":
            unfinished += 1  # 模板会在没说完的话后面加上「说完了」
        elif not response.strip():
            blank += 1
        elif key not in keys:
            unknown.append(key)
        else:
            answered.setdefault(key, []).append(_message(row))
    left_out = [
        f"{count} {what}"
        for count, what in (
            (rejected, "rows that the filter rejected"),
            (unfinished, "responses that were cut off while being generated"),
            (blank, "empty responses"),
            (len(unknown), f"responses to unknown ids: {some(unknown)}"),
        )
        if count
    ]
    if not answered:
        reasons = "; ".join(left_out) or "it is empty"
        raise DistillabError(
            f"{source} answers none of the {len(keys)} tasks, such as {some(keys)}; found {reasons}"
        )
    if missing := [key for key in keys if key not in answered]:
        left_out.append(f"{len(missing)} tasks that it does not answer: {some(missing)}")
    return answered, [f"{source}: left out {what}" for what in left_out]


def _message(row: Row) -> str | Message:
    if not row.get("reasoning"):
        return str(row["response"])
    return {"role": "assistant", "content": row["response"], "reasoning_content": row["reasoning"]}


def _rows(source: str) -> list[Row]:
    path = fetch(source) if parse_source(source).kind != "path" else expanded(source)
    if isinstance(path, str):
        raise DistillabError(f"data.responses: {source!r} is a hub id; expected a .jsonl file")
    if not path.exists():
        raise DistillabError(
            f"data.responses: {source!r} does not exist; write it with: distillab synthesize RECIPE"
        )
    return read_rows(require_file(path, "a .jsonl file of responses"))
