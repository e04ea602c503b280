"""lm-evaluation-harness 的三个本地任务：选择、困惑度、续写；数据在旁边的 jsonl 里，不要 hub。"""

import json
from pathlib import Path

COLOURS = ["red", "green", "blue", "black"]
CHOOSE = """\
task: tiny_choose
dataset_path: json
dataset_kwargs: {data_files: {test: DIR/choose.jsonl}}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "{{question}} answer:"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 3.0}
"""
WORDS = """\
task: tiny_words
dataset_path: json
dataset_kwargs: {data_files: {test: DIR/words.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
metadata: {version: 1.0}
"""
WRITE = """\
task: tiny_write
dataset_path: json
dataset_kwargs: {data_files: {test: DIR/choose.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: question
doc_to_target: answer
generation_kwargs: {until: ["a", "\\n"], max_gen_toks: 20, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""


def write_tasks(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    choose = [
        {"question": f"the teacher asks {'again and ' * (n % 4)}about item {n}", "label": n * 7 % 4,
         "choices": [f" {c}{' and soft' * (n % 3)}" for c in COLOURS], "answer": COLOURS[n * 7 % 4]}
        for n in range(12)
    ]  # fmt: skip
    words = [{"text": "the small student learns soft targets " * (1 + 4 * n)} for n in range(4)]
    for name, rows in (("choose", choose), ("words", words)):
        path = directory / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choose", CHOOSE), ("words", WORDS), ("write", WRITE)):
        (directory / f"{name}.yaml").write_text(text.replace("DIR", str(directory.resolve())))
    return directory
