"""由 ``results/`` 里的记录重写 README 与文档中的结果表。

表放在 ``<!-- results: NAME -->`` 与 ``<!-- /results -->`` 之间；一张表所要的记录还不全时，那一块
原样不动。``--check`` 不写，有一块过时就退出 1。

python results/tables.py [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from markdown_table import markdown_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
PAGES = ("README.md", "README.zh-CN.md", "recipes/experience/demo/README.md", "docs/**/*.md")
SEEDS = (0, 1, 2)
METHODS = {"seqkd": "SeqKD", "skd": "SKD", "gkd": "GKD", "skd-gkd": "SKD, GKD"}
_BLOCK = re.compile(r"(<!-- results: (?P<name>[\w-]+) -->\n).*?(<!-- /results -->)", re.DOTALL)

Record = dict[str, Any]
"""``summary.json`` 的内容，加上 ``record`` 与 ``evaluation``：那两个文件的内容。"""


class NotRecorded(Exception):
    """表所要的记录还不全。"""


def read(name: str) -> Record:
    """一条记录。

    Raises:
        NotRecorded: 还没有。
    """
    directory = RESULTS / name
    if not (directory / "record.json").is_file():
        raise NotRecorded(name)
    summary: Record = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    record = json.loads((directory / "record.json").read_text(encoding="utf-8"))
    evaluation = directory / "evaluation.json"
    found = json.loads(evaluation.read_text(encoding="utf-8")) if evaluation.is_file() else None
    return summary | {"name": name, "record": record, "evaluation": found}


# ---------------------------------------------------------------------- 快速开始


def quickstart(chinese: bool) -> str:
    """蒸馏，与 token 数、时间相同的交叉熵。"""
    runs = {name: read(name) for name in ("quickstart", "quickstart-ce", "quickstart-ce-time")}
    kd, same, time = runs.values()
    labels = (
        ["教师，30 层", "它的 15 层，未训练", "蒸馏，`alpha: 0.5`",
         "只有交叉熵，token 数相同", "只有交叉熵，时间大致相同"]
        if chinese else
        ["teacher, 30 layers", "15 of its layers, untrained", "distilled, `alpha: 0.5`",
         "cross-entropy only, same tokens", "cross-entropy only, about the same time"]
    )  # fmt: skip
    header = (
        ["运行", "token 数", "训练用时", "困惑度", "与教师的 KL", "top-1 相同"] if chinese else
        ["run", "tokens", "training", "perplexity", "KL to teacher", "same top-1"]
    )  # fmt: skip
    rows = [
        [labels[0], "", "", *_scores(kd["teacher"])],
        [labels[1], "0", "0 s", *_scores(kd["student_before"])],
    ]
    for label, run in zip(labels[2:], runs.values(), strict=True):
        tokens, seconds = f"{run['tokens']:,}", f"{run['seconds']:,.0f} s"
        rows.append([label, tokens, seconds, *_scores(run["student_after"])])
    return "\n\n".join(
        [markdown_table(header, rows), _gains(kd, same, time, chinese),
         _source(list(runs.values()), chinese), _commands(list(runs.values()))]
    )  # fmt: skip


def _scores(model: Record) -> list[str]:
    return [f"{model['perplexity']:,.1f}", f"{model['kl']:.2f}", _percent(model["top1_agreement"])]


def _gains(kd: Record, same: Record, time: Record, chinese: bool) -> str:
    """蒸馏比交叉熵好多少、贵多少，由记录算出。"""
    cost = same["tokens_per_second"] / kd["tokens_per_second"] - 1
    by = [
        1 - kd["student_after"]["perplexity"] / run["student_after"]["perplexity"]
        for run in (same, time)
    ]
    used = time["seconds"] / kd["seconds"]
    if chinese:
        words = [f"{'低' if gain >= 0 else '高'} {abs(gain):.0%}" for gain in by]
        return (
            f"每个 token 的时间是交叉熵的 {1 + cost:.2f} 倍；token 数相同时蒸馏的困惑度{words[0]}，"
            f"交叉熵用了它 {used:.2f} 倍的时间时{words[1]}。"
        )
    words = [f"{abs(gain):.0%} {'lower' if gain >= 0 else 'higher'}" for gain in by]
    return (
        f"A token costs {1 + cost:.2f} times that of cross-entropy; the distilled student's "
        f"perplexity is {words[0]} at equal tokens, and {words[1]} where cross-entropy took "
        f"{used:.2f} times as long."
    )


# ---------------------------------------------------------------------- 手册


def demo(chinese: bool) -> str:
    """三种方法与先 SKD 再 GKD，每种三个种子：平均与范围。"""
    runs = {method: [read(f"{method}-{seed}") for seed in SEEDS] for method in METHODS}
    first = runs["seqkd"][0]
    handbook, unrelated = first["tasks"]["handbook"], first["tasks"]["unrelated"]
    wikipedia = first["texts"]["wikipedia"]
    _same_start([run for method in ("seqkd", "skd", "gkd") for run in runs[method]])
    header = (
        ["", "手册的问题", "差距补上了", "无关的问题", "维基百科困惑度", "与训练前的 KL", "训练"]
        if chinese else
        ["", "handbook questions", "gap closed", "unrelated questions", "Wikipedia perplexity",
         "KL from before", "training"]
    )  # fmt: skip
    labels = (
        ["教师，手册在 prompt 里", "学生，训练前"] if chinese else
        ["teacher, handbook in the prompt", "student before"]
    )  # fmt: skip
    rows = [
        [labels[0], _percent(handbook["teacher"]), "", _percent(unrelated["teacher"]),
         f"{wikipedia['teacher']:.1f}", "0", ""],
        [labels[1], _percent(handbook["student_before"]), "0 %",
         _percent(unrelated["student_before"]), f"{wikipedia['student_before']:.1f}", "0", ""],
    ]  # fmt: skip
    gap = handbook["teacher"] - handbook["student_before"]
    for method, group in runs.items():
        right = [run["tasks"]["handbook"]["student_after"] for run in group]
        seconds = [run["seconds"] for run in group]
        if method == "skd-gkd":  # 接着 SKD 的学生训练，用时也要算上它
            seconds = [a + b["seconds"] for a, b in zip(seconds, runs["skd"], strict=True)]
        name = METHODS[method]
        if method == "skd-gkd":
            name = "先 SKD 再 GKD" if chinese else "SKD, then GKD"
        minutes = "分钟" if chinese else "min"
        rows.append(
            [
                name,
                _range(right, _percent),
                _range([(x - handbook["student_before"]) / gap for x in right],
                       lambda value: f"{value:.0%}".replace("%", " %")),
                _range([run["tasks"]["unrelated"]["student_after"] for run in group], _percent),
                _range([run["texts"]["wikipedia"]["student_after"] for run in group],
                       lambda value: f"{value:.1f}"),
                _drift(group),
                f"{_range([s / 60 for s in seconds], lambda value: f'{value:.0f}')} {minutes}",
            ]
        )  # fmt: skip
    everything = [run for group in runs.values() for run in group]
    seeds, end = _listed(SEEDS), "" if chinese else " "
    note = (
        f"{len(SEEDS)} 个种子（{seeds}）的平均，括号里是最小与最大；命令是种子 {SEEDS[0]} 的。"
        if chinese else
        f"Means of {len(SEEDS)} seeds ({seeds}), the smallest and largest in brackets; the "
        f"commands are those of seed {SEEDS[0]}."
    )  # fmt: skip
    return "\n\n".join(
        [markdown_table(header, rows), f"{note}{end}{_source(everything, chinese)}",
         _commands([group[0] for group in runs.values()])]
    )  # fmt: skip


def _drift(runs: Sequence[Record]) -> str:
    """维基百科上 KL(训练前‖训练后)，nat/token：教师就是训练前的模型，这里没有经验可读。"""
    evaluations = [run["evaluation"] for run in runs]
    if None in evaluations:
        return ""
    after = [found["agreement"]["wikipedia"]["student_after"] for found in evaluations]
    return _range([found["forward_kl"]["value"] for found in after], lambda value: f"{value:.2f}")


def _same_start(runs: Sequence[Record]) -> None:
    """同一张表里，训练前与教师的成绩必须是同一组。"""
    for kind, name in (("tasks", "handbook"), ("tasks", "unrelated"), ("texts", "wikipedia")):
        for model in ("teacher", "student_before"):
            values = [run[kind][name][model] for run in runs]
            if max(values) - min(values) > 1e-6 * abs(max(values)):
                sys.exit(f"error: {name}: runs disagree on {model}: {sorted(set(values))}")


# ---------------------------------------------------------------------- 共用


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _range(values: Sequence[float], form: Callable[[float], str]) -> str:
    mean = form(sum(values) / len(values))
    low, high = form(min(values)), form(max(values))
    return mean if low == high else f"{mean} ({low.removesuffix(' %')} - {high})"


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


def _source(runs: Sequence[Record], chinese: bool) -> str:
    """机器、日期、版本；几条记录不同就都列出。"""
    records = [run["record"] for run in runs]
    machines = " / ".join(dict.fromkeys(record["machine"] for record in records))
    dates = sorted({record["date"] for record in records})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} - {dates[-1]}"
    versions = ", ".join(
        f"{package} {' / '.join(dict.fromkeys(record['versions'][package] for record in records))}"
        for package in ("distillab", "torch", "transformers")
    )
    names = "`, `".join(f"results/{name}" for name in dict.fromkeys(run["name"] for run in runs))
    if len(runs) > 4:
        names = "results/"
    if chinese:
        return f"机器：{machines}；日期：{when}；版本：{versions}；记录：`{names}`。命令："
    return f"Machine: {machines}; date: {when}; versions: {versions}; records: `{names}`. Commands:"


def _commands(runs: Sequence[Record]) -> str:
    lines = "\n".join(run["record"]["command"] for run in runs)
    return f"```bash\n{lines}\n```"


TABLES: dict[str, Callable[[bool], str]] = {"quickstart": quickstart, "demo": demo}


def rewritten(text: str, chinese: bool) -> str:
    """一页的文字，其中记录齐全的块换成新的。"""

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            sys.exit(f"error: no table is named {name}; choose from {_listed(sorted(TABLES))}")
        try:
            return f"{match[1]}\n{TABLES[name](chinese)}\n\n{match[3]}"
        except NotRecorded:
            return match[0]

    return _BLOCK.sub(block, text)


def main() -> None:
    """命令行。"""
    parser = argparse.ArgumentParser(description="Rewrite the result tables from results/.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if out of date")
    check = parser.parse_args().check
    stale = []
    for path in sorted(path for pattern in PAGES for path in ROOT.glob(pattern)):
        text = path.read_text(encoding="utf-8")
        chinese = path.name == "README.zh-CN.md" or path.is_relative_to(ROOT / "docs")
        new = rewritten(text, chinese)
        if new != text:
            stale.append(path.relative_to(ROOT))
            if not check:
                path.write_text(new, encoding="utf-8")
    for path in stale:
        print(f"{path}: {'out of date: run python results/tables.py' if check else 'rewritten'}")
    sys.exit(check and bool(stale))


if __name__ == "__main__":
    main()
