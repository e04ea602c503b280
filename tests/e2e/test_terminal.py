"""终端关了、管道那头没了：先存好再说话，说不出来也不算失败。"""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distillab.run_file_shapes import read_metrics
from distillab.train.checkpoint_files import checkpoints

pytestmark = pytest.mark.slow

METRICS = Path("runs/recipe/metrics.jsonl")
LONG = ["train", "recipe.yaml", *(part for key in ("max_steps", "save_interval", "eval_interval")
                                  for part in ("--set", f"train.{key}=100000"))]  # fmt: skip


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "distillab", *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80", "TERM": "xterm"}


def wait_for_steps(alive) -> None:
    deadline = time.monotonic() + 120
    while not any(row["kind"] == "train" for row in read_metrics(METRICS)):
        assert alive()
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


def in_terminal(arguments: list[str], ignoring_hangup: bool) -> tuple[int, int]:
    """在一个新的终端里起一条命令：``(pid, 终端的另一头)``。"""
    pid, terminal = pty.fork()
    if pid == 0:
        if ignoring_hangup:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.execve(arguments[0], arguments, environment())
    return pid, terminal


def running(pid: int) -> bool:
    return os.waitpid(pid, os.WNOHANG) == (0, 0)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_also_ends_the_reader_of_the_output_still_saves(workdir, start, number):
    read, write = os.pipe()  # distillab train 2>&1 | tee log
    process = subprocess.Popen(command(*LONG), stdout=write, stderr=write, env=environment())
    os.close(write)
    wait_for_steps(lambda: process.poll() is None)
    os.close(read)
    process.send_signal(number)
    assert process.wait(60) == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert_it_goes_on(start, saved_step())


def test_a_reader_that_leaves_does_not_end_the_run(workdir):
    read, write = os.pipe()
    process = subprocess.Popen(
        command("train", "recipe.yaml"), stdout=write, stderr=write, env=environment()
    )
    os.close(write)
    os.close(read)
    assert process.wait(120) == 0
    assert Path("runs/recipe/summary.json").exists()


def test_a_log_on_a_full_disk_does_not_end_the_run(workdir):
    with Path("/dev/full").open("wb") as full:
        process = subprocess.run(
            command("train", "recipe.yaml"), stdout=subprocess.PIPE, stderr=full, env=environment(),
            check=False,
        )  # fmt: skip
    assert process.returncode == 0
    assert Path("runs/recipe/summary.json").exists()


def test_a_closed_terminal_saves_and_the_run_goes_on(workdir, start):
    pid, terminal = in_terminal(command(*LONG), ignoring_hangup=False)
    wait_for_steps(lambda: running(pid))
    os.close(terminal)
    assert ended(pid) == 129
    assert_it_goes_on(start, saved_step())


def test_nohup_outlives_its_terminal(workdir):
    steps = ["--set", "train.max_steps=60", "--set", "train.eval_interval=60"]
    pid, terminal = in_terminal(command("train", "recipe.yaml", *steps), ignoring_hangup=True)
    wait_for_steps(lambda: running(pid))
    os.close(terminal)
    assert ended(pid) == 0
    assert Path("runs/recipe/summary.json").exists()
