"""演示任务的数据：由手册写出，考题没有训练过，也没有把答案说出来。"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from distillab.config.sections import DataSection
from distillab.data.pairs import load_pairs

DEMO = Path(__file__).parents[1] / "recipes" / "experience" / "demo"


def records(name):
    return [json.loads(line) for line in (DEMO / name).read_text(encoding="utf-8").splitlines()]


def test_the_files_are_what_the_script_writes(tmp_path):
    for name in ("make.py", "handbook.yaml"):
        shutil.copy(DEMO / name, tmp_path)
    subprocess.run([sys.executable, str(tmp_path / "make.py")], check=True)
    written = {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    assert written == {path.name: path.read_bytes() for path in DEMO.glob("*.jsonl")}
    assert len(written) == 5


def test_the_handbook_has_20_to_40_entries_and_no_question_gives_its_answer_away():
    entries = yaml.safe_load((DEMO / "handbook.yaml").read_text(encoding="utf-8"))["entries"]
    assert 20 <= len(entries) <= 40
    for entry in entries:
        assert entry["answer"] in entry["fact"]
        for question in (*entry["train"], *entry["test"]):
            assert entry["answer"].casefold() not in question.casefold()


def test_no_test_question_is_trained_on_or_read_in_the_handbook():
    trained = {record["messages"][-1]["content"].casefold() for record in records("train.jsonl")}
    asked = [record["messages"][-1]["content"].casefold() for record in records("test.jsonl")]
    assert len(set(asked)) == len(asked) > 80
    assert not trained & set(asked)
    for question, record in zip(asked, records("test-with-handbook.jsonl"), strict=True):
        assert record["messages"][-1]["content"].casefold().count(question) == 1


@pytest.mark.parametrize("split", ["train", "test"])
def test_both_files_of_a_split_pair_up_completely(split):
    data = DataSection(
        source=str(DEMO / f"{split}.jsonl"),
        teacher_source=str(DEMO / f"{split}-with-handbook.jsonl"),
        format="chat",
    )
    pairs, notes = load_pairs(data, need_response=False)
    assert notes == [f"paired {len(pairs)} tasks by their id"]
    for pair in pairs:
        answer = pair.student.answer
        assert answer in pair.teacher.messages[-1]["content"]
        assert all(answer not in message["content"] for message in pair.student.messages)


def test_the_handbook_answers_none_of_the_unrelated_questions():
    handbook = {record["answer"] for record in records("train.jsonl")}
    unrelated = records("unrelated.jsonl")
    assert len(unrelated) == 40
    assert not handbook & {record["answer"] for record in unrelated}
