"""剖析：各段之和就是一步，trace 里有各段，训练的数不变；步数不够时什么也不写。"""

import gzip
import json
import logging

import pytest
from test_trainer import Chunks, losses, make, teacher  # noqa: F401 - fixture

from distillab.train import profiling
from distillab.train.profiling import PHASES, PREFIX, SKIPPED, TIMED, TRACED

NEEDED = SKIPPED + TIMED + 1 + TRACED


@pytest.fixture
def profiled(make, tmp_path):  # noqa: F811
    """训练并剖析一次，中途验证两次；返回 ``(训练循环, 写下的目录)``。"""
    trainer = make("profiled", max_steps=NEEDED, eval_interval=5, data=Chunks(80))
    with profiling.profiling(tmp_path / "profile"):
        trainer.train()
    return trainer, tmp_path / "profile"


def test_the_phases_add_up_to_the_step(profiled):
    found = json.loads((profiled[1] / "steps.json").read_text())
    phases = {name: row["seconds"] for name, row in found["phases"].items()}
    assert set(phases) == set(PHASES) - {"sampling"} | {"other"}
    assert sum(phases.values()) == pytest.approx(found["step_seconds"], rel=1e-6)
    assert all(seconds > 0 for seconds in phases.values())
    assert phases["other"] < 0.15 * found["step_seconds"]


def test_matrix_products_are_counted_in_the_phase_that_does_them(profiled):
    found = json.loads((profiled[1] / "steps.json").read_text())
    operations = {name: row["operations"] for name, row in found["phases"].items()}
    tokens, hidden, vocab = 4 * 12, 32, 400
    rows = 4 * 11  # 每块最后一个位置没有目标
    block = hidden * (2 * hidden + 2 * 16) + 3 * hidden * 48
    forward = 2 * tokens * 2 * block
    assert operations["student forward"] == pytest.approx(forward, rel=0.05)
    assert operations["backward"] == pytest.approx(2 * forward, rel=0.05)
    assert operations["teacher forward"] == pytest.approx(1.5 * forward, rel=0.05)  # 三层
    assert operations["heads and loss"] == pytest.approx(2 * rows * vocab * hidden * 4, rel=0.05)
    assert operations["data"] == operations["optimizer"] == 0


def test_the_trace_names_the_phases_and_the_table_the_operators(profiled):
    with gzip.open(profiled[1] / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    for phase in set(PHASES) - {"sampling"}:
        assert names.count(PREFIX + phase) == TRACED
    table = (profiled[1] / "steps.txt").read_text()
    for expected in ("teacher forward", "aten::", "peak memory"):  # 哪个算子最久，看机器闲忙
        assert expected in table


def test_profiling_changes_no_number(profiled, make):  # noqa: F811
    plain = make("plain", max_steps=NEEDED, eval_interval=5, data=Chunks(80))
    plain.train()
    assert losses(profiled[0]) == losses(plain)


def test_too_short_a_run_says_how_many_steps_it_takes(make, tmp_path, caplog):  # noqa: F811
    with caplog.at_level(logging.WARNING, "distillab"), profiling.profiling(tmp_path / "profile"):
        make("short", max_steps=NEEDED - 1).train()
    assert f"--profile needs {NEEDED} steps, this run had {NEEDED - 1}" in caplog.text
    assert not (tmp_path / "profile").exists()
    assert profiling._active is None


def test_without_profiling_a_phase_does_nothing():
    with profiling.phase("data"):
        assert profiling._active is None
