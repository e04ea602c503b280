"""由 ``handbook.yaml`` 写出演示任务的五个 jsonl 文件：``python recipes/experience/demo/make.py``。

同一个任务在一对文件里 ``id`` 相同；带 ``-with-handbook`` 的问题前面多出它所在的一节手册，就是教师
读、学生不读的经验。一节是两个条目，每条是一个常见问法（训练问法的第一个）与答案。
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
            section = " ".join(
                f"{each['train'][0]} {each['fact']}" for each in entries[start : start + size]
            )
            for number, question in enumerate(entry[split], start=1):
                key, answer = f"{entry['id']}-{split}-{number}", entry["answer"]
                plain.append(record(book["system"], key, question, answer))
                informed.append(record(book["system"], key, f"{section}\n\n{question}", answer))
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
