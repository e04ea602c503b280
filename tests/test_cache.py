"""缓存由一个进程建好，同时要它的别的进程等着；建的进程被杀，坏的与锁都不留下。"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distillab.cache import build_once
from distillab.errors import DistillabError

BUILD = """
import logging, sys, time
from pathlib import Path
from distillab.cache import build_once
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
target, seconds = Path(sys.argv[1]), float(sys.argv[2])
with build_once(target) as building:
    if building is not None:
        print("building", flush=True)
        (building / "half").write_text("half")
        time.sleep(seconds)
        (building / "whole").write_text("whole")
print(sorted(path.name for path in target.iterdir()), flush=True)
"""


@pytest.fixture
def start(empty_cache):
    begun = []

    def start(seconds: float) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", BUILD, str(empty_cache / "things" / "key"), str(seconds)],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        begun.append(process)
        return process

    yield start
    for process in begun:
        process.kill()
        process.communicate()


def hidden(cache: Path) -> list[Path]:
    return list((cache / "things").glob(".*"))


def test_one_process_builds_while_the_other_waits(start, empty_cache):
    first = start(2)
    assert first.stdout.readline() == "building\n"
    second = start(0)
    assert second.stdout.readline().startswith("waiting for another process to build ")
    outputs = [process.communicate(timeout=120)[0] for process in (first, second)]
    assert outputs == ["['half', 'whole']\n"] * 2  # 第二个没有再建
    assert hidden(empty_cache) == []


def test_a_killed_builder_leaves_neither_a_lock_nor_half_a_result(start, empty_cache):
    first = start(600)
    assert first.stdout.readline() == "building\n"
    second = start(0)
    assert second.stdout.readline().startswith("waiting")
    assert len(hidden(empty_cache)) == 1
    os.kill(first.pid, signal.SIGKILL)
    swept, *rest = second.communicate(timeout=120)[0].splitlines()
    assert swept.startswith("removed what interrupted processes left: ")
    assert rest == ["building", "['half', 'whole']"]
    assert hidden(empty_cache) == []


def test_an_error_while_building_lets_the_next_one_build(empty_cache):
    target = empty_cache / "things" / "key"
    with pytest.raises(KeyError), build_once(target) as building:
        raise KeyError if building else AssertionError
    assert not target.exists()
    with build_once(target) as building:
        assert building is not None
    with build_once(target) as building:
        assert building is None


def test_a_cache_that_cannot_be_locked_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DISTILLAB_CACHE", str(tmp_path / "file"))
    message = "set DISTILLAB_CACHE to a writable directory"
    with pytest.raises(DistillabError, match=message), build_once(tmp_path / "file/things/key"):
        pass


TOKENISE = """
import sys, time
import distillab.data as data
from distillab.tokenizer import load_tokenizer
joined = data.joined_ids
def counted(*arguments):
    print("tokenising", flush=True)
    time.sleep(1)
    return joined(*arguments)
data.joined_ids = counted
train, _ = data.WikiDataset.build(sys.argv[1], load_tokenizer(sys.argv[2]), max_seq_len=16)
print(train.fingerprint, len(train), flush=True)
"""


@pytest.mark.slow
def test_two_processes_tokenise_a_corpus_once(tmp_path, tiny_tokenizer, empty_cache):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(f'{{"text": "the teacher gives {n}"}}\n' for n in range(60)))
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    command = [sys.executable, "-c", TOKENISE, str(text), str(tmp_path / "tokenizer")]
    begun = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    lines = [process.communicate(timeout=240)[0].splitlines() for process in begun]
    assert [process.returncode for process in begun] == [0, 0]
    assert sum(line == "tokenising" for part in lines for line in part) == 2  # 训练集与验证集各一次
    assert lines[0][-1] == lines[1][-1]
