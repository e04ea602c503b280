"""教师写好的 response：哪些能训练，略过的都有说明，读不懂的行被拒绝。"""

import json

import pytest

from distillab.data.responses import usable_responses
from distillab.errors import DistillabError

KEYS = ["a", "b", "c"]


@pytest.fixture
def read(tmp_path):
    def call(rows):
        path = tmp_path / "responses.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return usable_responses(str(path), KEYS)

    return call


def test_every_task_has_its_responses_in_the_order_of_the_file(read):
    rows = [{"id": key, "response": text} for key, text in zip("cabca", "12345", strict=True)]
    responses, notes = read(rows)
    assert responses == {"a": ["2", "5"], "b": ["3"], "c": ["1", "4"]}
    assert notes == []


def test_unusable_responses_are_left_out_and_counted(read):
    responses, notes = read(
        [
            {"id": "a", "response": "22", "kept": True, "finish_reason": "stop"},
            {"id": "a", "response": "23", "kept": False},
            {"id": "a", "response": "24", "kept": None},
            {"id": "b", "response": "3", "kept": True, "finish_reason": "length"},
            {"id": "c", "response": " "},
            {"id": "z", "response": "0"},
        ]
    )
    assert responses == {"a": ["22"]}
    assert [note.partition("responses.jsonl: ")[2] for note in notes] == [
        "left out 2 rows that the filter rejected",
        "left out 1 responses that were cut off while being generated",
        "left out 1 empty responses",
        "left out 1 responses to unknown ids: 'z'",
        "left out 2 tasks that it does not answer: 'b', 'c'",
    ]


def test_the_reasoning_of_a_response_comes_with_it(read):
    row = {"id": "a", "response": "22", "reasoning": "Carry."}
    responses, _ = read([row, {"id": "b", "response": "3", "reasoning": None}])
    message = {"role": "assistant", "content": "22", "reasoning_content": "Carry."}
    assert responses == {"a": [message], "b": ["3"]}


def test_responses_that_answer_nothing_are_refused(read):
    message = "answers none of the 3 tasks, such as 'a', 'b', 'c'; found 1 responses to unknown"
    with pytest.raises(DistillabError, match=message):
        read([{"id": "z", "response": "0"}])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"id": "a", "reply": "x"},
            "responses.jsonl line 1 is not a response: expected a JSON object with id, response",
        ),
        (["a"], "responses.jsonl line 1 is not a response"),
        (
            {"id": "a", "response": 4},
            "responses.jsonl line 1: expected text in response, found int",
        ),
    ],
)
def test_rows_that_are_no_responses_are_refused(read, row, message):
    with pytest.raises(DistillabError, match=message):
        read([row])


def test_a_row_that_a_kill_left_half_written_is_ignored(tmp_path):
    path = tmp_path / "responses.jsonl"
    path.write_text('{"id": "a", "response": "1"}\n{"id": "b", "resp')
    assert usable_responses(str(path), KEYS)[0] == {"a": ["1"]}
    path.write_text('{"id": "a", "response": "1"}\n{"id": "b", "response": "2"}')  # 只是没有换行
    assert usable_responses(str(path), KEYS)[0] == {"a": ["1"], "b": ["2"]}
