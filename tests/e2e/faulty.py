"""装上一个故障的 ``distillab``，一个或几个进程；产品代码里没有为此留的钩子。

``python faulty.py FAULT train ...`` 是带故障的命令行，可由 torchrun 启动；``python faulty.py serve`` 从
stdin 逐行读请求，每次 fork 出几个进程来跑：导入只花一次时间。故障只在 ``FAULT_RANK`` 号进程的第
``FAULT_STEP`` 步发生。
"""

import json
import math
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import distillab.run  # noqa: F401 - 在 fork 之前导入一切
from distillab import cli
from distillab.assembly import training as build_training
from distillab.data.chunks import WikiDataset
from distillab.evaluate import evaluate as evaluation
from distillab.report import page as report_page
from distillab.train import checkpoint, skips
from distillab.train.on_policy import OnPolicy
from distillab.train.rollout import Rollout
from distillab.train.trainer import DistillationTrainer

LIMIT = 300.0
"""一次请求最多这么多秒；到时还没有结束的进程被杀，退出码记作 ``None``。"""


def here() -> bool:
    return os.environ.get("RANK", "0") == os.environ.get("FAULT_RANK", "0")


def at_step(current: int) -> bool:
    return here() and current + 1 == int(os.environ.get("FAULT_STEP", "6"))


def mark() -> None:
    """故障发生的时刻，用来量多久之后都结束了。"""
    Path("fault").write_text(str(time.time()))


def fail(*_):
    mark()
    raise ValueError("no such expert\nsecond line")


def send(number, times=1):
    def act(*_):
        mark()
        for _ in range(times):
            os.kill(os.getpid(), number)

    return act


def in_step(act):
    """在那一步的学生前向之前：别的进程走到归约就要等它。"""
    targets = DistillationTrainer._targets

    def faulty(trainer, batch):
        if trainer.module.training and at_step(trainer.state.current_step):
            act(trainer)
        return targets(trainer, batch)

    DistillationTrainer._targets = faulty


def nan_gradient(trainer):
    def poison(gradient):
        hook.remove()
        return gradient * math.nan

    hook = next(trainer.student.parameters()).register_hook(poison)


def while_sampling():
    prepare, sample = OnPolicy.prepare, Rollout.sample
    now = []

    def noted(on_policy, window, step, *rest):
        now[:] = [step]
        return prepare(on_policy, window, step, *rest)

    def faulty(rollout, *arguments):
        if at_step(*now):
            fail()
        return sample(rollout, *arguments)

    OnPolicy.prepare, Rollout.sample = noted, faulty


def in_validation():
    evaluate = DistillationTrainer.evaluate

    def faulty(trainer, *arguments, **options):
        if here() and trainer.state.current_step:
            fail()
        return evaluate(trainer, *arguments, **options)

    DistillationTrainer.evaluate = faulty


def while_saving():
    write = checkpoint.save_accelerator_state

    def faulty(directory, *rest, **options):
        if here() and int(Path(directory).name.split("-")[1].split(".")[0]) > 4:
            fail()
        return write(directory, *rest, **options)

    checkpoint.save_accelerator_state = faulty


def unreadable_rows():
    get = WikiDataset.__getitem__

    def faulty(data, index):
        if index in (3, 17) and sys._getframe(1).f_code.co_filename == skips.__file__:
            raise KeyError(f"row {index} has no text")
        return get(data, index)

    WikiDataset.__getitem__ = faulty


def rows_that_do_not_collate():
    """这个进程上没有一批拼得成：只有顶替的。"""
    collate = build_training.collate_text

    def faulty(items, **options):
        caller = sys._getframe(1)
        names = {caller.f_code.co_name, caller.f_back.f_code.co_name}
        if here() and caller.f_code.co_filename == skips.__file__ and "_stand_in" not in names:
            raise ValueError("odd row")
        return collate(items, **options)

    build_training.collate_text = faulty


def term_before_writing(module):
    module.replace_file = send(signal.SIGTERM)


FAULTS = {
    "none": lambda: None,
    "raise": lambda: in_step(fail),
    "raise-while-sampling": while_sampling,
    "raise-in-validation": in_validation,
    "raise-while-saving": while_saving,
    "nan": lambda: in_step(nan_gradient),
    "stall": lambda: in_step(lambda *_: (mark(), time.sleep(1000))),
    "kill": lambda: in_step(send(signal.SIGKILL)),
    "term": lambda: in_step(send(signal.SIGTERM)),
    "hangup": lambda: in_step(send(signal.SIGHUP)),
    "interrupt": lambda: in_step(send(signal.SIGINT)),
    "interrupt-twice": lambda: in_step(send(signal.SIGINT, 2)),
    "rows": unreadable_rows,
    "collate": rows_that_do_not_collate,
    "term-evaluate": lambda: term_before_writing(evaluation),
    "term-report": lambda: term_before_writing(report_page),
}


def command(fault, arguments) -> int:
    """走一遍命令行，返回退出码。"""
    FAULTS[fault]()
    skips.MAX_FAILED_ROWS = int(os.environ.get("MAX_FAILED_ROWS", skips.MAX_FAILED_ROWS))
    sys.argv = ["distillab", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def serve() -> None:
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), flush=True)


def answer(cwd, fault, arguments, processes, environment):
    os.chdir(cwd)
    Path("fault").unlink(missing_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = [
        start(rank, processes, port, fault, arguments, environment) for rank in range(processes)
    ]
    codes, ended = [None] * processes, [0.0] * processes
    deadline = time.monotonic() + LIMIT
    running = dict(enumerate(pids))
    while running:
        for rank, pid in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[rank], ended[rank] = os.waitstatus_to_exitcode(status), time.time()
                del running[rank]
        if time.monotonic() > deadline:
            for pid in running.values():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            break
        time.sleep(0.02)
    fault_at = float(Path("fault").read_text()) if Path("fault").exists() else math.nan
    return {"codes": codes, "seconds": [end - fault_at for end in ended]}


def start(rank, processes, port, fault, arguments, environment) -> int:
    if pid := os.fork():
        return pid
    log = os.open(f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environment)
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port),
                       "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}  # fmt: skip
    code = 1
    try:
        code = command(fault, arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        code = command(sys.argv[1], sys.argv[2:])
        Path(f"code{os.environ.get('RANK', '0')}").write_text(str(code))
        sys.exit(code)
