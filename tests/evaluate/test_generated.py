"""reasoning-gym 的题：由种子决定，由它自己判分；写错的在出题之前就说。"""

import sys

import pytest

from distillab.config.sections import GeneratorConfig
from distillab.errors import DistillabError
from distillab.evaluate.problems import generated

OPTIONS = {"min_terms": 2, "max_terms": 2, "operators": ["+"], "max_digits": 1}


def make(**values):
    config = {"name": "basic_arithmetic", "size": 5, "seed": 1, "options": OPTIONS} | values
    return generated(GeneratorConfig.model_validate(config), "here")


def test_the_same_seed_gives_the_same_problems():
    first, again, other = (make(seed=seed)[0] for seed in (1, 1, 2))
    assert [c.question for c in first] == [c.question for c in again]
    assert [c.question for c in first] != [c.question for c in other]
    assert [c.key for c in first] == [f"basic_arithmetic-{i}" for i in range(5)]
    longer, _ = make(size=8)
    assert [c.question for c in longer[:5]] == [c.question for c in first]


def test_problems_are_those_of_reasoning_gym():
    import reasoning_gym

    dataset = reasoning_gym.create_dataset("basic_arithmetic", seed=1, size=5, **OPTIONS)
    problems, _ = make()
    assert [(c.question, c.answer) for c in problems] == [
        (e["question"], e["answer"]) for e in dataset
    ]


def test_scores_are_its_own_and_read_the_answer_tag():
    (problem, *_), score = make()
    right = problem.answer
    assert score(problem.record, right, right) == 1
    assert score(problem.record, right, f" {right}\n") == 1
    assert (
        score(problem.record, right, f"Well: <answer>0</answer> no, <answer> {right} </answer>.")
        == 1
    )
    assert 0 < score(problem.record, right, f"it is {right}") < 1
    assert score(problem.record, right, "") == 0


def test_a_response_that_its_scorer_cannot_read_is_wrong(monkeypatch, caplog):
    from reasoning_gym.arithmetic.basic_arithmetic import BasicArithmeticDataset

    def broken(self, answer, entry):
        return 1 / 0

    monkeypatch.setattr(BasicArithmeticDataset, "score_answer", broken)
    (problem, *_), score = make()
    assert score(problem.record, problem.answer, "1") == 0
    assert "ZeroDivisionError: division by zero); it counts as wrong" in caplog.text


CASES = [
    ({"name": "basic_arithmetik"},
     "here.name: reasoning-gym has no data set 'basic_arithmetik'; did you mean 'basic_arithmetic'?"),
    ({"options": {"max_term": 3}},
     "here.options: basic_arithmetic has no option 'max_term'; did you mean 'max_terms'?"),
    ({"options": {"min_terms": 0}},
     "here.options: basic_arithmetic refuses them: min_terms must be positive"),
    ({"options": {"min_terms": "two"}},
     "here.options: basic_arithmetic refuses them: '>' not supported between instances of 'str' and 'int'"),
    ({"options": {"seed": 3}}, "here.options.seed: set here.seed"),
    ({"options": {"size": 3}}, "here.options.size: set here.size"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), CASES)
def test_what_it_cannot_generate_is_refused_in_one_line(values, message):
    with pytest.raises(DistillabError) as caught:
        make(**values)
    assert str(caught.value) == message


def test_an_unlike_name_lists_the_data_sets_in_one_line():
    with pytest.raises(
        DistillabError, match=r"no data set 'qqqq'; choose from .*basic_arithmetic"
    ) as e:
        make(name="qqqq")
    assert "\n" not in str(e.value)


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(
        DistillabError, match=r"^here needs reasoning-gym .*pip install 'distillab\[tasks\]'"
    ):
        make()
