"""教师写好的 response：逐行读出；每个任务有哪几条可以训练，其余的为什么略过。"""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..cache import expanded
from ..errors import DistillabError, some
from ..sources import fetch, parse_source, require_file
from .forms import Message

Row = dict[str, Any]


def read_rows(path: Path, keys: Collection[str] = ("id", "response")) -> list[Row]:
    """按先后读出全部整行，每行要有 ``keys``；留下与没留下的都在，写到一半的最后一行不算。"""
    if not path.is_file():
        raise DistillabError(f"{path}: no such file; write it with: distillab synthesize RECIPE")
    rows, end, _ = whole_rows(path, keys)
    with suppress(ValueError):  # 手写的文件，最后一行可以没有换行
        last = json.loads(path.read_bytes()[end:])
        if isinstance(last, dict) and last.keys() >= set(keys):
            rows.append(last)
    return rows


def whole_rows(path: Path, keys: Collection[str]) -> tuple[list[Row], int, int]:
    """``(整行, 最后一个整行的结尾, 文件长度)``，后两个以字节计。"""
    # 按字节切：str.splitlines 会把回答里的 U+2028 也当作换行。
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    rows = []
    for number, line in enumerate(content[:end].split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not row.keys() >= set(keys):
            raise DistillabError(
                f"{path} line {number} is not a response: expected a JSON object with "
                f"{', '.join(sorted(keys))}"
            )
        rows.append(row)
    return rows, end, len(content)


def usable_responses(
    source: str, keys: Collection[str]
) -> tuple[dict[str, list[str | Message]], list[str]]:
    """``(键 -> 它的各条 response, 英文的日志行)``：``keys`` 里各个任务的，没有通过过滤的、没说完
    的、空白的都略过。带着 ``reasoning`` 的是一条消息，其余是文字；一个任务也没有回答是错误。
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
        elif reasoning := row.get("reasoning"):
            turn = {"role": "assistant", "content": response, "reasoning_content": reasoning}
            answered.setdefault(key, []).append(turn)
        else:
            answered.setdefault(key, []).append(response)
    counts = {
        "rows that the filter rejected": rejected,
        "responses that were cut off while being generated": unfinished,
        "empty responses": blank,
        f"responses to unknown ids: {some(unknown)}": len(unknown),
    }
    left_out = [f"{count} {what}" for what, count in counts.items() if count]
    if not answered:
        reasons = "; ".join(left_out) or "it is empty"
        raise DistillabError(
            f"{source} answers none of the {len(keys)} tasks, such as {some(keys)}; found {reasons}"
        )
    if missing := [key for key in keys if key not in answered]:
        left_out.append(f"{len(missing)} tasks that it does not answer: {some(missing)}")
    return answered, [f"{source}: left out {what}" for what in left_out]


def _rows(source: str) -> list[Row]:
    path = fetch(source) if parse_source(source).kind != "path" else expanded(source)
    if isinstance(path, str):
        raise DistillabError(f"data.responses: {source!r} is a hub id; expected a .jsonl file")
    if not path.exists():
        raise DistillabError(
            f"data.responses: {source!r} does not exist; write it with: distillab synthesize RECIPE"
        )
    return read_rows(require_file(path, "a .jsonl file of responses"))
