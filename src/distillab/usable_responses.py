"""教师写好的 response（``data.responses``）：每个任务有哪几条可以训练，其余的为什么略过。"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from .articles import read_records, text_files
from .errors import DistillabError, some
from .sources import fetch, parse_source, require_file


def usable_responses(source: str, keys: Collection[str]) -> tuple[dict[str, list[str]], list[str]]:
    """读出各个任务的 response；没有通过过滤的、没说完的、空白的都略过。

    Args:
        source: ``distillab synthesize`` 写的 jsonl，或别的每行有 ``id`` 与 ``response`` 的。
        keys: 全部任务的键，即 ``id``。

    Returns:
        ``(键 -> 它的各条 response, 说明)``：说明是英文的日志行，讲略过了什么。

    Raises:
        DistillabError: 没有这个文件，有一行不是 response，或一个任务也没有回答。
    """
    answered: dict[str, list[str]] = {}
    unknown: list[str] = []
    rejected = unfinished = blank = 0
    for where, row in _rows(source):
        key, response = str(row["id"]), row["response"]
        if not isinstance(response, str):
            raise DistillabError(
                f"{where}: expected text in response, found {type(response).__name__}"
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
            answered.setdefault(key, []).append(response)
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


def _rows(source: str) -> Iterable[tuple[str, Mapping[str, object]]]:
    if parse_source(source).kind == "path" and not Path(source).expanduser().exists():
        raise DistillabError(
            f"data.responses: {source!r} does not exist; write it with: distillab synthesize RECIPE"
        )
    path = fetch(source)
    if isinstance(path, str):
        raise DistillabError(f"data.responses: {source!r} is a hub id; expected a .jsonl file")
    for where, row in read_records(text_files(require_file(path, "a .jsonl file of responses"))):
        if not isinstance(row, Mapping) or not row.keys() >= {"id", "response"}:
            found = ", ".join(row) if isinstance(row, Mapping) else type(row).__name__
            raise DistillabError(f"{where}: expected id and response, found {found}")
        yield where, row
