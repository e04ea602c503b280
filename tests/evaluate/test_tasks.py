"""训练前后各考一次的任务：分数怎么算，写下的结果怎样接得上。"""

import json
import re

import pytest
import torch

from distillab.config.sections import TaskConfig
from distillab.data.chat import render_prompt
from distillab.errors import DistillabError
from distillab.evaluate.checks import merged
from distillab.evaluate.subjects import Subject
from distillab.evaluate.tasks import TaskSet, accuracy
from distillab.export.convert import from_hf
from distillab.figures import gap_closed
from distillab.models.interface import PretrainedLM


def reader(model, tokenizer, side="student"):
    return Subject("one", model, tokenizer, side)


@pytest.fixture
def task(tmp_path):
    def make(**config):
        path = tmp_path / "questions.jsonl"
        rows = [{"id": str(i), "prompt": f"{i} + 1 = ?", "answer": str(i + 1)} for i in range(5)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {"source": str(path), "match": {"regex": "."}, "max_new_tokens": 4} | config
        return TaskSet.load("sums", TaskConfig.model_validate(values))

    return make


def test_every_question_is_answered_in_its_order_and_judged(task, tiny_qwen2, tiny_tokenizer):
    model = PretrainedLM(tiny_qwen2)
    rows = task().ask(reader(model, tiny_tokenizer))
    assert [row["id"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert [row["answer"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert accuracy(rows) == sum(bool(row["response"]) for row in rows) / 5
    assert accuracy(task(match={"regex": "(?!)"}).ask(reader(model, tiny_tokenizer))) == 0


def test_the_teacher_reads_the_experience_and_the_student_does_not(
    task, tiny_qwen2, tiny_tokenizer
):
    task = task(experience="always add one")
    model = PretrainedLM(tiny_qwen2)
    same = [
        student["response"] == teacher["response"]
        for student, teacher in zip(
            task.ask(reader(model, tiny_tokenizer)),
            task.ask(reader(model, tiny_tokenizer, "teacher")),
            strict=True,
        )
    ]
    assert not all(same)


def test_results_that_are_there_are_not_asked_for_again(task, tiny_qwen2, tiny_tokenizer, tmp_path):
    path = tmp_path / "checks" / "sums.student_before.jsonl"
    model = PretrainedLM(tiny_qwen2)
    rows = task().ask(reader(model, tiny_tokenizer), path)
    assert task().ask(reader(None, tiny_tokenizer), path) == rows  # 没有模型也答得出
    assert [p.name for p in path.parent.iterdir()] == [path.name]


COLOURS = ["small", "teacher", "green and blue", "on"]


@pytest.fixture
def choice(tmp_path):
    def make(by="sum", **config):
        path = tmp_path / "choices.jsonl"
        rows = [
            {"id": str(i), "prompt": f"colour {i}{' again' * (i % 3)}?", "choices": COLOURS[: 2 + i % 3],
             "answer": i % 2 if i % 4 else COLOURS[i % 2]}
            for i in range(12)
        ]  # fmt: skip
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {"source": str(path), "match": {"choice": by}} | config
        return TaskSet.load("colours", TaskConfig.model_validate(values))

    return make


@torch.no_grad()
def chosen_by_hand(hf, tokenizer, messages, choices, by):
    """逐题逐项，整句一次前向，全部 logits。"""
    prompt = render_prompt(messages, tokenizer)
    scores = []
    for text in choices:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        log_p = hf(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
        values = [float(log_p[len(prompt) - 1 + i, token]) for i, token in enumerate(ids)]
        scores.append(sum(values) / (len(values) if by == "mean" else 1))
    return choices[scores.index(max(scores))], scores


@pytest.mark.parametrize("by", ["sum", "mean"])
@pytest.mark.parametrize("view", ["student", "teacher"])
@pytest.mark.parametrize("family", ["pretrained", "student model"])
def test_the_likeliest_choice_is_that_of_transformers(
    choice, tiny_qwen2, tiny_tokenizer, by, view, family
):
    task = choice(by, experience="sea")
    model = PretrainedLM(tiny_qwen2) if family == "pretrained" else from_hf(tiny_qwen2)
    task.check_fits(reader(model, tiny_tokenizer, view))
    rows = task.ask(reader(model, tiny_tokenizer, view))
    assert [row["id"] for row in rows] == [str(i) for i in range(12)]
    for i, (row, pair) in enumerate(zip(rows, task.pairs, strict=True)):
        choices = COLOURS[: 2 + i % 3]
        messages = getattr(pair, view).prompt
        text, scores = chosen_by_hand(tiny_qwen2, tiny_tokenizer, messages, choices, by)
        assert row["response"] == text
        assert row["answer"] == choices[i % 2]
        assert row["correct"] == (row["response"] == row["answer"])
        if by == "sum":
            assert row["log_likelihoods"] == pytest.approx(scores, rel=1e-4)
    assert len({row["response"] for row in rows}) > 1


def test_sum_and_mean_can_choose_differently(choice, tiny_qwen2, tiny_tokenizer):
    model = PretrainedLM(tiny_qwen2)
    found = [[row["response"] for row in choice(by).ask(reader(model, tiny_tokenizer))]
             for by in ("sum", "mean")]  # fmt: skip
    assert found[0] != found[1]


def test_choices_that_do_not_fit_are_refused_before_training(choice, tiny_qwen2, tiny_tokenizer):
    task = choice(experience="the colour is black " * 6)
    with pytest.raises(DistillabError) as caught:
        task.check_fits(reader(PretrainedLM(tiny_qwen2), tiny_tokenizer, "teacher"))
    assert str(caught.value).startswith("evaluate.tasks.colours: ")
    assert "choices.jsonl:1: the teacher's prompt has " in str(caught.value)
    assert re.search(
        r"has \d+ tokens and its longest choice \d, expected at most 64 t", str(caught.value)
    )


def test_choices_may_stand_in_the_teachers_file_alone(tmp_path, tiny_qwen2, tiny_tokenizer):
    question = [{"role": "user", "content": "which?"}]
    known = [{"role": "system", "content": "it is red"}, *question]
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "0", "messages": question}) + "\n")
    row = {"id": "0", "messages": known, "choices": ["red", "blue"], "answer": "blue"}
    (tmp_path / "b.jsonl").write_text(json.dumps(row) + "\n")
    config = {"source": f"{tmp_path}/a.jsonl", "teacher_source": f"{tmp_path}/b.jsonl",
              "match": {"choice": "sum"}}  # fmt: skip
    task = TaskSet.load("x", TaskConfig.model_validate(config))
    (row,) = task.ask(reader(PretrainedLM(tiny_qwen2), tiny_tokenizer))
    assert row["answer"] == "blue"


def test_generated_problems_are_scored_by_their_generator(tiny_qwen2, tiny_tokenizer, monkeypatch):
    generator = {"name": "basic_arithmetic", "size": 6, "seed": 3, "options": {"max_terms": 2}}
    config = TaskConfig.model_validate(
        {"generator": generator, "experience": "add", "max_new_tokens": 4}
    )
    task = TaskSet.load("sums", config)
    assert {len(pair.teacher.messages) for pair in task.pairs} == {2}
    answers = [pair.student.answer for pair in task.pairs]
    said = [
        answers[0], f"it is {answers[1]}", "no", answers[3], f"<answer>{answers[4]}</answer>", ""
    ]  # fmt: skip
    ids = [tiny_tokenizer(text + "<|endoftext|>").input_ids for text in said]
    monkeypatch.setattr("distillab.evaluate.tasks.respond", lambda *_, **__: [dict(enumerate(ids))])
    rows = task.ask(reader(PretrainedLM(tiny_qwen2), tiny_tokenizer))
    assert [row["correct"] for row in rows] == [True, False, False, True, True, False]
    assert 0 < rows[1]["score"] < 1  # 部分分记下，但不算对
    assert accuracy(rows) == 0.5


def test_a_prompt_is_encoded_once(task, choice, tiny_qwen2, tiny_tokenizer, monkeypatch):
    from distillab.evaluate import tasks

    model, seen = PretrainedLM(tiny_qwen2), []
    monkeypatch.setattr(
        tasks, "render_prompt", lambda *a, **k: seen.append(1) or render_prompt(*a, **k)
    )
    for one in (task(), choice()):
        seen.clear()
        one.check_fits(reader(model, tiny_tokenizer))
        one.ask(reader(model, tiny_tokenizer))
        one.ask(reader(model, tiny_tokenizer))
        assert len(seen) == len(one.pairs)


@pytest.mark.parametrize(
    ("teacher", "before", "after", "closed"),
    [(0.9, 0.1, 0.5, 0.5), (0.9, 0.1, 1.0, 1.125), (0.9, 0.1, 0.0, -0.125), (0.1, 0.1, 0.5, None),
     (None, 0.1, 0.5, None)],
)  # fmt: skip
def test_gap_closed(teacher, before, after, closed):
    scores = {"student_before": [before], "student_after": [after]}
    if teacher is not None:
        scores["teacher"] = [teacher]
    figure = gap_closed(scores)
    assert figure == (closed and {"value": pytest.approx(closed), "low": None, "high": None})


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
