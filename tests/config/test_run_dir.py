"""运行目录：被杀留下的清得掉，别人的东西和正在写的不动；写进去的只有一个进程。"""

import logging
import os
import time
from pathlib import Path

import pytest
from filelock import FileLock

from distillab import run
from distillab.cache import build_once
from distillab.config.run_dir import RunDirectory
from distillab.config.schema import Recipe
from distillab.errors import DistillabError
from distillab.files import IDLE_MINUTES, idle
from distillab.synthesize.response_file import ResponseFile

RANDOM = "0123456789ab.tmp"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Recipe.model_validate(
        {"name": "a", "data": {"source": "x"}, "teacher": {"path": "t"}, "student": {"path": "t"}}
    )


def grow_old(path):
    before = time.time() - 60 * IDLE_MINUTES - 60
    os.utime(path, (before, before))


def test_what_interrupted_processes_left_is_swept_once_the_lock_is_held(recipe, caplog):
    caplog.set_level(logging.INFO, "distillab")
    directory = RunDirectory(Path("runs/a"))
    with directory:
        directory.open(recipe, resume=False)
    (directory.path / "metrics.jsonl").touch()
    left = [".recipe.yaml.tmp", ".report.html.tmp", ".summary.json.tmp", "metrics.tmp",
            ".export.1234.partial/model.safetensors", f".summary.json.{RANDOM}",
            f".export.{RANDOM}/model.safetensors", f"checks/.a.jsonl.{RANDOM}",
            f"plots/.loss.png.{RANDOM}"]  # fmt: skip
    kept = [".notes.tmp", "notes.tmp", ".export.old.partial", "mine/.recipe.yaml.tmp",
            ".summary.json.backup.tmp", f".report.html.{RANDOM}",
            f".evaluation.json.{RANDOM}"]  # fmt: skip
    for name in [*left, *kept]:
        (directory.path / name).parent.mkdir(parents=True, exist_ok=True)
        (directory.path / name).write_bytes(b"half")
    with FileLock(directory.path / ".lock"), pytest.raises(DistillabError, match="is in use by"):
        directory.open(recipe, resume=True)
    assert all((directory.path / name).exists() for name in [*left, *kept])
    with directory:
        directory.open(recipe, resume=True)
    assert [name for name in left if (directory.path / Path(name).parts[0]).is_dir()] == left[-2:]
    assert not any((directory.path / name).exists() for name in left)
    assert not (directory.path / f".export.{RANDOM}").exists()
    assert all((directory.path / name).exists() for name in kept)
    assert f".export.{RANDOM}" in caplog.text
    assert "(36 bytes)" in caplog.text
    for name in kept[-2:]:  # 没有锁的：很久没有人写了才算
        grow_old(directory.path / name)
    with directory:
        directory.open(recipe, resume=True)
    assert not any((directory.path / name).exists() for name in kept[-2:])


def test_a_link_is_removed_and_not_what_it_points_to(recipe, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").touch()
    directory = RunDirectory(Path("runs/a"))
    directory.path.mkdir(parents=True)
    (directory.path / f".export.{RANDOM}").symlink_to(tmp_path / "precious")
    with directory:
        directory.open(recipe, resume=False)
    assert not (directory.path / f".export.{RANDOM}").is_symlink()
    assert (tmp_path / "precious/file").exists()


def test_a_directory_is_idle_once_nothing_inside_it_is_written(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").touch()
    grow_old(tmp_path / "a")
    assert not idle(tmp_path / "a")
    grow_old(tmp_path / "a/file")
    assert idle(tmp_path / "a")


def test_an_export_into_a_run_that_is_training_is_refused(recipe, monkeypatch):
    directory = RunDirectory(Path("runs/a"))
    monkeypatch.setattr(run, "find_checkpoint", lambda directory, name: directory / name)
    with directory:
        directory.open(recipe, resume=False)
        with pytest.raises(DistillabError, match="runs/a is in use by another process"):
            run.export("a", "best", None)


def test_half_written_answers_are_swept(tmp_path):
    names = [f".answers.jsonl.{RANDOM}", f".answers.jsonl.provenance.json.{RANDOM}"]
    for name in [*names, f".other.jsonl.{RANDOM}"]:
        (tmp_path / name).touch()
    with ResponseFile(tmp_path / "answers.jsonl"):
        found = {path.name for path in tmp_path.iterdir()}
    assert found == {".answers.jsonl.lock", f".other.jsonl.{RANDOM}"}


def test_half_built_directories_of_any_name_are_swept_from_the_cache(empty_cache):
    things = empty_cache / "things"
    left = [f".key.{RANDOM}", ".key.0123456789ab", f".other.{RANDOM}", ".older.0123456789ab"]
    for name in [*left, f".being-built.{RANDOM}", ".mine"]:
        (things / name).mkdir(parents=True)
    (empty_cache / "locks").mkdir()
    with FileLock(empty_cache / "locks/things-being-built.lock"), build_once(things / "key"):
        pass
    found = {path.name for path in things.iterdir()}
    assert found == {"key", f".being-built.{RANDOM}", ".mine"}
