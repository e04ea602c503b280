"""选择题的记录：认得什么，拒绝什么。"""

import pytest

from distillab.errors import DistillabError
from distillab.evaluate.problems import read_choices


@pytest.mark.parametrize(("answer", "right"), [(0, 0), (2, 2), ("green", 1)])
def test_the_answer_is_an_index_or_a_text(answer, right):
    texts = ["red", "green", "blue"]
    assert read_choices({"choices": texts, "answer": answer}, "row") == (texts, right)


def test_numbers_written_as_text_are_texts():
    assert read_choices({"choices": ["4", "0"], "answer": "0"}, "row").right == 1
    assert read_choices({"choices": ["4", "0"], "answer": 0}, "row").right == 0


EXPECTED = "expected a list of at least two different texts"
CASES = [
    ({"answer": 0}, "row: expected choices, a list of texts to choose from"),
    ({"choices": [], "answer": 0}, f"row: choices is [], {EXPECTED}"),
    ({"choices": ["a"], "answer": 0}, f'row: choices is ["a"], {EXPECTED}'),
    ({"choices": ["a", "a"], "answer": 0}, f'row: choices is ["a", "a"], {EXPECTED}'),
    ({"choices": ["a", " "], "answer": 0}, f'row: choices is ["a", " "], {EXPECTED}'),
    ({"choices": ["a", 3], "answer": 0}, f'row: choices is ["a", 3], {EXPECTED}'),
    ({"choices": "ab", "answer": 0}, f'row: choices is "ab", {EXPECTED}'),
    ({"choices": ["a" * 80, "a" * 80], "answer": 0},
     f'row: choices is ["{"a" * 55}..., {EXPECTED}'),
    ({"choices": ["red", "green"], "answer": "gren"},
     "row: answer 'gren' is not among the choices; did you mean 'green'?"),
    ({"choices": ["red", "green"], "answer": "x"},
     "row: answer 'x' is not among the choices; choose from green, red"),
    ({"choices": ["red", "green"], "answer": 2},
     "row: answer 2 is no index of its 2 choices, expected 0 to 1"),
    ({"choices": ["red", "green"], "answer": -1},
     "row: answer -1 is no index of its 2 choices, expected 0 to 1"),
    ({"choices": ["red", "green"]},
     "row: expected answer, the index (from 0) or the text of the right choice"),
    ({"choices": ["red", "green"], "answer": True},
     "row: expected answer, the index (from 0) or the text of the right choice"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "message"), CASES)
def test_what_is_no_choice_is_refused_in_one_line(record, message):
    with pytest.raises(DistillabError) as caught:
        read_choices(record, "row")
    assert str(caught.value) == message
