"""记录与结果表：只抄小文件，没走完的拒绝，表由记录得出，不全的块原样不动。"""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distillab.config.recipes import dump_recipe, load_recipe

ROOT = Path(__file__).parents[1]
METHODS = ("seqkd", "skd", "gkd")
PAGE = "# x\n\n<!-- results: demo -->\n\nby hand\n\n<!-- /results -->\n\nafter\n"


def python(*arguments):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def project(tmp_path):
    """只有脚本与一页 README 的项目。"""
    for name in ("results/record.py", "results/tables.py", "benchmarks/markdown_table.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "README.md").write_text(PAGE)
    (tmp_path / "README.zh-CN.md").write_text(PAGE)
    return tmp_path


def command_of(method, seed):
    if method == "skd-gkd":
        return (f"distillab train experience/demo-gkd --set name=skd-gkd-{seed} "
                f"--set train.seed={seed} --set student.path=runs/skd-{seed}/export")  # fmt: skip
    return (f"distillab train experience/demo-{method} --set name={method}-{seed} "
            f"--set train.seed={seed}")  # fmt: skip


def make_run(place, method="seqkd", seed=0, after=0.75, before=0.25):
    """一次走完的运行留下的文件，大的也有。"""
    run = place / "runs" / f"{method}-{seed}"
    (run / "checkpoints/best").mkdir(parents=True)
    (run / "checkpoints/best/model.safetensors").write_bytes(b"large")
    (run / "checks").mkdir()
    (run / "checks/handbook.teacher.jsonl").write_text("{}\n")
    words = command_of(method, seed).split()
    sets = [value for flag, value in itertools.pairwise(words) if flag == "--set"]
    (run / "recipe.yaml").write_text(dump_recipe(load_recipe(words[2], sets)))
    (run / "metrics.jsonl").write_text(
        json.dumps({"kind": "train", "step": 4, "tokens": 40}) + "\n"
    )
    (run / "environment.json").write_text(json.dumps({
        "python": "3.11", "distillab": "0.1.0", "packages": {"torch": "2.13", "transformers": "5"},
        "device": "cpu", "devices": 0, "cpu_threads": 1, "git": "abc", "git_dirty": False,
    }))  # fmt: skip
    scores = {"teacher": 0.65, "student_before": before, "student_after": after}
    (run / "summary.json").write_text(json.dumps({
        "name": run.name, "steps": 4, "seconds": 60.0 * (seed + 1),
        "tasks": {"handbook": scores, "unrelated": {**scores, "teacher": before}},
        "texts": {"wikipedia": {"teacher": 19.4, "student_before": 19.4, "student_after": 30.0}},
    }))  # fmt: skip
    return run


def record(project, run, command, *more):
    return python(project / "results/record.py", run, "--command", command, *more)


def record_all(project, **changes):
    for method in (*METHODS, "skd-gkd"):
        for seed in range(3):
            after = 0.45 + 0.1 * seed
            run = make_run(project, method, seed, after, before=changes.get(method, 0.25))
            assert record(project, run, command_of(method, seed), "--machine", "box")[0] == 0


def test_a_record_holds_the_small_files_and_where_they_come_from(project):
    run = make_run(project)
    code, out, err = record(project, run, command_of("seqkd", 0), "--machine", "2 cores of a box")
    assert code == 0, err
    made = project / "results/seqkd-0"
    assert out == f"{made}\n"
    files = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
    assert files == {"recipe.yaml", "metrics.jsonl", "summary.json", "environment.json",
                     "checks/handbook.teacher.jsonl", "record.json"}  # fmt: skip
    content = json.loads((made / "record.json").read_text())
    assert content["command"] == command_of("seqkd", 0)
    assert content["machine"] == "2 cores of a box"
    assert content["versions"]["torch"] == "2.13"
    assert {path.name for path in (project / "results").iterdir()} == {
        "record.py", "tables.py", "seqkd-0",
    }  # fmt: skip


def test_the_machine_is_read_where_it_is_not_told(project):
    assert record(project, make_run(project), command_of("seqkd", 0))[0] == 0
    content = json.loads((project / "results/seqkd-0/record.json").read_text())
    assert content["machine"].startswith("1 thread on ")


@pytest.mark.parametrize("part", ["summary.json", "metrics.jsonl", "recipe.yaml"])
def test_a_run_that_is_not_complete_is_refused_and_nothing_is_written(project, part):
    run = make_run(project)
    (run / part).unlink()
    code, _, err = record(project, run, command_of("seqkd", 0))
    assert (code, err) == (2, f"error: {run}: not a complete run: {part} is missing\n")
    assert not (project / "results/seqkd-0").exists()


def test_metrics_that_end_early_are_refused(project):
    run = make_run(project)
    (run / "metrics.jsonl").write_text(
        json.dumps({"kind": "train", "step": 3, "tokens": 30}) + "\n"
    )
    code, _, err = record(project, run, command_of("seqkd", 0))
    assert code == 2
    assert err.endswith("metrics.jsonl ends at step 3, expected 4\n")


def test_a_command_of_another_run_is_refused(project):
    code, _, err = record(project, make_run(project), command_of("seqkd", 1))
    assert code == 2
    assert "gives name='seqkd-1', but the run has 'seqkd-0'" in err


def test_blocks_stay_as_they_are_until_every_record_is_there(project):
    assert python(project / "results/tables.py", "--check")[0] == 0
    record(project, make_run(project), command_of("seqkd", 0))
    assert python(project / "results/tables.py")[0] == 0
    assert (project / "README.md").read_text() == PAGE


def test_tables_hold_means_and_ranges_of_the_records(project):
    record_all(project)
    code, out, _ = python(project / "results/tables.py", "--check")
    assert code == 1
    assert "README.md: out of date" in out
    assert (project / "README.md").read_text() == PAGE
    assert python(project / "results/tables.py")[0] == 0
    english = (project / "README.md").read_text()
    chinese = (project / "README.zh-CN.md").read_text()
    for text, name in ((english, "SKD, then GKD"), (chinese, "先 SKD 再 GKD")):
        assert text.startswith("# x\n\n<!-- results: demo -->\n\n| ")
        assert text.endswith("```\n\n<!-- /results -->\n\nafter\n")
        assert "by hand" not in text
        assert "| SeqKD | 55.0 % (45.0 - 65.0 %) | 75 % (50 - 100 %) |" in text
        assert f"| {name} |" in text
        assert "box" in text
        assert "torch 2.13" in text
        assert command_of("gkd", 0) in text
    assert "| 2 (1 - 3) min |" in english
    assert "| 4 (2 - 6) min |" in english  # 先 SKD 再 GKD：两段的用时
    assert python(project / "results/tables.py", "--check")[0] == 0


def test_records_that_do_not_start_from_the_same_student_are_refused(project):
    record_all(project, gkd=0.3)
    code, _, err = python(project / "results/tables.py")
    assert code == 1
    assert err.startswith("error: handbook: runs disagree on student_before")


def test_an_unknown_table_is_named(project):
    (project / "README.md").write_text(PAGE.replace("demo", "dmeo"))
    code, _, err = python(project / "results/tables.py", "--check")
    assert (code, err) == (1, "error: no table is named dmeo; choose from demo, quickstart\n")


def test_the_pages_of_this_repository_are_up_to_date():
    code, out, err = python(ROOT / "results/tables.py", "--check")
    assert (code, out, err) == (0, "", "")
