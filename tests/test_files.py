"""写文件：不跟随符号链接，放不下时说清楚，任何失败都不留下写到一半的东西。"""

import ast
import errno
import os
import re
import resource
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distillab import files
from distillab.errors import DistillabError
from distillab.files import (
    NoRoom,
    append,
    leftovers,
    open_to_append,
    replace_file,
    replacing_directory,
)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def plant_every_name(monkeypatch, directory: Path, victim: Path, target: str) -> None:
    """攻击者猜中了名字：那里已经有一个符号链接。"""
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "0123456789ab")
    (directory / f".{target}.0123456789ab.tmp").symlink_to(victim)


def test_a_planted_link_is_never_written_through(tmp_path, monkeypatch):
    victim, run = tmp_path / "victim", tmp_path / "run"
    victim.write_text("mine")
    run.mkdir()
    for name in (".report.html.tmp", "report.html"):
        (run / name).symlink_to(victim)
    replace_file(run / "report.html", "page")
    assert (run / "report.html").read_text() == "page"
    assert not (run / "report.html").is_symlink()
    plant_every_name(monkeypatch, run, victim, "other")
    with pytest.raises(FileExistsError):
        replace_file(run / "other", "page")
    assert victim.read_text() == "mine"


def test_what_is_changed_in_place_must_not_be_a_link(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    (tmp_path / "log").symlink_to(outside / "file")
    (tmp_path / "nothing").symlink_to(outside / "new")
    (tmp_path / "directory").symlink_to(outside)
    for name in ("log", "nothing"):
        with pytest.raises(DistillabError, match=f"{name} is a symbolic link to .*outside"):
            open_to_append(tmp_path / name)
    with (
        pytest.raises(DistillabError, match="directory is a symbolic link"),
        replacing_directory(tmp_path / "directory"),
    ):
        pass
    assert content(outside) == {"file": b"mine"}


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_are_what_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        replace_file(tmp_path / "file", "text")
        with replacing_directory(tmp_path / "directory") as building:
            save_file({"a": torch.zeros(1)}, building / "model.safetensors")  # 它自己建成 0600
    finally:
        os.umask(before)
    for path in (tmp_path / "file", tmp_path / "directory" / "model.safetensors"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_a_directory_is_replaced_file_by_file_and_others_stay(tmp_path):
    target = tmp_path / "best"
    target.mkdir()
    (target / "old").write_text("old")
    (target / "both").write_text("old")
    with replacing_directory(target) as building:
        (building / "both").write_text("new")
        (building / "new").write_text("new")
    assert content(target) == {"old": b"old", "both": b"new", "new": b"new"}
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("error", [KeyError("bug"), KeyboardInterrupt(), OSError(5, "bad disk")])
def test_any_failure_removes_the_partial_and_passes(tmp_path, error):
    def fail(building: Path) -> None:
        (building / "half").write_text("half")
        raise error

    with pytest.raises(type(error)), replacing_directory(tmp_path / "target") as building:
        fail(building)
    assert list(tmp_path.iterdir()) == []


def test_errors_name_the_target_and_not_the_temporary(tmp_path):
    (tmp_path / "directory").mkdir()
    with pytest.raises(OSError) as caught:
        replace_file(tmp_path / "directory", "text")
    assert caught.value.filename == str(tmp_path / "directory")
    with pytest.raises(FileNotFoundError) as caught:
        replace_file(tmp_path / "none" / "file", "text")
    assert caught.value.filename == str(tmp_path / "none" / "file")


@pytest.fixture
def small_files():
    """单个文件至多 40 KB：与磁盘满了一样，写到一半时失败，而不要 root。"""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_torch(path: Path) -> None:
    torch.save({"a": torch.zeros(50_000)}, path / "optimizer.bin")


def write_safetensors(path: Path) -> None:
    save_file({"a": torch.zeros(50_000)}, path / "model.safetensors")


def write_bytes(path: Path) -> None:
    (path / "optimizer.bin").write_bytes(bytes(50_000))


@pytest.mark.parametrize("write", [write_torch, write_safetensors, write_bytes])
def test_no_room_is_one_line_whichever_library_writes(tmp_path, small_files, write):
    with pytest.raises(NoRoom) as caught, replacing_directory(tmp_path / "step-1") as building:
        write(building)
    error = caught.value
    assert error.errno == errno.EFBIG
    assert "File too large: " in error.strerror
    assert "written" in error.strerror
    assert error.strerror.endswith(" free")
    assert error.filename == str(tmp_path / "step-1")
    assert list(tmp_path.iterdir()) == []


def test_no_room_says_how_much_was_wanted_and_keeps_what_was(tmp_path, small_files):
    replace_file(tmp_path / "file", "old")
    with pytest.raises(NoRoom, match=r"File too large: 0.2 MB to write, [\d,.]+ MB free") as caught:
        replace_file(tmp_path / "file", bytes(200_000))
    assert caught.value.filename == str(tmp_path / "file")
    assert content(tmp_path) == {"file": b"old"}
    with pytest.raises(NoRoom, match=r"50\.0 MB to write"), \
            replacing_directory(tmp_path / "directory", 50_000_000) as building:  # fmt: skip
        write_safetensors(building)
    assert content(tmp_path) == {"file": b"old"}


def test_half_a_line_is_taken_back(tmp_path, small_files):
    with open_to_append(tmp_path / "log") as file:
        append(file, b"first\n")
        with pytest.raises(NoRoom, match="50,000 bytes to write") as caught:
            append(file, b"x" * 50_000)
        assert caught.value.filename == str(tmp_path / "log")
        append(file, b"second\n")
    assert content(tmp_path) == {"log": b"first\nsecond\n"}


def test_leftovers_are_known_by_name(tmp_path):
    ours = [files.temporary_beside(tmp_path / name) for name in ("one", "长" * 80, "a.tmp")]
    for path in ours:
        path.write_text("")
    for name in ("one", ".one.tmp", ".one.0123456789ab", "one.0123456789ab.tmp", ".lock"):
        (tmp_path / name).write_text("")
    assert leftovers(tmp_path) == sorted(ours)
    assert leftovers(tmp_path, "one") == ours[:1]
    assert leftovers(tmp_path / "none") == []


WRITERS = {"write_text", "write_bytes", "save_to_disk", "save_pretrained", "save_file", "save",
           "savefig", "copytree", "copyfile", "extractall", "export_chrome_trace",
           "save_accelerator_state", "mkstemp", "symlink_to"}  # fmt: skip
INTO_A_NEW_DIRECTORY = {
    "cache: _record", "checkpoint: save_checkpoint", "checkpoint: save_best",
    "checkpoint_files: seal", "convert: export_student", "convert: _write_model",
    "convert: _write_pretrained", "convert: _write_tokenizer", "convert: _update_json",
    "chunks: write_chunks", "pretrained: resolve_gguf_tokenizer", "pretrained: _converted_gguf",
    "profiling: finish", "qwen_ranks: _write_tokenizer", "sources: _download_and_unpack",
    "sources: _unzip", "streams: build", "initial: _measured", "initial: _measured_widths",
    "student_vocabulary: student_vocabulary", "student_vocabulary: copy_to", "trimming: write",
    "token_counts: count_articles",
}  # fmt: skip
"""它们写进 ``replacing_directory``、``build_once`` 或检查点的、名字随机的新目录。"""
TO_MEMORY = {"curves: _png"}


def writes(node: ast.Call) -> bool:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
    given = [*node.args, *(keyword.value for keyword in node.keywords)]
    words = [word.value for word in given if isinstance(word, ast.Constant)]
    opens = any(isinstance(word, str) and re.fullmatch(r"[wax]b?\+?|rb?\+", word) for word in words)
    copies = ast.unparse(node.func) == "shutil.copy"
    return copies or name in WRITERS or (name == "open" and opens)


def test_nothing_is_written_but_through_this_module_or_into_a_new_directory():
    found = set()
    for path in Path(files.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for top in tree.body:
            for function in top.body if isinstance(top, ast.ClassDef) else [top]:
                if any(isinstance(node, ast.Call) and writes(node) for node in ast.walk(function)):
                    found.add(f"{path.stem}: {getattr(function, 'name', 'module')}")
    assert found - {"console: outlive_terminal"} == (
        INTO_A_NEW_DIRECTORY | TO_MEMORY
        | {"files: replace_file", "files: open_to_append", "files: _probe"}
    )  # fmt: skip
