"""回答文件：断在任何一个字节都接得上，来历不同就不接。"""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kept_rows import kept_rows

from distillab.data.responses import read_rows
from distillab.errors import DistillabError
from distillab.synthesize import response_file
from distillab.synthesize.response_file import ResponseFile

SOURCE = {"created": "then", "sampling": {"temperature": 0.0, "top_p": None}, "filter": None}


def row(number, response="yes", kept=True):
    return {"id": f"t{number}", "sample": 0, "response": response, "kept": kept}


def write(path: Path, rows, source=SOURCE):
    with ResponseFile(path) as file:
        before = file.resume(source)
        file.append(rows)
    return before


# 每条都跨行、跨字节：换行与 U+2028 在文字里，落单的 surrogate 写不成 UTF-8。
TEXTS = ["北京。", "a\nb\u2028c\x85", "", "\ud800 lone", "plain"]


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_file_cut_at_any_byte_is_continued_without_loss_or_repetition(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("cut") / "r.jsonl"
    rows = [row(number, text) for number, text in enumerate(TEXTS)]
    write(path, rows)
    whole = path.read_bytes()
    size = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:size])
    complete = whole[:size].count(b"\n")
    # 只差换行的一行读得懂；接着做时仍然重写它，换行才不会少。
    readable = complete + (whole[size : size + 1] == b"\n")
    assert kept_rows(path) == rows[:readable]
    before = write(path, rows[complete:])
    assert before == rows[:complete]
    assert path.read_bytes() == whole


@settings(deadline=None, max_examples=60)
@given(text=st.text(st.characters(exclude_categories=[]), max_size=20))
def test_any_text_comes_back_as_it_was(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "r.jsonl"
    write(path, [row(0, text), row(1)])
    assert kept_rows(path) == [row(0, text), row(1)]
    assert path.read_bytes().decode("utf-8").count("\n") == 2


def test_only_kept_responses_are_read(tmp_path):
    path = tmp_path / "r.jsonl"
    write(path, [row(0), row(1, kept=False), row(2, kept=None), row(3)])
    assert [r["id"] for r in kept_rows(path)] == ["t0", "t3"]


def test_missing_file_names_the_command_that_writes_it(tmp_path):
    with pytest.raises(DistillabError, match="no such file; write it with: distillab synthesize"):
        kept_rows(tmp_path / "none.jsonl")


@pytest.mark.parametrize("line", ["{broken", "[1]", '{"id": "x"}'])
def test_damage_before_the_last_line_is_reported_with_its_line(tmp_path, line):
    path = tmp_path / "r.jsonl"
    write(path, [row(0)])
    with path.open("a") as file:
        file.write(f"{line}\n{json.dumps(row(2))}\n")
    with pytest.raises(DistillabError, match="line 2 is not a response"):
        kept_rows(path)
    before = path.read_bytes()
    with pytest.raises(DistillabError, match="line 2 is not a response"):
        write(path, [])
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["my notes, no newline", json.dumps(row(0)) + "\n"])
def test_file_of_another_origin_is_left_alone(tmp_path, content):
    path = tmp_path / "r.jsonl"
    path.write_text(content)
    with pytest.raises(DistillabError, match="distillab synthesize did not write it"):
        write(path, [row(1)])
    assert path.read_text() == content


def test_provenance_is_there_before_the_first_row_and_stays(tmp_path):
    path = tmp_path / "deep" / "er" / "r.jsonl"
    with ResponseFile(path) as file:
        assert file.resume(SOURCE) == []
        assert not path.exists()
        assert json.loads(file.sidecar.read_text()) == SOURCE
        assert file.sidecar.name == "r.jsonl.provenance.json"
    write(path, [row(0)], SOURCE | {"created": "later"})  # 还没有行：重写来历
    write(path, [row(1)], SOURCE | {"created": "even later"})
    assert json.loads(file.sidecar.read_text())["created"] == "later"
    assert len(kept_rows(path)) == 2


def test_other_provenance_is_refused_in_one_line_that_names_the_keys(tmp_path):
    path = tmp_path / "r.jsonl"
    write(path, [row(0)])
    other = {"created": "now", "sampling": {"temperature": 0.7, "top_p": None}, "model": "m",
             "recipe": "abc", "versions": {"torch": "9"}, "backend": {"base_url": "http://x"}}  # fmt: skip
    with pytest.raises(DistillabError) as caught:
        write(path, [row(1)], other)
    assert str(caught.value) == (
        f'{path} was begun with other settings: model (was null, is now "m"), '
        f"sampling.temperature (was 0.0, is now 0.7); restore them, or name another file with "
        f"synthesize.output"
    )
    assert len(kept_rows(path)) == 1


def test_a_key_in_an_old_sidecar_is_neither_repeated_nor_kept(tmp_path):
    path, key = tmp_path / "r.jsonl", "sk-0123456789abcdef"
    old = SOURCE | {"backend": {"extra_body": {"user": key}}, "filter": "old"}
    write(path, [row(0)], old)
    with pytest.raises(DistillabError, match=r"backend\.extra_body") as caught:
        write(path, [row(1)], SOURCE | {"backend": {"extra_body": {}}})
    assert key not in str(caught.value)
    with ResponseFile(path) as file:
        file.resume(old | {"backend": {"extra_body": {"user": "***"}}, "filter": "new"})
        file.rewrite([row(0)])
    assert key not in file.sidecar.read_text()


def test_two_writers_cannot_share_a_file(tmp_path):
    path = tmp_path / "r.jsonl"
    with ResponseFile(path), pytest.raises(DistillabError, match="in use by another process"):
        write(path, [row(0)])
    write(path, [row(0)])


@pytest.mark.parametrize("survived", [1, 2, 3])
def test_filter_change_interrupted_anywhere_is_seen_again(tmp_path, monkeypatch, survived):
    path = tmp_path / "r.jsonl"
    write(path, [row(0)], SOURCE | {"filter": "old"})
    replace, calls = response_file.replace_file, []

    def dying(target, content):
        if len(calls) == survived:
            raise KeyboardInterrupt
        calls.append(target)
        replace(target, content)

    with ResponseFile(path) as file:
        file.resume(SOURCE | {"filter": "new"})
        assert file.filter_changed
        monkeypatch.setattr(response_file, "replace_file", dying)
        try:
            file.rewrite([row(0, kept=False)])
        except KeyboardInterrupt:
            assert survived < 3
        monkeypatch.setattr(response_file, "replace_file", replace)
    for name in ("old", "new"):
        with ResponseFile(path) as file:
            file.resume(SOURCE | {"filter": name})
            assert file.filter_changed is not (survived == 3 and name == "new")
    assert [r["kept"] for r in read_rows(path)] == [survived < 2]


def test_disk_error_names_the_file_and_keeps_what_was_written(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with ResponseFile(path) as file:
        file.resume(SOURCE)
        file.append([row(0)])
        monkeypatch.setattr(response_file.os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: .*r\.jsonl"):
            file.append([row(1)])
    assert kept_rows(path)[0] == row(0)
