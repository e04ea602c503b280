"""任务的速度：``TaskSet.ask``（分批、由长到短）与 ``transformers`` 上逐题的循环并排。

模型是 SmolLM2-135M。``choice`` 是四选一，循环对每个选项把整句喂一遍、取全部 logits；``response`` 是
贪心地写回答，循环每题 ``generate`` 一次。逐轮交替，取中位数；两边的回答要相同。

    python benchmarks/evaluation.py --items 12 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import (
    Record,
    check_least,
    choose_device,
    environment,
    number,
    save,
    synchronize,
)
from rich.console import Console
from rich.table import Table
from sampling import TOPICS, load

CASES = ("choice", "response")
CHOICES = (
    "It is well documented by many witnesses.",
    "Nobody knows much about it.",
    "It depends on whom you ask, and when.",
    "It was invented by a novelist in 1890.",
)
Answers = Callable[[], list[str]]


def make_task(case: str, items: int, new: int) -> Any:
    """问题长短不一，最长的约为最短的三倍。"""
    from distillab.config.sections import TaskConfig
    from distillab.evaluate.tasks import TaskSet

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "items.jsonl")
        with path.open("w") as file:
            for index in range(items):
                topic = TOPICS[index % len(TOPICS)]
                prompt = " ".join(
                    [f"Question {index}: what do we know about {topic}?"] * (1 + index % 3)
                )
                row = {"prompt": prompt, "choices": CHOICES, "answer": index % len(CHOICES)}
                file.write(json.dumps(row) + "\n")
        match = {"choice": "sum"} if case == "choice" else {"regex": "."}
        values = {"source": str(path), "match": match, "max_new_tokens": new}
        return TaskSet.load(case, TaskConfig.model_validate(values))


def batched(case: str, hf_model: Any, tokenizer: Any, options: argparse.Namespace) -> Answers:
    """``TaskSet.ask``；每次都重新分词。"""
    from distillab.evaluate.subjects import Subject
    from distillab.models.interface import PretrainedLM

    subject = Subject(case, PretrainedLM(hf_model), tokenizer)

    def answers() -> list[str]:
        task = make_task(case, options.items, options.new)
        return [row["response"] for row in task.ask(subject)]

    return answers


def looped(case: str, hf_model: Any, tokenizer: Any, options: argparse.Namespace) -> Answers:
    """逐题、逐项，只用 ``transformers``。"""
    from distillab.generate.stops import stop_ids
    from distillab.models.interface import PretrainedLM

    stops = sorted(stop_ids(tokenizer, PretrainedLM(hf_model)))

    @torch.no_grad()
    def choose(prompt: list[int]) -> str:
        totals = []
        for text in CHOICES:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            whole = torch.tensor([prompt + ids], device=options.device)
            log_p = hf_model(whole).logits[0].float().log_softmax(-1)
            rows = torch.arange(len(prompt) - 1, len(prompt) + len(ids) - 1)
            totals.append(float(log_p[rows, ids].sum()))
        return CHOICES[totals.index(max(totals))]

    def write(prompt: list[int]) -> str:
        ids = torch.tensor([prompt], device=options.device)
        new = hf_model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=options.new,
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id,
        )
        text: str = tokenizer.decode(new[0, len(prompt) :], skip_special_tokens=True)
        return text

    def answers() -> list[str]:
        found = []
        for pair in make_task(case, options.items, options.new).pairs:
            prompt = tokenizer.apply_chat_template(
                pair.student.prompt, add_generation_prompt=True, return_dict=False
            )
            found.append(choose(prompt) if case == "choice" else write(prompt))
        return found

    return answers


def measure(case: str, hf_model: Any, tokenizer: Any, options: argparse.Namespace) -> list[Record]:
    """一格：两个实现逐轮交替，先各热身两题。"""
    few = argparse.Namespace(**vars(options) | {"items": 2, "new": 2})
    makers = {"distillab": batched, "plain loop": looped}
    for make in makers.values():
        make(case, hf_model, tokenizer, few)()
    implementations = {
        name: make(case, hf_model, tokenizer, options) for name, make in makers.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in implementations}
    found: dict[str, list[str]] = {}
    for _ in range(options.rounds):
        for name, answers in implementations.items():
            synchronize(options.device)
            start = time.perf_counter()
            found[name] = answers()
            synchronize(options.device)
            seconds[name].append(time.perf_counter() - start)
    same = sum(a == b for a, b in zip(*found.values(), strict=True))
    loop = statistics.median(seconds["plain loop"])
    return [
        {
            "implementation": name,
            "case": case,
            "items_per_second": options.items / statistics.median(times),
            "seconds": statistics.median(times),
            "items": options.items,
            "same_answers": same,
            "ratio_to_loop": loop / statistics.median(times),
        }
        for name, times in seconds.items()
    ]


def show(records: list[Record]) -> None:
    """印成表；比值是对同一格的循环。"""
    table = Table("case", "implementation")
    for column in ("items/s", "seconds", "items", "same answers", "/ plain loop"):
        table.add_column(column, justify="right")
    for record in records:
        table.add_row(
            record["case"],
            record["implementation"],
            number(record["items_per_second"], ".2f"),
            number(record["seconds"], ".2f"),
            str(record["items"]),
            str(record["same_answers"]),
            number(record["ratio_to_loop"], ".2f"),
        )
    Console().print(table)


def parse(arguments: list[str]) -> argparse.Namespace:
    """命令行。"""
    parser = argparse.ArgumentParser(
        description="Speed of tasks: batched by length, and one item after the other.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=list(CASES))
    add("--items", type=int, default=12)
    add("--new", type=int, default=16, help="most new tokens of a response")
    add("--rounds", type=int, default=3)
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--json", type=Path, metavar="FILE", help="write the records to this file")
    options = parser.parse_args(arguments)
    check_least(parser, options, {"items": 2, "new": 2, "rounds": 1})
    options.device = choose_device(options.device)
    return options


def main(arguments: list[str]) -> int:
    """量完所有的格，印表；返回退出码。"""
    options = parse(arguments)
    hf_model, tokenizer = load(options)
    records: list[Record] = []
    for case in options.cases:
        records += measure(case, hf_model, tokenizer, options)
    show(records)
    if options.json:
        about = {"dtype": options.dtype, "rounds": options.rounds} | environment(options.device)
        save(options.json, [record | about for record in records], ["case", "dtype", "device_name"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
