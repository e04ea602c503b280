"""缓存由一个进程建好，同时要它的别的进程等着；建的进程被杀，坏的与锁都不留下。"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distillab import cache
from distillab.cache import build_once
from distillab.data.chunks import WikiDataset
from distillab.errors import DistillabError
from distillab.models.pretrained import resolve_model

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
    assert outputs == ["['.contents.json', 'half', 'whole']\n"] * 2  # 第二个没有再建
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
    assert rest == ["building", "['.contents.json', 'half', 'whole']"]
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


def build(target: Path) -> bool:
    """建一个有两个文件的目录；返回是否真的建了。"""
    with build_once(target) as building:
        if building is not None:
            (building / "train").mkdir()
            (building / "train" / "data.arrow").write_bytes(bytes(1000))
            (building / "info.json").write_text("{}")
    return building is not None


def flip(path: Path) -> None:
    """翻一个比特；大小与 mtime 都不变。"""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


DAMAGE = {
    "a flipped bit": lambda d: flip(d / "train" / "data.arrow"),
    "a truncated file": lambda d: os.truncate(d / "info.json", 1),
    "an emptied file": lambda d: os.truncate(d / "train" / "data.arrow", 0),
    "a missing file": lambda d: (d / "train" / "data.arrow").unlink(),
    "a missing record": lambda d: (d / ".contents.json").unlink(),
    "a flipped record": lambda d: flip(d / ".contents.json"),
    "a record that is no object": lambda d: (d / ".contents.json").write_text("[1]"),
    "a record of an endless size": lambda d: (d / ".contents.json").write_text(
        '{"info.json": [Infinity, "0"]}'
    ),
    "a record of another shape": lambda d: (d / ".contents.json").write_text('{"info.json": 1}'),
}


@pytest.mark.parametrize("always_read", [cache._ALWAYS_READ, 0], ids=["small", "large"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_cache_is_built_again_with_one_line(
    empty_cache, monkeypatch, caplog, damage, always_read
):
    monkeypatch.setattr(cache, "_ALWAYS_READ", always_read)
    target = empty_cache / "things" / "key"
    assert build(target)
    assert not build(target)
    damage(target)
    assert build(target)
    (line,) = caplog.messages
    assert line.startswith(f"{target}: damaged cache, building it again: ")
    assert (target / "train" / "data.arrow").read_bytes() == bytes(1000)
    assert not build(target)
    assert hidden(empty_cache) == []


def test_a_large_cache_is_read_whole_only_after_it_was_touched(empty_cache, monkeypatch):
    target, read = empty_cache / "things" / "key", []
    build(target)
    digest = cache.file_sha256
    monkeypatch.setattr(cache, "_ALWAYS_READ", 0)
    monkeypatch.setattr(cache, "file_sha256", lambda path: read.append(path.name) or digest(path))
    assert not build(target)
    assert sorted(read) == ["data.arrow", "info.json"]
    assert not build(target)
    assert len(read) == 2
    (target / "info.json").touch()
    assert not build(target)
    assert len(read) == 4


def test_what_was_built_is_on_disk_before_its_name_is(empty_cache, monkeypatch):
    synced = []
    monkeypatch.setattr("distillab.files.os.fsync", lambda handle: synced.append(
        Path(f"/proc/self/fd/{handle}").readlink().name))  # fmt: skip
    target = empty_cache / "things" / "key"
    build(target)
    assert {"data.arrow", "info.json", ".contents.json", "train", "things"} <= set(synced)


def test_a_damaged_token_cache_gives_the_same_tokens_again(
    tmp_path, tiny_tokenizer, empty_cache, caplog
):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(f'{{"text": "the teacher gives {n}"}}\n' for n in range(60)))
    whole, _ = WikiDataset.build(str(text), tiny_tokenizer, max_seq_len=16)
    rows = [whole[index]["input_ids"].tolist() for index in range(len(whole))]
    (arrow,) = (empty_cache / "datasets").glob("*/train/*.arrow")
    flip(arrow)
    again, _ = WikiDataset.build(str(text), tiny_tokenizer, max_seq_len=16)
    assert [again[index]["input_ids"].tolist() for index in range(len(again))] == rows
    assert caplog.text.count("damaged cache") == 1


def test_a_damaged_conversion_of_a_gguf_is_not_used(tmp_path, empty_cache, monkeypatch):
    model = empty_cache / "gguf" / "key"
    build(model)
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    monkeypatch.setattr("distillab.models.pretrained._gguf_dir", lambda path: model)
    assert resolve_model(str(gguf)) == model
    flip(model / "train" / "data.arrow")
    with pytest.raises(DistillabError, match="is not a GGUF file"):  # 要重新转换
        resolve_model(str(gguf))


TOKENISE = """
import sys, time
import distillab.data.chunks as data
from distillab.models.tokenizer import load_tokenizer
written = data.write_chunks
def counted(*arguments):
    print("tokenising", flush=True)
    time.sleep(1)
    return written(*arguments)
data.write_chunks = counted
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
