"""存盘的教师目标：什么时候被杀、哪里坏了，读到的都是写进去的，其余的说一行、重新算。

python test_store.py write DIRECTORY WRITER FIRST STEP  # 写它那一份，一边说写完了几个
python test_store.py kill DIRECTORY KILLS SEED          # 写，杀，再写，直到写完
"""

import errno
import hashlib
import json
import logging
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distillab import files
from distillab.errors import DistillabError
from distillab.teachers import key_table, store
from distillab.teachers.key_table import ENTRY, KeyTable
from distillab.teachers.store import TargetStore

SIZE, DOCUMENTS, SHARD_BYTES = 11, 600, 4_000
FIELDS = {"teacher": "0a1b", "keep": "sampled", "samples": 12, "seed": 0, "view": None}


def key(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()[:16]


def rows(number: int) -> np.ndarray:
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (number % 7, SIZE), np.uint8)


def opened(directory: Path, writer: str | None = "rank0", **changed) -> TargetStore:
    return TargetStore(directory, FIELDS | changed, SIZE, writer)


def fill(directory: Path, numbers, writer: str = "rank0", every: int = 5) -> None:
    with opened(directory, writer) as targets:
        for count, number in enumerate(numbers, 1):
            targets.add(key(number), rows(number))
            if count % every == 0:
                targets.flush()


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("[!.]*"))}


def missing(targets: TargetStore, numbers) -> list[int]:
    """哪些没有；有的都要与写进去的相同。"""
    lost = []
    for number in numbers:
        if (found := targets.get(key(number))) is None:
            lost.append(number)
        else:
            assert found.dtype == np.uint8
            assert found.shape == rows(number).shape
            assert (found == rows(number)).all()
        assert (key(number) in targets) == (found is not None)
    return lost


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """几 KB 就换一个 shard，几个键就排序。"""
    monkeypatch.setattr(store, "SHARD_BYTES", SHARD_BYTES)
    monkeypatch.setattr(key_table, "RECENT", 16)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """一口气写完的。"""
    directory = tmp_path_factory.mktemp("reference") / "targets"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "SHARD_BYTES", SHARD_BYTES)
        fill(directory, range(DOCUMENTS), every=DOCUMENTS)
    return directory


def test_what_is_read_is_what_was_written(reference):
    with opened(reference, None) as targets:
        assert missing(targets, range(DOCUMENTS)) == []
        assert missing(targets, range(DOCUMENTS, DOCUMENTS + 50)) == [
            *range(DOCUMENTS, DOCUMENTS + 50)
        ]
        assert len(targets) == DOCUMENTS
        assert targets.tokens == sum(len(rows(number)) for number in range(DOCUMENTS))
        assert targets.total_bytes == targets.tokens * SIZE + len(targets) * ENTRY.itemsize == sum(
            len(data) for name, data in content(reference).items() if name != "header.json"
        )  # fmt: skip
        assert not targets.get(key(6)).flags.writeable
        with pytest.raises(ValueError, match="opened for reading"):
            targets.add(key(0), rows(0))
    sizes = {path.stat().st_size for path in reference.glob("*.bin")}
    assert len([*reference.glob("*.bin")]) >= 5
    assert max(sizes) <= SHARD_BYTES


def test_what_waits_is_read_and_counted_too(tmp_path):
    with opened(tmp_path / "t") as targets:
        original = rows(6)
        targets.add(key(6), original)
        original[:] = 0
        assert missing(targets, range(7)) == [*range(6)]
        assert (len(targets), targets.tokens, targets.total_bytes) == (1, 6, 0)
        with opened(tmp_path / "t", None) as reader:
            targets.flush()
            assert (len(targets), targets.tokens) == (1, 6)
            assert missing(reader, range(7)) == [*range(7)]
            reader.refresh()
            assert missing(reader, range(7)) == [*range(6)]


@pytest.mark.parametrize("every", [1, 7, 100])
def test_the_files_do_not_depend_on_when_they_were_flushed(tmp_path, every):
    fill(tmp_path / "one", range(100), every=100)
    fill(tmp_path / "other", [*range(100), *range(50)], every=every)  # 已有的不再写
    assert content(tmp_path / "one") == content(tmp_path / "other")


def test_a_document_larger_than_a_shard_has_one_of_its_own(tmp_path):
    large = np.ones((SHARD_BYTES, SIZE), np.uint8)
    with opened(tmp_path / "t") as targets:
        for number in (5, -1, 6):
            targets.add(key(number), large if number < 0 else rows(number))
    with opened(tmp_path / "t") as targets:
        assert (targets.get(key(-1)) == large).all()
        assert missing(targets, [5, 6]) == []
    assert len([*(tmp_path / "t").glob("*.bin")]) == 3


def test_much_that_waits_is_flushed_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "WAITING_BYTES", 3 * SIZE)
    targets = opened(tmp_path / "t")
    for number in (1, 1, 1, 2, 8):
        targets.add(key(number), rows(number))
    targets.close()  # 不 flush
    with opened(tmp_path / "t") as targets:
        assert missing(targets, [1, 2, 8]) == [8]


@pytest.mark.parametrize(("error", "kept"), [(KeyboardInterrupt, True), (KeyError, False)])
def test_an_interrupt_keeps_what_waits(tmp_path, error, kept):
    def train() -> None:
        with opened(tmp_path / "t") as targets:
            targets.add(key(3), rows(3))
            raise error

    with pytest.raises(error):
        train()
    with opened(tmp_path / "t") as targets:  # 锁也放开了
        assert (key(3) in targets) == kept


def test_rows_and_keys_that_do_not_fit_are_refused(tmp_path):
    with opened(tmp_path / "t") as targets:
        for wrong in (rows(6)[0], rows(6)[:, 1:], rows(6).astype(np.int64)):
            with pytest.raises(ValueError, match=r"expected uint8 \[count, 11\]"):
                targets.add(key(6), wrong)
        with pytest.raises(ValueError, match="a key of 15 bytes, expected 16"):
            targets.add(key(6)[1:], rows(6))
    with pytest.raises(ValueError, match="expected letters, digits and _"):
        opened(tmp_path / "t", "rank-0")


# ---------------------------------------------------------------- 进程


def write(directory: Path, writer: str, numbers, every: int) -> None:
    """像训练那样：有的用，没有的算了放进去；每次落盘之后说到哪里了。"""
    with opened(directory, writer) as targets:
        for number in numbers:
            if targets.get(key(number)) is None:
                targets.add(key(number), rows(number))
            if number % every == every - 1:
                targets.flush()
                os.write(1, f"{number}\n".encode())


def kill(directory: Path, kills: int, seed: int) -> None:
    """在随机的时刻杀掉正在写的；之后说过写完的都在，不该有的没有读错。"""
    random.seed(seed)
    done = -1
    for count in range(kills):
        reading, writing = os.pipe()
        if not (child := os.fork()):
            os.dup2(writing, 1)
            write(directory, "rank0", range(DOCUMENTS), 3)
            os._exit(0)
        os.close(writing)
        first = os.read(reading, 1) if count % 2 else b""  # 有一半总写完了几个
        time.sleep(random.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reading) as told:
            done = max([done, *map(int, (first.decode() + told.read()).split())])
        if directory.exists() and (directory / "header.json").exists():
            with opened(directory, None) as targets:
                lost = missing(targets, range(DOCUMENTS))
                assert not lost or lost[0] > done, (lost[0], done)
                assert lost == [*range(DOCUMENTS - len(lost), DOCUMENTS)]
    print(done)


def run(*arguments: object, **options) -> subprocess.Popen:
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


def test_kills_lose_nothing_that_was_flushed_and_leave_nothing_wrong(tmp_path, reference):
    with run("kill", tmp_path / "t", 25, 0) as process:
        done = int(process.communicate(timeout=120)[0])
    assert process.returncode == 0
    assert done > 0
    fill(tmp_path / "t", range(DOCUMENTS), every=100)
    assert content(tmp_path / "t") == content(reference)


def test_two_processes_write_one_store_while_a_third_reads(tmp_path, reference):
    directory = tmp_path / "t"
    # 每三个有一个是两边都写的
    with (
        run("write", directory, "rank0", 0, 3) as one,
        run("write", directory, "rank1", 1, 3) as two,
    ):
        seen = []
        while one.poll() is None or two.poll() is None:
            if (directory / "header.json").exists():
                with opened(directory, None) as targets:
                    missing(targets, range(0, DOCUMENTS, 7))
                    seen.append(len(targets))
                    targets.refresh()
                    missing(targets, range(0, DOCUMENTS, 5))
                    assert len(targets) >= seen[-1]
    assert (one.returncode, two.returncode) == (0, 0)
    assert seen == sorted(seen)
    with opened(directory, None) as targets, opened(reference, None) as expected:
        assert missing(targets, range(DOCUMENTS)) == []
        assert (len(targets), targets.tokens) == (len(expected), expected.tokens)
        assert targets.total_bytes >= expected.total_bytes


def test_a_name_belongs_to_one_process(tmp_path):
    with opened(tmp_path / "t"):
        with pytest.raises(DistillabError, match="another process is writing as rank0: wait for"):
            opened(tmp_path / "t")
        with opened(tmp_path / "t", "rank1") as other, opened(tmp_path / "t", None):
            other.add(key(3), rows(3))
    with opened(tmp_path / "t") as targets:
        assert missing(targets, range(5)) == [0, 1, 2, 4]


def test_a_copy_in_another_process_reads_what_was_flushed(tmp_path):
    with opened(tmp_path / "t") as targets:
        targets.add(key(3), rows(3))
        targets.flush()
        targets.add(key(4), rows(4))
        copy = pickle.loads(pickle.dumps(targets))
        assert missing(copy, [3, 4]) == [4]
        assert copy.writer is None


def test_what_another_process_wrote_meanwhile_is_not_written_again(tmp_path):
    with opened(tmp_path / "t") as one, opened(tmp_path / "t", "rank1") as other:
        for targets in (one, other):
            targets.add(key(3), rows(3))
        one.add(key(4), rows(4))
        other.flush()
        one.refresh()
        assert (len(one), one.tokens) == (2, 7)
    assert (tmp_path / "t" / "rank0-00000.bin").stat().st_size == 4 * SIZE
    assert (tmp_path / "t" / "rank1-00000.bin").stat().st_size == 3 * SIZE


# ---------------------------------------------------------------- 损坏

N = 40


@pytest.fixture
def written(tmp_path) -> Path:
    """一个 shard，``N`` 个键。"""
    fill(tmp_path / "t", range(N), every=N)
    assert len([*(tmp_path / "t").glob("*.bin")]) == 1
    return tmp_path / "t"


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_files_cut_at_any_byte_are_continued(data, written, tmp_path_factory):
    directory = tmp_path_factory.mktemp("cut") / "t"
    shutil.copytree(written, directory)
    whole = content(directory)
    cuts = {}
    for end in (".bin", ".idx"):
        path = directory / f"rank0-00000{end}"
        cuts[end] = data.draw(st.integers(0, path.stat().st_size), end)
        os.truncate(path, cuts[end])
    ends = np.cumsum([len(rows(number)) for number in range(N)]) * SIZE
    expected = min(int((ends <= cuts[".bin"]).sum()), cuts[".idx"] // ENTRY.itemsize)
    with opened(directory) as targets:
        assert missing(targets, range(N)) == [*range(expected, N)]
    fill(directory, range(N), every=N)
    with opened(directory) as targets:
        assert missing(targets, range(N)) == []
    if cuts[".idx"] // ENTRY.itemsize == expected:  # 记录先写：被杀只会留下这样的
        assert content(directory) == whole


def change(path: Path, at: int, by: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at : (at + len(by)) or None] = by
    path.write_bytes(data)


def start(number: int) -> int:
    return SIZE * sum(len(rows(before)) for before in range(number))


def index_cut(index: Path, data: Path) -> None:
    os.truncate(index, N * 32 - 5)


def index_tail_garbled(index: Path, data: Path) -> None:
    change(index, -32, bytes(range(32)))


def index_tail_zeros(index: Path, data: Path) -> None:
    with index.open("ab") as file:
        file.write(bytes(64))


def index_middle_garbled(index: Path, data: Path) -> None:
    change(index, 10 * 32 + 20, b"\x01")


def index_gone(index: Path, data: Path) -> None:
    index.unlink()


def index_empty(index: Path, data: Path) -> None:
    os.truncate(index, 0)


def data_cut(index: Path, data: Path) -> None:
    os.truncate(data, start(N) - 1)


def data_longer(index: Path, data: Path) -> None:
    with data.open("ab") as file:
        file.write(b"more")


def data_garbled(index: Path, data: Path) -> None:
    change(data, start(10), bytes([data.read_bytes()[start(10)] ^ 4]))


def data_gone(index: Path, data: Path) -> None:
    data.unlink()


def data_empty(index: Path, data: Path) -> None:
    os.truncate(data, 0)


def both_empty(index: Path, data: Path) -> None:
    os.truncate(data, 0)
    os.truncate(index, 0)


def foreign_file(index: Path, data: Path) -> None:
    index.with_name("notes.txt").write_text("mine")


def others(index: Path, data: Path) -> None:
    """另一位教师的，键相同。"""
    other = index.parents[1] / "other"
    with opened(other, teacher="other") as targets:
        for number in range(N):
            targets.add(key(number), rows(number + 7))
    shutil.copy(other / index.name, index)
    shutil.copy(other / data.name, data)


def others_data(index: Path, data: Path) -> None:
    data.write_bytes(bytes(data.stat().st_size))


ALL = [*range(N)]
SOME = [number for number in ALL if len(rows(number))]
"""有 response token 的：其余的没有数据可坏。"""
DAMAGE = [
    (index_cut, [N - 1], "rank0-00000: its index ends with 27 bytes of an entry; 44 bytes of its data are in no index"),
    (index_tail_garbled, [N - 1], "rank0-00000: 1 entries of its index are damaged or another store's; 44 bytes of"),
    (index_tail_zeros, [], "rank0-00000: 2 entries of its index are damaged or another store's: left"),
    (index_middle_garbled, [10], "rank0-00000: 1 entries of its index are damaged or another store's: left"),
    (index_gone, ALL, f"rank0-00000: {start(N):,} bytes of its data are in no index"),
    (index_empty, ALL, f"rank0-00000: {start(N):,} bytes of its data are in no index"),
    (data_cut, [N - 1], "rank0-00000: 1 entries of its index point beyond its data; 43 bytes of its data are in"),
    (data_longer, [], "rank0-00000: 4 bytes of its data are in no index"),
    (data_garbled, [10], "rank0-00000.bin: records are not as they were written"),
    (data_gone, ALL[1:], f"rank0-00000: {N - 1} entries of its index point beyond its data"),
    (data_empty, ALL[1:], f"rank0-00000: {N - 1} entries of its index point beyond its data"),
    (both_empty, ALL, None),
    (foreign_file, [], "notes.txt: not part of teacher targets: left alone"),
    (others, ALL, f"rank0-00000: {N} entries of its index are damaged or another store's"),
    (others_data, SOME, "rank0-00000.bin: records are not as they were written"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "lost", "line"), DAMAGE, ids=[d[0].__name__ for d in DAMAGE])
def test_damage_is_one_line_and_computed_again(written, caplog, damage, lost, line):
    damage(written / "rank0-00000.idx", written / "rank0-00000.bin")
    with opened(written) as targets:
        assert missing(targets, range(N)) == lost
        targets.refresh()
        assert missing(targets, range(N)) == lost
        assert len(targets) == N - len(lost)
        for number in lost:
            targets.add(key(number), rows(number))
        assert missing(targets, range(N)) == []
    warnings = [
        record.getMessage() for record in caplog.records if record.levelno == logging.WARNING
    ]
    assert len(warnings) == (line is not None)
    if line:
        assert f"{written}/{line}" in warnings[0]
        assert damage is foreign_file or warnings[0].endswith(": left out, and computed again")
    with opened(written) as targets:
        assert missing(targets, range(N)) == []
        assert len(targets) == N


def test_what_is_damaged_under_an_open_store_is_left_out(written, caplog):
    with opened(written, None) as targets:
        assert missing(targets, range(N)) == []
        os.truncate(written / "rank0-00000.bin", start(20))  # 映射着：读下去是 SIGBUS
        assert missing(targets, range(N)) == [*range(20, N)]
    assert len(caplog.records) == 1
    assert "records are not as they were written" in caplog.text


def test_the_sound_one_of_two_copies_is_read(written, caplog):
    with opened(written, "rank1") as other:
        other._table = KeyTable()  # 两边同时写的：还没有看见另一边的
        for number in range(N):
            other.add(key(number), rows(number))
    for writer, end in (("rank0", 10), ("rank1", 9)):
        change(written / f"{writer}-00000.bin", start(end), bytes([255, 0, 255]))
    with opened(written, None) as targets:
        assert missing(targets, range(N)) == []
        assert len(targets) == N
    with opened(written) as targets:
        assert missing(targets, range(N)) == []


def test_another_process_may_be_in_the_middle_of_writing(written, caplog):
    """别人的文件写到一半不是损坏；很久没有动的才是。"""
    index, data = written / "rank0-00000.idx", written / "rank0-00000.bin"
    whole = index.read_bytes()
    index_cut(index, data)
    with opened(written, "rank1") as targets:
        assert missing(targets, range(N)) == [N - 1]
        index.write_bytes(whole)
        targets.refresh()
        assert missing(targets, range(N)) == []
    assert caplog.text == ""
    index_cut(index, data)
    os.utime(data, (0, 0))
    with opened(written, "rank1") as targets:
        assert missing(targets, range(N)) == [N - 1]
    assert "rank0-00000: its index ends with 27 bytes of an entry: left out" in caplog.text


def test_what_another_store_wrote_is_not_cut(written):
    others(written / "rank0-00000.idx", written / "rank0-00000.bin")
    before = content(written)
    fill(written, range(N))
    after = content(written)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"rank0-00001.bin", "rank0-00001.idx"}


def broken(failing: int, error: int, real=os.write):
    """第 ``failing`` 次写（从 0 数）写了一半，之后写不下；``-1`` 是再也写不下。"""
    calls = iter(range(1000))

    def write_some(handle: int, part: memoryview) -> int:
        call = next(calls)
        if call == failing and len(part) > 1:
            return real(handle, part[: len(part) // 2])
        if call > failing:
            raise OSError(error, os.strerror(error))
        return real(handle, part)

    return write_some


@pytest.mark.parametrize("failing", [-1, 0, 1, 2, 5])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_is_one_line_and_keeps_what_is_whole(tmp_path, monkeypatch, failing, error):
    directory = tmp_path / "t"
    fill(directory, range(10))
    before = content(directory)
    targets = opened(directory)
    for number in range(10, 400):
        targets.add(key(number), rows(number))
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "write", broken(failing, error))
        with pytest.raises(DistillabError) as caught:
            targets.flush()
        assert missing(targets, range(400)) == []
    message = str(caught.value)
    assert message.startswith(f"{directory}: cannot write teacher targets: {os.strerror(error)}")
    assert message.endswith("; those written before are whole")
    assert "\n" not in message
    assert error != errno.ENOSPC or " to write, " in message
    with opened(directory, None) as reader:  # 与在此时被杀一样
        lost = missing(reader, range(400))
        assert lost == [*range(400 - len(lost), 400)]
        assert len(lost) <= 390
    after = content(directory)
    assert all(after[name].startswith(data) for name, data in before.items())
    targets.flush()  # 腾出了空间
    targets.close()
    fill(tmp_path / "other", range(400), every=400)
    assert content(directory) == content(tmp_path / "other")


def test_a_full_disk_leaves_no_lock_and_is_said_once(tmp_path, monkeypatch):
    targets = opened(tmp_path / "t")
    targets.add(key(3), rows(3))
    with monkeypatch.context() as patch, pytest.raises(DistillabError) as caught, targets:
        patch.setattr(files.os, "write", broken(-1, errno.ENOSPC))
    assert isinstance(caught.value.__cause__, files.NoRoom)
    opened(tmp_path / "t").close()


# ---------------------------------------------------------------- 来历


@pytest.mark.parametrize("writer", ["rank1", None])
def test_another_origin_is_refused_with_the_field_and_both_values(written, writer):
    before = content(written)
    for changed, line in [
        ({"samples": 32}, "samples was 12 and is now 32"),
        ({"teacher": "f00d", "seed": 1}, "teacher was '0a1b' and is now 'f00d'"),
        ({"new": "x"}, "new was None and is now 'x'"),
    ]:
        with pytest.raises(DistillabError) as caught:
            opened(written, writer, **changed)
        assert str(caught.value) == (
            f"{written}/header.json: {line}, so these are other teacher targets: name another "
            f"directory, or move this one away"
        )
    with pytest.raises(DistillabError, match="record_bytes was 11 and is now 38"):
        TargetStore(written, FIELDS, 38, writer)
    with pytest.raises(DistillabError, match="view was None and is now 'same'"):
        opened(written, writer, view="same")
    assert content(written) == before


@pytest.mark.parametrize(
    "header", ["", "{", "[]", "7", "{}", '{"format": "1"}', '{"format": null}', None]
)
def test_a_header_that_cannot_be_read_is_one_line(written, header):
    path = written / "header.json"
    path.unlink()
    if header is None:
        path.mkdir()
    else:
        path.write_text(header)
    before = header is not None and content(written)
    for writer in ("rank0", None):
        with pytest.raises(
            DistillabError, match=r"header.json: not the header of teacher targets: re"
        ):
            opened(written, writer)
    assert header is None or content(written) == before


def test_a_newer_format_and_no_header_are_one_line_each(written, tmp_path):
    header = json.loads((written / "header.json").read_text())
    (written / "header.json").write_text(json.dumps(header | {"format": 2}))
    with pytest.raises(DistillabError, match=r"header.json: format 2 is newer than 1, the newest"):
        opened(written)
    (written / "header.json").unlink()
    with pytest.raises(DistillabError) as caught:
        opened(written)
    assert str(caught.value) == (
        f"{written}: found 'rank0-00000.bin', 'rank0-00000.idx' but no header.json, expected "
        f"teacher targets, or a new or empty directory"
    )
    for directory in (written, tmp_path / "none"):
        with pytest.raises(
            DistillabError, match=r"no teacher targets here: header.json is missing"
        ):
            opened(directory, None)
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(DistillabError, match="file: cannot write teacher targets: File exists"):
        opened(tmp_path / "file")


# ---------------------------------------------------------------- 索引


@settings(deadline=None, max_examples=60)
@given(
    operations=st.lists(
        st.tuples(st.sampled_from(["learn", "drop"]), st.lists(st.integers(0, 40), max_size=30)),
        max_size=8,
    )
)
def test_keys_are_found_as_in_a_dict_of_lists(operations):
    """前一半相同的键也分得清。"""
    names = [bytes([number % 3] * 8 + [number] * 8) for number in range(41)]
    table, model, serial = KeyTable(), {}, 0
    for kind, numbers in operations:
        if kind == "learn":
            entries = np.zeros(len(numbers), ENTRY)
            entries["key"] = np.frombuffer(b"".join(names[n] for n in numbers), "<u8").reshape(
                -1, 2
            )
            entries["start"] = range(serial, serial + len(numbers))
            for number in numbers:
                model.setdefault(number, []).append(serial)
                serial += 1
            table.learn(1, entries)
        for number in numbers * (kind == "drop"):
            if found := table.find(names[number]):
                table.drop(names[number])
                model[number] = [at for at in model[number] if at != found.start]
                if table.find(names[number]) is None:  # dict 里的盖住了先写的
                    model[number] = []
        for number, name in enumerate(names):
            found = table.find(name)
            assert (found is not None) == bool(model.get(number))
            assert found is None or (found.shard, found.start) == (1, max(model[number]))
    assert len(table.distinct()) == sum(map(bool, model.values()))


if __name__ == "__main__":
    store.SHARD_BYTES, key_table.RECENT = SHARD_BYTES, 16
    command, directory, *rest = sys.argv[1:]
    if command == "write":
        writer, first, step = rest[0], *map(int, rest[1:])
        write(Path(directory), writer, (n for n in range(DOCUMENTS) if n % step in (first, 2)), 3)
    else:
        kill(Path(directory), *map(int, rest))
