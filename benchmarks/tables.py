"""把 ``results/*.json`` 里的记录印成 Markdown 表，贴进 ``README.md``。

python benchmarks/tables.py benchmarks/results/loss_head-cpu.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from markdown_table import markdown_table

Record = dict[str, Any]
Column = tuple[str, Callable[[Record], str]]


def number(key: str, form: str, scale: float = 1.0) -> Callable[[Record], str]:
    """一列数；没有测的印 ``-``。"""

    def text(record: Record) -> str:
        value = record.get(key)
        return "-" if value is None else format(value / scale, form)

    return text


LOSS_HEAD: list[Column] = [
    ("implementation", lambda record: record["implementation"]),
    ("seconds", number("seconds", ".2f")),
    ("/ floor", number("ratio_to_floor", ".2f")),
    ("/ distillab", number("ratio_to_distillab", ".2f")),
    ("extra GiB", number("extra_bytes", ".2f", 2**30)),
    ("gradient error", number("gradient_error", ".1e")),
    ("value error", number("value_error", ".1e")),
]
TRAIN_STEP: list[Column] = [
    ("implementation", lambda record: record["implementation"]),
    ("seconds", number("seconds", ".2f")),
    ("tokens/s", number("tokens_per_second", ".0f")),
    ("peak GiB", number("peak_bytes", ".2f", 2**30)),
    ("step's extra GiB", number("extra_bytes", ".2f", 2**30)),
]
SAMPLING: list[Column] = [
    ("case", lambda record: record["case"]),
    ("implementation", lambda record: record["implementation"]),
    ("tokens/s", number("tokens_per_second", ".1f")),
    ("seconds", number("seconds", ".2f")),
    ("tokens", number("tokens", ".0f")),
]
EVALUATION: list[Column] = [
    ("case", lambda record: record["case"]),
    ("implementation", lambda record: record["implementation"]),
    ("items/s", number("items_per_second", ".2f")),
    ("seconds", number("seconds", ".2f")),
    ("items", number("items", ".0f")),
    ("same answers", number("same_answers", ".0f")),
    ("/ plain loop", number("ratio_to_loop", ".2f")),
]
ENGINES: list[Column] = [
    ("engine", lambda record: record["engine"]),
    ("method", lambda record: record["method"]),
    ("loss", number("loss", ".1e")),
    ("gradient norm", number("grad_norm", ".1e")),
    ("exported weights", number("weights", ".1e")),
    ("key biases", number("key_biases", ".1e")),
]


GPU: list[Column] = [
    ("", lambda record: record["implementation"]),
    ("measured", lambda record: record["result"]),
]
PLAN: list[Column] = [
    ("case", lambda record: record["planned"]),
    ("recipe", lambda record: f"`{record['recipe']}`"),
    ("planned GiB", number("planned_bytes", ".2f", 2**30)),
    ("measured GiB", number("peak_bytes", ".2f", 2**30)),
    ("planned / measured", number("ratio", ".2f")),
    ("peak in", lambda record: record["moment"]),
]
SCALING: list[Column] = [
    ("axis", lambda record: record["axis"]),
    ("sizes", lambda record: ", ".join(f"{size:,}" for size in record["sizes"])),
    ("seconds", lambda record: ", ".join(f"{value:.2f}" for value in record["seconds"])),
    ("time exponent", number("time_exponent", ".2f")),
    ("extra MiB", lambda record: ", ".join(f"{x / 2**20:,.0f}" for x in record["extra_bytes"])),
    ("memory exponent", number("memory_exponent", ".2f")),
]
SHAPES: list[Column] = [
    ("shape", lambda record: record["implementation"]),
    ("student", lambda record: ", ".join(f"{k} {v}" for k, v in record["shape"].items())),
    ("parameters", number("parameters", ".1f", 1e6)),
    ("perplexity before", number("before", ",.0f")),
    ("after", number("after", ".1f")),
    ("KL", number("kl", ".3f")),
    ("same top-1", number("top1", ".1%")),
]
PACKING: list[Column] = [
    ("model", lambda record: record["model"]),
    ("rows", lambda record: record["implementation"]),
    ("tokens/s", number("conversation_tokens_per_second", ".0f")),
    ("seconds", number("seconds", ".2f")),
    ("student's padding", number("student_padding", ".1%")),
    ("teacher's padding", number("teacher_padding", ".1%")),
]


def title(record: Record) -> str:
    """一格的标题。"""
    if "section" in record:
        about = f"{record['section']}, {record['device_name']}, torch {record['versions']['torch']}"
        return f"{about}: {record['case']}" if record["case"] else about
    if "engine" in record:
        return f"{record['processes']} processes against one"
    if "planned" in record:
        return f"peak of a step beyond the libraries, {record['device']}"
    if "axis" in record:
        return f"growth, medians of {record['scaling_rounds']} rounds"
    if "student_padding" in record:
        return (
            f"{record['conversations']} conversations, rows of {record['max_seq_len']}, "
            f"{record['experience']} tokens of experience"
        )
    if "shape_steps" in record:
        return f"shapes, {record['shape_steps']} steps, seed {record['seed']}"
    if "items" in record:
        return f"tasks, {record['dtype']}"
    if "rounds" in record:
        return f"sampling, {record['dtype']}"
    if "case" in record:
        return (
            f"case {record['case']}, {record['batch_size']} x {record['seq_len']} tokens, "
            f"{record['precision']}"
        )
    near = ", rows that nearly agree" if record["near"] else ""
    return f"{record['dtype']}, {record['objective']}, {record['rows']:,} rows{near}"


def markdown(records: Iterable[Record], columns: list[Column]) -> str:
    """一张表，一条记录一行。"""
    rows = [[text(record) for _, text in columns] for record in records]
    return markdown_table([name for name, _ in columns], rows)


def main(paths: list[str]) -> None:
    """按格分组，逐格印出。"""
    for path in paths:
        records = json.loads(Path(path).read_text())
        records.sort(key=title)  # 稳定：同一格之内保持测量时的顺序
        for name, group in groupby(records, key=title):
            cell = list(group)
            columns = TRAIN_STEP if "case" in cell[0] else LOSS_HEAD
            columns = SAMPLING if "rounds" in cell[0] else columns
            columns = EVALUATION if "items" in cell[0] else columns
            columns = ENGINES if "engine" in cell[0] else columns
            columns = PLAN if "planned" in cell[0] else columns
            columns = SCALING if "axis" in cell[0] else columns
            columns = PACKING if "student_padding" in cell[0] else columns
            columns = GPU if "section" in cell[0] else columns
            columns = SHAPES if "shape_steps" in cell[0] else columns
            print(f"#### {name}\n\n{markdown(cell, columns)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
