"""训练走完之后的每两步之间被杀、每个结果文件损坏：再来一次，一样也不少，数也相同。"""

import json
import logging
import shutil
from pathlib import Path

import pytest
from test_invariance import taught as taught

import distillab.run as runs
from distillab.config.recipes import load_recipe
from distillab.config.run_dir import RunDirectory
from distillab.errors import DistillabError
from distillab.evaluate.checks import Checks
from distillab.report.page import write_report
from distillab.run_file_shapes import read_metrics
from distillab.terminal import print_samples
from distillab.train import checkpoint_files

STEPS = [(runs, "_load_best"), (Checks, "measure"), (runs, "sample_prompts"), (runs.shutil, "rmtree"),
         (runs, "export_student"), (runs, "plot_run"), (runs, "_report"),
         (RunDirectory, "write_summary")]  # fmt: skip
MEASURED_ANEW = {"name", "seconds", "tokens_per_second", "peak_memory_bytes"}
RUN = Path("runs/parts")


class Killed(BaseException):
    """进程在这里没了。"""


@pytest.fixture
def recipe(taught):
    with Path("recipe.yaml").open("a") as file:
        file.write(
            "evaluate:\n"
            "  prompts: ['what is 3?']\n"
            "  max_new_tokens: 4\n"
            "  tasks: {colours: {source: plain.jsonl, teacher_source: knowing.jsonl,\n"
            "                    match: {regex: '.'}, max_new_tokens: 2}}\n"
            "  texts: {words: {source: text.jsonl, max_seq_len: 16, max_sequences: 8}}\n"
        )
    return lambda name: load_recipe("recipe.yaml", [f"name={name}", "train.save_interval=2"])


def same(summary):
    return {key: value for key, value in summary.items() if key not in MEASURED_ANEW}


def files(run):
    return {path.relative_to(run) for path in run.rglob("*") if path.is_file()}


def killed(patch, owner, name, after):
    act = getattr(owner, name)

    def call(*arguments, **options):
        if name == "measure" and arguments[1] == "student_before":
            return act(*arguments, **options)
        if after:
            act(*arguments, **options)
        raise Killed

    patch.setattr(owner, name, call)


@pytest.mark.slow
def test_a_kill_between_any_two_steps_of_the_end_leaves_nothing_out(recipe, monkeypatch):
    whole, expected = runs.train(recipe("whole"))
    for owner, name in STEPS:
        for after in (False, True):
            with monkeypatch.context() as patch:
                killed(patch, owner, name, after)
                with pytest.raises(Killed):
                    runs.train(recipe("parts"), resume=True)
            said_complete = RunDirectory(RUN).summary is not None
            assert said_complete == (name == "write_summary" and after), name
    found = runs.train(recipe("parts"), resume=True)[1]
    assert same(found) == same(expected)
    assert files(RUN) == files(whole.path)
    for name in ("samples.jsonl", "export/model.safetensors", "checks/colours.teacher.jsonl"):
        assert (RUN / name).read_bytes() == (whole.path / name).read_bytes()
    assert "complete" in (RUN / "report.html").read_text()


def test_damaged_results_are_made_anew_or_named_in_one_line(recipe, caplog, capsys):
    run, expected = runs.train(recipe("parts"))
    for text in ("", "{", "[]", "{}", json.dumps(expected | {"student_after": None}), "[" * 99999):
        run.summary_file.write_text(text)
        assert run.summary is None
    names = ("words.student_before.json", "words.student_after.json",
             "colours.teacher.jsonl", "colours.student_after.jsonl")  # fmt: skip
    before = [(run.checks / name).read_bytes() for name in names]
    for damage in (lambda content: content[:-9], lambda _: b"\xff", lambda _: b"[]\n{}\n"):
        for name, content in zip(names, before, strict=True):
            (run.checks / name).write_bytes(damage(content))
        run.summary_file.write_text("{")
        caplog.clear()
        assert same(runs.train(recipe("parts"), resume=True)[1]) == same(expected)
        assert "summary.json is not a summary: moved to" in caplog.text
        for name, content in zip(names, before, strict=True):
            assert f"{name} cannot be read: measured again" in caplog.text
            assert (run.checks / name).read_bytes() == content
    run.report.unlink()
    runs.train(recipe("parts"), resume=True)
    assert run.report.exists()
    run.samples_file.write_bytes(b'{"prompt": "a", "student": "b"}\n{"prompt"\n[1]\n\xff\n')
    capsys.readouterr()
    print_samples(run.samples_file)
    out, err = capsys.readouterr()
    assert out == "> ab\n\n"
    assert err == "".join(f"{run.samples_file}:{line} is not a sample\n" for line in (2, 3, 4))
    run.evaluation_file.write_text("{")
    with pytest.raises(DistillabError, match=r"evaluation.json: not valid JSON"):
        write_report([run.path])


def test_a_damaged_best_is_replaced_by_the_last_step_and_says_so(recipe, caplog):
    caplog.set_level(logging.WARNING)
    run, before = runs.train(recipe("parts"))
    for number, damage in enumerate(("model.safetensors", "trainer_state.json", None)):
        best = run.path / "checkpoints/best"
        shutil.rmtree(best) if damage is None else (best / damage).write_bytes(b"")
        run.summary_file.unlink()
        caplog.clear()
        found = runs.train(recipe("parts"), resume=True)[1]
        assert "the last step takes its place" in caplog.text
        assert found["best_step"] == found["steps"]
        assert same(found) == same(before | {"best_step": found["steps"]})
        assert checkpoint_files.read_saved(best).state.current_step == found["steps"]
        aside = [best.with_name(f"damaged-best{end}") for end in ("", "-2")][: number + 1]
        assert all(path.is_dir() for path in aside)


def test_figures_lost_from_the_metrics_are_measured_again(recipe, caplog):
    run, expected = runs.train(recipe("parts"))
    lines = run.metrics_file.read_bytes().splitlines(keepends=True)
    kinds = [row["kind"] for row in read_metrics(run.metrics_file)]
    assert (kinds[:2], kinds[-1]) == (["reference"] * 2, "validation")
    for damage in (
        b"".join(lines[1:]),
        b"".join([lines[0][:20] + b"\n", *lines[1:]]),
        b"".join(lines[:-1]),
        b"".join(lines).replace(b"tokens", b"tokuns").replace(b"cross_", b"crozs_"),
        b"".join(lines).replace(b"top1_", b"top2_"),
        b"".join([*lines[:3], b"\xff\xfe\n", b"[3]\n", b'{"kind": "train"}\n', *lines[3:]]),
        b"",
    ):
        run.metrics_file.write_bytes(damage)
        run.summary_file.unlink()
        caplog.clear()
        assert same(runs.train(recipe("parts"), resume=True)[1]) == same(expected)
        assert "metrics.jsonl: not as it was when step 4 was saved" in caplog.text
