"""终端关了、管道那头没了：先存好再说话，说不出来也不算失败。"""

import json
import os
import pty
import signal
import time
from pathlib import Path

import pytest

from distillab.run_file_shapes import read_metrics
from distillab.train.checkpoint_files import checkpoints

pytestmark = pytest.mark.slow

METRICS = Path("runs/recipe/metrics.jsonl")
LONG = ["train", "recipe.yaml", *(part for key in ("max_steps", "save_interval", "eval_interval")
                                  for part in ("--set", f"train.{key}=100000"))]  # fmt: skip


def wait_for_steps(process) -> None:
    deadline = time.monotonic() + 120
    while not any(row["kind"] == "train" for row in read_metrics(METRICS)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def saved_step() -> int:
    (checkpoint,) = checkpoints(Path("runs/recipe/checkpoints"))
    return json.loads((checkpoint / "trainer_state.json").read_text())["state"]["current_step"]


def assert_it_goes_on(start, step: int) -> None:
    again = Path("runs/recipe/recipe.yaml")
    text = again.read_text().replace("max_steps: 100000", f"max_steps: {step + 2}")
    again.write_text(text)
    process = start("train", str(again), "--resume")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"at step {step}" in err
    assert Path("runs/recipe/summary.json").exists()


@pytest.fixture
def pipe(start):
    """一条命令，stdout 与 stderr 写进同一根管道：``(进程, 读的那头)``；像 ``2>&1 | tee log``。"""

    def pipe(*arguments: str):
        read, write = os.pipe()
        process = start(*arguments, stdout=write, stderr=write)
        os.close(write)
        return process, read

    return pipe


@pytest.fixture
def in_terminal(start):
    """一条命令，在一个新的终端里：``(进程, 终端的另一头)``。"""

    def in_terminal(*arguments: str, **options):
        outer, inner = pty.openpty()
        process = start(*arguments, stdout=inner, stderr=inner, terminal=True,
                        environment={"TERM": "xterm"}, **options)  # fmt: skip
        os.close(inner)
        return process, outer

    return in_terminal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_also_ends_the_reader_of_the_output_still_saves(pipe, start, number):
    process, read = pipe(*LONG)
    wait_for_steps(process)
    os.close(read)
    process.send_signal(number)
    assert process.wait(60) == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert_it_goes_on(start, saved_step())


def test_a_reader_that_leaves_does_not_end_the_run(pipe):
    process, read = pipe("train", "recipe.yaml")
    os.close(read)
    assert process.wait(120) == 0
    assert Path("runs/recipe/summary.json").exists()


def test_a_log_on_a_full_disk_does_not_end_the_run(start):
    with Path("/dev/full").open("wb") as full:
        process = start("train", "recipe.yaml", stderr=full.fileno())
    assert process.wait() == 0
    assert Path("runs/recipe/summary.json").exists()


def test_a_closed_terminal_saves_and_the_run_goes_on(in_terminal, start):
    process, terminal = in_terminal(*LONG)
    wait_for_steps(process)
    os.close(terminal)
    assert process.wait() == 129
    assert_it_goes_on(start, saved_step())


def test_nohup_outlives_its_terminal(in_terminal):
    steps = ["--set", "train.max_steps=60", "--set", "train.eval_interval=60"]
    process, terminal = in_terminal("train", "recipe.yaml", *steps, ignoring_hangup=True)
    wait_for_steps(process)
    os.close(terminal)
    assert process.wait() == 0
    assert Path("runs/recipe/summary.json").exists()
