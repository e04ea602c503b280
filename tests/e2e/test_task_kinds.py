"""每一种任务都走真正的命令行：考完留下什么，坏的输入各印哪一行。"""

import json
import sys
from pathlib import Path

import pytest

SET = "--set"
TRAIN = ("train", "recipe.yaml")
QUESTIONS, CHOICES = "questions.jsonl", "choices.jsonl"
KINDS = {
    "exact": f"{{source: {QUESTIONS}, match: {{exact: true}}, max_new_tokens: 2}}",
    "regex": f"{{source: {QUESTIONS}, match: {{regex: '.'}}, max_new_tokens: 2}}",
    "function": f"{{source: {QUESTIONS}, match: {{function: 'own_check:is_good'}}, max_new_tokens: 2}}",
    "choice": f"{{source: {CHOICES}, match: {{choice: sum}}, experience: red}}",
    "mean": f"{{source: {CHOICES}, match: {{choice: mean}}}}",
    "sums": "{generator: {name: basic_arithmetic, size: 4, seed: 1, "
            "options: {max_terms: 2, max_digits: 1}}, max_new_tokens: 2}",
}  # fmt: skip


def write_rows(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def choice_row(number, **changes):
    row = {"prompt": f"colour {number}?", "choices": ["red", "the sea", "on"], "answer": number % 3}
    return row | changes


@pytest.fixture
def data(workdir):
    """文本蒸馏的配方，旁边有任务要的文件。"""
    write_rows(QUESTIONS, ({"prompt": f"{n} + 1?", "answer": str(n + 1)} for n in range(5)))
    write_rows(CHOICES, map(choice_row, range(6)))
    return workdir


@pytest.fixture
def recipe(data, monkeypatch):
    """每种任务一个。"""
    Path("own_check.py").write_text("def is_good(record, response): return len(response) > 1\n")
    text = Path("recipe.yaml").read_text().replace("max_steps: 12", "max_steps: 2")
    text = text.replace("warmup_steps: 2", "warmup_steps: 0").replace(
        "max_new_tokens: 8}", "max_new_tokens: 8,\n"
    )
    tasks = "".join(f"    {name}: {task},\n" for name, task in KINDS.items())
    texts = "  texts: {words: {source: text.jsonl, max_seq_len: 16, max_sequences: 4}}"
    Path("recipe.yaml").write_text(f"{text}  tasks: {{\n{tasks}  }},\n{texts}}}\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("own_check", None)


def rows_of(name, model):
    lines = Path(f"runs/recipe/checks/{name}.{model}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_every_kind_of_task_is_scored_before_and_after(recipe, command, monkeypatch):
    from distillab.train.trainer import DistillationTrainer

    compared = []
    evaluate = DistillationTrainer.evaluate

    def watched(self, *arguments, **options):
        compared.append(options.get("teacher", True) if "loader" in options else None)
        return evaluate(self, *arguments, **options)

    monkeypatch.setattr(DistillationTrainer, "evaluate", watched)
    code, out, err = command(*TRAIN)
    assert code == 0, err
    assert [one for one in compared if one is not None] == [True, False]  # 教师的困惑度只量一次
    summary = json.loads(Path("runs/recipe/summary.json").read_text())
    assert set(summary["tasks"]) == set(KINDS)
    words = summary["texts"]["words"]
    assert set(words) == {"teacher", "student_before", "student_after"}
    for name, scores in summary["tasks"].items():
        assert set(scores) == {"teacher", "student_before", "student_after", "gap_closed"}
        for model in ("teacher", "student_before", "student_after"):
            rows = rows_of(name, model)
            assert scores[model] == sum(row["correct"] for row in rows) / len(rows)
        assert f"{name}: student after {scores['student_after']:.1%} (" in err
    assert err.count(" items/s)") == 3 * len(KINDS)  # 教师的只答一次
    assert all(row["correct"] for row in rows_of("regex", "teacher") if row["response"])
    for name in ("choice", "mean"):
        rows = rows_of(name, "student_after")
        assert all(row["response"] in ("red", "the sea", "on") for row in rows)
        assert all(len(row["log_likelihoods"]) == 3 for row in rows)
    assert rows_of("choice", "teacher") != rows_of("mean", "teacher")
    sums = rows_of("sums", "student_after")
    assert [row["id"] for row in sums] == [f"basic_arithmetic-{n}" for n in range(4)]
    assert all(row["correct"] == (row["score"] == 1) for row in sums)
    assert all(name in out for name in KINDS)


def task(text):
    return (*TRAIN, SET, f"evaluate.tasks={{t: {text}}}")


def rewrite(**changes):
    def prepare():
        rows = [choice_row(n, **(changes if n == 2 else {})) for n in range(6)]
        for row in rows:
            for key in [key for key, value in row.items() if value is None]:
                del row[key]
        write_rows(CHOICES, rows)

    return prepare


CHOICE = task(f"{{source: {CHOICES}, match: {{choice: sum}}}}")
GENERATOR = "{{generator: {{name: basic_arithmetic, options: {{{}}}}}}}"
AT = f"evaluate.tasks.t: {CHOICES}:3: "
CASES = {
    "choice: none": (CHOICE, rewrite(choices=None),
        AT + "expected choices, a list of texts to choose from"),
    "choice: empty": (CHOICE, rewrite(choices=[]),
        AT + "choices is [], expected a list of at least two different texts"),
    "choice: answer not among them": (CHOICE, rewrite(answer="the see"),
        AT + "answer 'the see' is not among the choices; did you mean 'the sea'?"),
    "choice: answer no index": (CHOICE, rewrite(answer=3),
        AT + "answer 3 is no index of its 3 choices, expected 0 to 2"),
    "choice: no answer": (CHOICE, rewrite(answer=None),
        AT + "expected answer, the index (from 0) or the text of the right choice"),
    "choice: the same question twice": (CHOICE, rewrite(prompt="colour 1?"),
        "evaluate.tasks.t: the id 'q-{key}' names 2 tasks, expected one"),
    "choice: too long for the model": (CHOICE, rewrite(choices=["ab " * 30, "on"], answer=0),
        AT + "the teacher's prompt has 26 tokens and its longest choice 61, expected at most 64 "
        "together"),
    "choice: no such normalisation": (task(f"{{source: {CHOICES}, match: {{choice: mena}}}}"), None,
        "--set: evaluate.tasks.t.match.choice: found 'mena'; did you mean 'mean'?"),
    "match: two": (task(f"{{source: {CHOICES}, match: {{choice: sum, exact: true}}}}"), None,
        "--set: evaluate.tasks.t.match: set exactly one of exact, regex, function and choice"),
    "match: none": (task(f"{{source: {CHOICES}}}"), None,
        "--set: evaluate.tasks.t: source needs match: exact, regex, function or choice"),
    "task: neither source nor generator": (task("{match: {exact: true}}"), None,
        "--set: evaluate.tasks.t: set exactly one of source and generator"),
    "task: empty": (task(f"{{source: {CHOICES}, match: {{choice: sum}}}}"), lambda: write_rows(CHOICES, []),
        f"evaluate.tasks.t: '{CHOICES}' is empty"),
    "generator: unknown": (task("{generator: {name: basic_aritmetic}}"), None,
        "evaluate.tasks.t.generator.name: reasoning-gym has no data set 'basic_aritmetic'; did you "
        "mean 'basic_arithmetic'?"),
    "generator: unknown option": (task(GENERATOR.format("max_term: 2")), None,
        "evaluate.tasks.t.generator.options: basic_arithmetic has no option 'max_term'; did you "
        "mean 'max_terms'?"),
    "generator: wrong option": (task(GENERATOR.format("min_terms: 9")), None,
        "evaluate.tasks.t.generator.options: basic_arithmetic refuses them: max_terms must be >= "
        "min_terms"),
    "generator: match as well": (task("{generator: {name: chain_sum}, match: {exact: true}}"), None,
        "--set: evaluate.tasks.t: match and generator disagree: the generator writes and scores its "
        "problems; drop one"),
    "lm_eval: no task": ((*TRAIN, SET, "evaluate.lm_eval={tasks: []}"), None,
        "--set: evaluate.lm_eval.tasks: found [], expected at least 1 item after validation, not 0"),
    "lm_eval: no such directory": (
        (*TRAIN, SET, "evaluate.lm_eval={tasks: [x], include_path: nowhere}"), None,
        "evaluate.lm_eval.include_path: 'nowhere' is not a directory"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_task_prints_one_line_and_exits_with_two(data, command, case):
    from distillab.data.conversations import question_key

    arguments, prepare, expected = CASES[case]
    if prepare is not None:
        prepare()
    code, out, err = command(*arguments)
    found = [line for line in err.splitlines() if line.startswith("error: ")]
    assert found == ["error: " + expected.replace("q-{key}", question_key("colour 1?"))]
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert not Path("runs/recipe/metrics.jsonl").exists()


@pytest.mark.slow
def test_unknown_lm_eval_task_is_refused_before_training(data, command):
    code, _, err = command(*TRAIN, SET, "evaluate.lm_eval={tasks: [arc_easyy]}")
    assert code == 2
    assert err.splitlines()[-1] == (
        "error: evaluate.lm_eval.tasks: no task named 'arc_easyy'; did you mean 'arc_easy'?"
    )
