"""由 ``handbook.yaml`` 写出演示任务的五个 jsonl 文件：``python recipes/experience/demo/make.py``。

同一个任务在一对文件里 ``id`` 与问题相同；带 ``-with-handbook`` 的 system 消息里多出这个问题所在的
一节手册，就是教师读、学生不读的经验。
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent


def main() -> None:
    """写出全部文件；内容只取决于 ``handbook.yaml``。"""
    book = yaml.safe_load((HERE / "handbook.yaml").read_text(encoding="utf-8"))
    entries, size = book["entries"], book["entries_per_section"]
    for split in ("train", "test"):
        plain, informed = [], []
        for position, entry in enumerate(entries):
            start = position // size * size
            section = " ".join(each["fact"] for each in entries[start : start + size])
            experience = f"{book['system']}\n\n{book['experience']} {section}"
            for number, question in enumerate(entry[split], start=1):
                task = (f"{entry['id']}-{split}-{number}", question, entry["answer"])
                plain.append(record(book["system"], *task))
                informed.append(record(experience, *task))
        write(f"{split}.jsonl", plain)
        write(f"{split}-with-handbook.jsonl", informed)
    unrelated = [
        record(book["system"], f"unrelated-{number:02}", question, answer)
        for number, (question, answer) in enumerate(book["unrelated"].items(), start=1)
    ]
    write("unrelated.jsonl", unrelated)


def record(system: str, key: str, question: str, answer: str) -> dict[str, Any]:
    """一个任务；没有 assistant 轮，回答由教师来写。"""
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": question},
    ]
    return {"id": key, "messages": messages, "answer": answer}


def write(name: str, records: list[dict[str, Any]]) -> None:
    """一行一个任务。"""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (HERE / name).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
