"""装上一个故障的 ``distillab``，一个或几个进程；产品代码里没有为此留的钩子。

``FAULT`` 是哪一种，只在 ``FAULT_RANK`` 号进程的第 ``FAULT_STEP`` 步发生。``python faulty.py train ...`` 可由
torchrun 启动。
"""

import math
import os
import signal
import sys
import time
from pathlib import Path

from distillab import cli
from distillab.assembly import training as build_training
from distillab.data.chunks import WikiDataset
from distillab.evaluate import evaluate as evaluation
from distillab.report import page as report_page
from distillab.train import checkpoint, skips
from distillab.train.on_policy import OnPolicy
from distillab.train.rollout import Rollout
from distillab.train.trainer import DistillationTrainer


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


def command() -> None:
    """走一遍命令行，带上 ``FAULT``。"""
    FAULTS[os.environ["FAULT"]]()
    skips.MAX_FAILED_ROWS = int(os.environ.get("MAX_FAILED_ROWS", skips.MAX_FAILED_ROWS))
    cli.main()


if __name__ == "__main__":
    sys.argv[0] = "distillab"
    try:
        command()
    except SystemExit as end:
        Path(f"code{os.environ['RANK']}").write_text(str(end.code))
        raise
