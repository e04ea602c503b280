"""多进程训练的启动：交给 Accelerate 自己的启动器，用随包发布的引擎配置。"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from ..console import say
from ..errors import DistillabError
from ..sources import shipped_directory

Engine = Literal["ddp", "fsdp2", "zero2", "zero3"]


def engine_config(engine: Engine) -> Path:
    """``accelerate launch --config_file`` 的文件。"""
    return shipped_directory() / "accelerate" / f"{engine}.yaml"


def launch(engine: Engine, processes: int, arguments: Sequence[str]) -> int:
    """在这台机器上起 ``processes`` 个进程，各跑一条 ``distillab ARGUMENTS``，等它们都结束。

    返回退出码：最先失败的那个进程的；被信号停下则是 128 加信号的编号。
    """
    import torch

    _check(engine, processes, torch.cuda.device_count())
    if not torch.cuda.is_available():  # 配置是给 GPU 写的，CPU 要从环境里说
        zero = engine.startswith("zero")
        os.environ.update({"DS_ACCELERATOR": "cpu"} if zero else {"ACCELERATE_USE_CPU": "true"})
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup；torchrun 不理会它
        os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGQUIT")
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = f"--num_processes {processes} --main_process_port 0 --module distillab".split()
    options = ["--config_file", str(engine_config(engine)), *options, *arguments]
    try:
        launch_command(launch_command_parser().parse_args(options))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code
    except SignalException as stop:  # 启动器已把它转给各进程，等它们存好
        say("interrupted", error=True)
        return 128 + int(stop.sigval)
    return 0


def _check(engine: Engine, processes: int, gpus: int) -> None:
    if processes < 1:
        raise DistillabError(f"--processes is {processes}, expected at least 1")
    if gpus and processes > gpus:
        raise DistillabError(f"--processes is {processes}, but this machine has {gpus} GPU(s)")
    if not gpus and engine == "fsdp2":
        raise DistillabError(
            "--engine fsdp2 needs GPUs: Accelerate has FSDP on no CPU; use ddp or zero3"
        )
    if engine.startswith("zero") and find_spec("deepspeed") is None:
        raise DistillabError(
            f"--engine {engine} needs DeepSpeed: pip install 'distillab[deepspeed]'"
        )
