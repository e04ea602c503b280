"""真的进程里的命令，却不必各自再导入 torch 与 transformers。

``python forked.py SOCKET`` 只导入别人的库，每次请求 fork 出一个进程；``distillab`` 在那里面才导入，环境变量、
输出、终端与信号都是它自己的，与新起的 ``python -m distillab`` 一样。``Forked`` 是这样一个进程，用起来像
``subprocess.Popen``。
"""

import contextlib
import fcntl
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import termios
import time
import traceback
from pathlib import Path

HEAVY = [
    "torch", "torch.distributed", "torch.distributed.tensor", "torch._dynamo", "torch.utils.data",
    "transformers", "transformers.models.auto.modeling_auto", "transformers.generation",
    "transformers.models.qwen2.modeling_qwen2", "transformers.models.llama.modeling_llama",
    "transformers.tokenization_utils_tokenizers", "transformers.models.auto.tokenization_auto",
    "accelerate", "datasets", "safetensors.torch", "pyarrow.parquet", "pydantic", "typer", "yaml",
    "rich.console", "rich.progress", "rich.logging", "jinja2", "plotly.offline", "psutil",
    "matplotlib.pyplot", "matplotlib.backends.backend_agg", "filelock", "deepspeed",
]  # fmt: skip
LIMIT = 300.0
"""一个进程最多这么多秒；到时还没有结束的被杀，退出码记作 ``None``。"""


def serve(path: str) -> None:
    """stdin 那头没有人了就结束。"""
    for name in HEAVY:
        with contextlib.suppress(ModuleNotFoundError):  # 不是每个环境都有 DeepSpeed
            importlib.import_module(name)
    gc.freeze()  # fork 之后不必再逐个看一遍
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:
                return
            connection, _ = listener.accept()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if os.fork() == 0:
                listener.close()
                watch(connection)
            connection.close()


def watch(connection: socket.socket) -> None:
    """起一个进程，说出它的 pid，等到它结束，说出怎样、何时结束的。"""
    message, streams, _, _ = socket.recv_fds(connection, 1 << 20, 2)
    if not (pid := os.fork()):
        connection.close()
        become(streams, **json.loads(message))
    for stream in streams:
        os.close(stream)
    with contextlib.suppress(OSError):  # 测试先走了
        connection.send(str(pid).encode())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        connection.send(json.dumps([code, time.time()]).encode())
    os._exit(0)


def become(streams, program, arguments, cwd, environment, terminal, ignoring_hangup) -> None:
    """在 fork 出来的进程里把 ``program`` 走到头。"""
    code = 1
    try:
        # 测试也许在后台或 nohup 之下，那里的信号是不理会的
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignoring_hangup else signal.SIG_DFL)
        for number, stream in enumerate(streams, 1):
            os.dup2(stream, number)
            os.close(stream)
        if terminal:
            os.setsid()
            fcntl.ioctl(1, termios.TIOCSCTTY, 0)
            os.dup2(1, 0)
        sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
        sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, closefd=False)
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:0] = [str(Path(__file__).parent)]
        module, function = program
        sys.argv = ["distillab", *arguments]
        getattr(importlib.import_module(module), function)()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def ranks(processes: int) -> list[dict[str, str]]:
    """torchrun 给各个进程的环境变量；只有一个进程时什么也不给。"""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
         "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for rank in range(processes)
    ]  # fmt: skip


class Forked:
    """一个这样的进程。

    ``stdout`` 与 ``stderr`` 可以是文件描述符；不给就留在文件 ``out`` 与 ``err`` 里。
    """

    def __init__(self, server: str, program: tuple[str, str], arguments: tuple[str, ...],
                 environment: dict[str, str], logs: Path, stdout: int | None = None,
                 stderr: int | None = None, terminal: bool = False,
                 ignoring_hangup: bool = False, cwd: Path | None = None) -> None:  # fmt: skip
        self.returncode, self.ended = None, None
        self.out, self.err = logs.with_suffix(".out"), logs.with_suffix(".err")
        request = {
            "program": program, "arguments": arguments, "cwd": str(cwd or Path.cwd()),
            "environment": environment, "terminal": terminal, "ignoring_hangup": ignoring_hangup,
        }  # fmt: skip
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.connect(server)
        with contextlib.ExitStack() as stack:
            streams = [
                stack.enter_context(path.open("wb")).fileno() if given is None else given
                for path, given in ((self.out, stdout), (self.err, stderr))
            ]
            socket.send_fds(self._connection, [json.dumps(request).encode()], streams)
        self.pid = int(self._connection.recv(32))

    def wait(self, timeout: float = LIMIT) -> int | None:
        """退出码；没有等到就是 ``TimeoutExpired``。"""
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                answer = self._connection.recv(1024)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(str(self.pid), timeout) from None
            self.returncode, self.ended = json.loads(answer)
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        """退出码，或还在跑：``None``。"""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def send_signal(self, number: int) -> None:
        """发一个信号；已经结束的不再发。"""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL，并等到它真的结束。"""
        self.send_signal(signal.SIGKILL)
        self.wait()

    def communicate(self, timeout: float = LIMIT) -> tuple[str, str]:
        """等它结束，给出它的 stdout 与 stderr。"""
        self.wait(timeout)
        return self.out.read_text(), self.err.read_text()


if __name__ == "__main__":
    serve(sys.argv[1])
