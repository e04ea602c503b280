"""改坏的输入曾经露出 traceback 的样子，每一种都该是一行。"""

import json
import subprocess
import sys
from pathlib import Path

import families
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from report_runs import write_run

from distillab.data.articles import read_files
from distillab.errors import DistillabError, foreign
from distillab.export.convert import from_hf
from distillab.models.interface import PretrainedLM
from distillab.models.pretrained import load_pretrained
from distillab.models.tokenizer import load_tokenizer
from distillab.plan.shapes import find_shape
from distillab.report.page import write_report
from distillab.report.run_data import read_run


def changed(path: Path, *keys_and_value) -> None:
    """改掉 JSON 文件里的一处；``...`` 为删去。"""
    *keys, value = keys_and_value
    whole = json.loads(path.read_text())
    inner = whole
    for key in keys[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    path.write_text(json.dumps(whole))


def at_most_one_line(call, *arguments) -> None:
    """读得了也罢，读不了就是一行。"""
    try:
        call(*arguments)
    except DistillabError as error:
        if "\n" in str(error):
            raise AssertionError(f"several lines: {error}") from error


def one_line(call, *arguments) -> str:
    with pytest.raises(DistillabError) as error:
        call(*arguments)
    said = str(error.value)
    assert said
    assert "\n" not in said
    return said


def test_whatever_foreign_code_raises_is_one_line_but_stopping_is_stopping():
    class RustPanic(BaseException):
        pass

    for error in (KeyError("k"), RecursionError(), RustPanic("at line 3\nof it"), MemoryError()):
        with (
            pytest.raises(DistillabError, match=r"^cannot read it: .") as found,
            foreign("cannot read it"),
        ):
            raise error
        assert found.value.__cause__ is error
        assert "\n" not in str(found.value)
    for stop in (KeyboardInterrupt(), SystemExit(3), DistillabError("said already")):
        with pytest.raises(type(stop)) as found, foreign("cannot read it"):
            raise stop
        assert found.value is stop


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return families.build("llama3", tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture
def model_dir(llama, tmp_path):
    """可以改坏的一份；权重是链接。"""
    target = tmp_path / "model"
    target.mkdir()
    for file in llama.iterdir():
        if file.suffix == ".safetensors":
            (target / file.name).symlink_to(file)
        else:
            (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["hidden_act"], "no such"),
        (["num_attention_heads"], 0),
        (["num_attention_heads"], 3),
        (["hidden_size"], "x"),
        (["num_hidden_layers"], 10**9),
        (["rope_parameters"], {"rope_type": "no such"}),
        (["rope_parameters"], [[]]),
        (["vocab_size"], None),
        (["model_type"], {"a": 1}),
        (["architectures"], ...),
        (["model_type"], ...),
    ],
)
def test_a_damaged_config_is_one_line(model_dir, keys, value):
    changed(model_dir / "config.json", *keys, value)
    for read in (forward, find_shape, from_hf):
        at_most_one_line(read, str(model_dir))


def forward(directory: str) -> None:
    model = PretrainedLM(load_pretrained(directory, dtype=torch.float32))
    model.logits(model(torch.tensor([[1, 2]])))


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[" * 5000, b"\xff\xfe", b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_a_config_that_is_no_object_is_one_line(model_dir, content):
    (model_dir / "config.json").write_bytes(content)
    assert "config.json" in one_line(find_shape, str(model_dir))
    one_line(lambda: load_pretrained(str(model_dir), dtype=torch.float32))


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["model", "merges"], [["a"]]),
        (["model", "vocab"], {"a": -1}),
        (["model", "type"], "no such"),
        (["pre_tokenizer"], {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}),
        (["added_tokens", 0, "id"], 10**9),
        (["model", "vocab"], {}),
        (["model", "vocab", "a"], 10**9),
        (["model"], None),
    ],
)
def test_a_damaged_tokenizer_is_one_line(model_dir, keys, value):
    changed(model_dir / "tokenizer.json", *keys, value)
    at_most_one_line(load_tokenizer, str(model_dir))


@pytest.mark.parametrize(
    ("file", "keys", "value"),
    [
        ("summary.json", ["teacher"], None),
        ("summary.json", ["student_after", "perplexity"], "low"),
        ("summary.json", ["tasks", "arithmetic"], [1]),
        ("summary.json", ["tokens"], [[100]]),
        ("evaluation.json", ["texts", "validation", "models"], None),
        ("evaluation.json", ["texts", "validation", "models", "teacher", "perplexity", "low"], ...),
        ("evaluation.json", ["tasks", "arithmetic", "items"], ...),
        ("evaluation.json", ["tasks", "arithmetic", "differences", 0, "models"], [{}, {}]),
        ("evaluation.json", ["agreement", "validation", "student_after", "by_position", 0], "x"),
        ("evaluation.json", ["models", "teacher"], None),
        ("evaluation.json", ["samples", 0, "prompt"], {"a": 1}),
    ],
)
def test_a_damaged_file_of_a_run_is_named_with_its_key(tmp_path, file, keys, value):
    run = write_run(tmp_path / "run", evaluated=True)
    changed(run / file, *keys, value)
    said = one_line(write_report, [run], None)
    assert said.startswith(f"{run / file}: "), said
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("samples.jsonl", b'{"prompt": ["a"]}'),
        ("checks/arithmetic.teacher.jsonl", b'{"id": {}, "response": "a", "correct": true}'),
        ("recipe.yaml", b"\nloss: x"),
        ("recipe.yaml", b"\xe8"),
    ],
)
def test_a_damaged_line_of_a_run_is_named(tmp_path, file, line):
    run = write_run(tmp_path / "run")
    with (run / file).open("ab") as lines:
        lines.write(b"\n" + line + b"\n")
    said = one_line(write_report, [run], None)
    assert said.startswith(f"{run / file}"), said


def test_unreadable_lines_of_metrics_are_passed_over(tmp_path):
    run = write_run(tmp_path / "run")
    before = read_run(run).rows
    with (run / "metrics.jsonl").open("ab") as lines:
        lines.write(b'{"kind": "train", "step": "10"}\n[1]\n\xff\n{"kind": "train", "step": 9}\n')
    assert read_run(run).rows == before


def test_numbers_beyond_a_float_are_no_numbers(tmp_path):
    run = write_run(tmp_path / "run", evaluated=True)
    changed(run / "summary.json", "student_after", "perplexity", 10**400)
    page, _ = write_report([run], None)
    assert page.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("deep.jsonl", b'{"text": ' + b"[" * 200 + b"]" * 200 + b"}"),
        ("deep.json", b"[" * 100_000),
        ("digits.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}"),
        ("surrogate.jsonl", b'{"text": "\\ud800"}'),
    ],
)
def test_rows_nested_or_long_beyond_reason_are_one_line(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert name in one_line(lambda: list(read_files([path], "text")))


def test_a_parquet_cell_that_is_not_utf8_is_one_line(tmp_path):
    path = tmp_path / "rows.parquet"
    cells = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    )
    pq.write_table(pa.table({"text": cells}), path)
    assert "rows.parquet" in one_line(lambda: list(read_files([path], "text")))


def test_without_a_home_a_path_that_needs_one_says_so(monkeypatch):
    code = (
        "import sys; from distillab.cache import expanded\n"
        "try: expanded('~nobody-of-this-name/x')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("DistillabError ~nobody-of-this-name/x: where is '~'? Set HOME")
