"""一个与两个进程里的每种故障：怎样结束，多久之内，留下什么；从不一直等下去。"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from forked import LIMIT
from test_invariance import ON_POLICY, options
from test_invariance import taught as taught

from distillab.run_file_shapes import read_metrics
from distillab.train.checkpoint_files import checkpoints

FAULTY = Path(__file__).with_name("faulty.py")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_USE_CPU": "true",
    "COLUMNS": "200",
    "FAULT": "none",
}
CHECKPOINTS = Path("runs/recipe/checkpoints")


class Outcome:
    """一次运行怎样结束，故障之后多少秒。"""

    def __init__(self, processes):
        deadline = time.monotonic() + LIMIT
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0))
        self.codes = [process.poll() for process in processes]
        self.logs = [process.err.read_text() for process in processes]
        fault = Path("fault")
        begin = float(fault.read_text()) if fault.exists() else math.nan
        self.seconds = max((process.ended or math.inf) - begin for process in processes)


@pytest.fixture
def run(several):
    def run(fault, processes, *arguments, command=("train", "recipe.yaml"), **environment):
        Path("fault").unlink(missing_ok=True)
        environment |= {"FAULT": fault, "COLUMNS": "200"}
        return Outcome(several(processes, *command, *arguments, program=("faulty", "command"),
                               environment=environment))  # fmt: skip

    return run


def numbers(run="recipe"):
    """指标里与时间无关的一切。"""
    timed = {"seconds", "tokens_per_second"}
    rows = read_metrics(Path("runs") / run / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def steps():
    return [int(path.name.removeprefix("step-")) for path in checkpoints(CHECKPOINTS)]


# ---------------------------------------------------------------- 信号


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("fault", "code"), [("term", 143), ("hangup", 129), ("interrupt", 130)])
@pytest.mark.slow
def test_a_signal_saves_after_the_step_and_the_resumed_run_equals_the_whole(
    run, processes, fault, code
):
    late = ["--set", "train.log_interval=5"] if fault == "hangup" else []  # 第 6 步晚一步才读
    last = 7 if late and processes == 2 else 6  # 几个进程的一致也在里面
    whole = run("none", processes, "--set", "name=whole", *late)
    assert whole.codes == [0] * processes, whole.logs
    stopped = run(fault, processes, *late, FAULT_RANK=str(processes - 1))  # 只有一个进程收到
    assert stopped.codes == [code] * processes, stopped.logs
    assert steps() == [4, last]
    assert "distillab train runs/recipe/recipe.yaml --resume" in stopped.logs[0]
    assert "Traceback" not in "".join(stopped.logs)
    resumed = run("none", processes, "--resume", "auto", *late)
    assert resumed.codes == [0] * processes, resumed.logs
    assert f"at step {last}" in resumed.logs[0]
    assert numbers() == numbers("whole")


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.slow
def test_a_second_ctrl_c_quits_at_once(run, processes):
    stopped = run("interrupt-twice", processes, FAULT_RANK=str(processes - 1))
    assert stopped.codes == [130] * processes, stopped.logs
    assert steps() == [4]  # 没有再存


@pytest.mark.slow
def test_two_processes_leave_a_damaged_checkpoint_together(run):
    assert run("term", 2, FAULT_RANK="1").codes == [143, 143]
    content = bytearray((CHECKPOINTS / "step-00000006/random_states_1.pkl").read_bytes())
    content[3000] ^= 4
    (CHECKPOINTS / "step-00000006/random_states_1.pkl").write_bytes(content)
    resumed = run("none", 2, "--resume")
    assert resumed.codes == [0, 0], resumed.logs
    assert "random_states_1.pkl is not as it was saved; moved to" in " ".join(
        resumed.logs[0].split()
    )
    assert "at step 4" in resumed.logs[0]
    assert [path.name for path in CHECKPOINTS.glob("damaged-*")] == ["damaged-step-00000006"]
    assert json.loads(Path("runs/recipe/summary.json").read_text())["steps"] == 12


@pytest.mark.slow
def test_torchrun_that_is_terminated_ends_its_processes_in_order(workdir):
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(FAULTY), "train", "recipe.yaml", "--set", "train.max_steps=5000",
         "--set", "train.save_interval=5000", "--set", "train.eval_interval=5000"],
        env=os.environ | ENVIRONMENT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 180
    while not any(row["kind"] == "train" for row in numbers()):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert "SIGTERM: saving after this step, before torchrun ends this process in 30 s" in err
    assert [Path(f"code{rank}").read_text() for rank in range(2)] == ["143", "143"]
    assert len(steps()) == 1


@pytest.mark.slow
def test_a_terminated_evaluate_or_report_leaves_what_was_there(run):
    assert run("none", 1).codes == [0]
    page = Path("runs/recipe/report.html").read_bytes()
    evaluated = run("term-evaluate", 1, command=("evaluate", "recipe"))
    assert evaluated.codes == [143], evaluated.logs
    assert evaluated.logs[0].endswith("terminated\n")
    assert not Path("runs/recipe/evaluation.json").exists()
    assert run("none", 1, command=("evaluate", "recipe")).codes == [0]
    for watch in ((), ("--watch",)):
        assert run("term-report", 1, command=("report", "recipe", *watch)).codes == [143]
        assert Path("runs/recipe/report.html").read_bytes() == page


# ---------------------------------------------------------------- 一个进程出错


@pytest.mark.parametrize(
    ("fault", "phase"),
    [
        ("raise", "step 6, forward and backward"),
        ("raise-in-validation", "step 5, "),
        ("raise-while-saving", "step 8, saving"),
    ],
)
@pytest.mark.slow
def test_when_one_process_raises_all_end_with_its_reason(run, fault, phase):
    failed = run(fault, 2, FAULT_RANK="1")
    assert failed.codes == [2, 1], failed.logs
    assert f"rank 1 at {phase}" in failed.logs[1]
    assert "Traceback" in failed.logs[1]
    assert f"error: rank 1 at {phase}" in failed.logs[0]
    assert "ValueError: no such expert" in failed.logs[0]
    assert "Traceback" not in failed.logs[0]
    assert failed.seconds < 30
    whole = run("none", 2, "--resume")
    assert whole.codes == [0, 0], whole.logs


@pytest.mark.slow
def test_when_one_process_raises_while_sampling_all_end_with_its_reason(run, taught):
    failed = run("raise-while-sampling", 2, *options(
        [ON_POLICY, "responses.student_fraction=1.0", "train.save_interval=2"]
    ), FAULT_RANK="1", FAULT_STEP="3")  # fmt: skip
    assert failed.codes == [2, 1], failed.logs
    assert "error: rank 1 at step 3, sampling: ValueError: no such expert" in failed.logs[0]
    assert (steps(), failed.seconds < 30) == ([2], True)


@pytest.mark.slow
def test_when_the_main_process_raises_the_others_end_with_its_reason(run):
    failed = run("raise", 2, FAULT_RANK="0")
    assert failed.codes == [1, 2], failed.logs
    assert "error: rank 0 at step 6, forward and backward: ValueError: no such" in failed.logs[1]
    assert failed.seconds < 30


@pytest.mark.parametrize(("step", "saved"), [("1", []), ("6", [4])])  # 第一秒之内的也说得出
@pytest.mark.slow
def test_when_one_process_is_killed_the_others_say_where_it_was(run, step, saved):
    killed = run("kill", 2, FAULT_RANK="1", FAULT_STEP=step)
    assert killed.codes == [2, -signal.SIGKILL], killed.logs
    assert "waited for the others in vain" in killed.logs[0]
    assert re.search(r"rank 1: step \d, .*, not heard of for \d+ s", killed.logs[0])  # 每秒一次
    assert steps() == saved
    assert killed.seconds < 30
    assert run("none", 2, "--resume").codes == [0, 0]


@pytest.mark.slow
def test_a_process_that_stalls_ends_the_run_at_the_limit_and_shows_where_it_hangs(run):
    stalled = run("stall", 2, "--set", "train.timeout_minutes=0.1", FAULT_RANK="1")
    assert stalled.codes == [2, 2], stalled.logs
    assert "no progress for" in stalled.logs[0]
    assert "Timed out" in stalled.logs[0]
    assert "rank 1: step 6, forward and backward" in stalled.logs[0]
    assert "rank 1 ends, stuck in forward and backward" in stalled.logs[1]
    assert "faulty.py" in stalled.logs[1]  # 卡住的那一行
    assert steps() == [4]
    assert stalled.seconds < 60


# ---------------------------------------------------------------- 跳过


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_on_one_process_skips_the_step_on_all(run):
    skipped = run("nan", 2, "--set", "train.log_interval=5", FAULT_RANK="1")  # 晚一步才读
    assert skipped.codes == [0, 0], skipped.logs
    assert "step 6 skipped: gradient norm is not finite" in skipped.logs[0]
    summary = json.loads(Path("runs/recipe/summary.json").read_text())
    assert (summary["skipped_steps"], summary["steps"]) == (1, 12)
    assert summary["tokens"] == 11 * 2 * 4 * 15


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.slow
def test_rows_that_cannot_be_read_are_skipped_named_and_counted(run, processes):
    done = run("rows", processes, "--set", "train.max_steps=100", "--set", "train.num_epochs=1",
               "--set", "train.save_interval=100", "--set", "train.eval_interval=100")  # fmt: skip
    assert done.codes == [0] * processes, done.logs
    logs = "".join(done.logs)
    for row in (3, 17):
        assert logs.count(f"row {row} of the training data skipped: KeyError: ") == 1
    assert json.loads(Path("runs/recipe/summary.json").read_text())["failed_rows"] == 2


@pytest.mark.slow
def test_a_process_without_a_single_good_row_keeps_in_step_until_too_many_failed(run):
    stopped = run("collate", 2, FAULT_RANK="1", MAX_FAILED_ROWS="9")
    assert stopped.codes == [2, 2], stopped.logs
    for log in stopped.logs:  # 每步 4 行，第 3 步超过 9 行
        assert "error: stopped at step 3: 12 rows of the training data failed" in log
    assert [row["tokens"] for row in numbers() if row["kind"] == "train"] == [60, 120, 180]
