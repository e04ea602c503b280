"""训练前后各考一次的任务：分数怎么算，写下的结果怎样接得上。"""

import json

import pytest

from distillab.checks import merged
from distillab.config import TaskConfig
from distillab.language_model import PretrainedLM
from distillab.tasks import TaskSet, accuracy, gap_closed


@pytest.fixture
def task(tmp_path):
    def make(**config):
        path = tmp_path / "questions.jsonl"
        rows = [{"id": str(i), "prompt": f"{i} + 1 = ?", "answer": str(i + 1)} for i in range(5)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {"source": str(path), "match": {"regex": "."}, "max_new_tokens": 4} | config
        return TaskSet.load("sums", TaskConfig.model_validate(values), {})

    return make


def test_every_question_is_answered_in_its_order_and_judged(task, tiny_qwen2, tiny_tokenizer):
    model = PretrainedLM(tiny_qwen2)
    rows = task().ask(model, tiny_tokenizer, "student")
    assert [row["id"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert [row["answer"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert accuracy(rows) == sum(bool(row["response"]) for row in rows) / 5
    assert accuracy(task(match={"regex": "(?!)"}).ask(model, tiny_tokenizer, "student")) == 0


def test_the_teacher_reads_the_experience_and_the_student_does_not(
    task, tiny_qwen2, tiny_tokenizer
):
    task = task(experience="always add one")
    model = PretrainedLM(tiny_qwen2)
    same = [
        student["response"] == teacher["response"]
        for student, teacher in zip(
            task.ask(model, tiny_tokenizer, "student"),
            task.ask(model, tiny_tokenizer, "teacher"),
            strict=True,
        )
    ]
    assert not all(same)


def test_results_that_are_there_are_not_asked_for_again(task, tiny_qwen2, tiny_tokenizer, tmp_path):
    path = tmp_path / "checks" / "sums.student_before.jsonl"
    model = PretrainedLM(tiny_qwen2)
    rows = task().ask(model, tiny_tokenizer, "student", path)
    assert task().ask(None, tiny_tokenizer, "student", path) == rows  # 没有模型也答得出
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("teacher", "before", "after", "closed"),
    [(0.9, 0.1, 0.5, 0.5), (0.9, 0.1, 1.0, 1.125), (0.9, 0.1, 0.0, -0.125), (0.1, 0.1, 0.5, None),
     (None, 0.1, 0.5, None)],
)  # fmt: skip
def test_gap_closed(teacher, before, after, closed):
    assert gap_closed(teacher, before, after) == (None if closed is None else pytest.approx(closed))


def test_before_and_after_become_one_summary():
    found = merged(
        {"tasks": {"a": {"teacher": 0.8, "student_before": 0.0}}},
        {"tasks": {"a": {"teacher": 0.8, "student_after": 0.6}}, "texts": {"b": {"teacher": 9.0}}},
    )
    assert found["texts"] == {"b": {"teacher": 9.0}}
    assert found["tasks"]["a"] == {
        "teacher": 0.8, "student_before": 0.0, "student_after": 0.6,
        "gap_closed": pytest.approx(0.75),
    }  # fmt: skip
