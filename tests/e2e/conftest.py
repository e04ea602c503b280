"""端到端测试的零件：磁盘上的小教师、小文本和一份配方，全部离线。"""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from forked import Forked, ranks
from stub_server import Stub

WORDS = [
    "the",
    "teacher",
    "gives",
    "a",
    "student",
    "some",
    "soft",
    "targets",
    "and",
    "the",
    "small",
    "model",
    "learns",
    "them",
]


def article(number: int) -> str:
    return " ".join(WORDS[(number * (i + 1) + i * i) % len(WORDS)] for i in range(40))


@pytest.fixture
def workdir(tmp_path, monkeypatch, tiny_qwen2, tiny_tokenizer) -> Path:
    """一个工作目录：``teacher/``、``text.jsonl``、``recipe.yaml``；缓存也在里面。"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTILLAB_CACHE", str(tmp_path / "cache"))
    tiny_qwen2.save_pretrained("teacher")
    tiny_tokenizer.save_pretrained("teacher")
    lines = [f'{{"text": "{article(number)}"}}\n' for number in range(60)]
    Path("text.jsonl").write_text("".join(lines))
    Path("recipe.yaml").write_text(
        "description: tiny\n"
        "teacher: {path: teacher}\n"
        "student: {init: {from: teacher, layers: 2}}\n"
        "data: {source: text.jsonl, max_seq_len: 16}\n"
        "train: {batch_size: 4, max_steps: 12, warmup_steps: 2, learning_rate: 3e-3,\n"
        "        log_interval: 1, eval_interval: 5, save_interval: 4}\n"
        "evaluate: {prompts: [the teacher, 中国], max_new_tokens: 8}\n"
    )
    return tmp_path


@pytest.fixture(scope="session")
def forking(tmp_path_factory):
    """``forked.py`` 的 socket；等到第一个要它的测试才起。"""
    path = str(tmp_path_factory.mktemp("forking") / "socket")
    program = str(Path(__file__).with_name("forked.py"))
    with subprocess.Popen(
        [sys.executable, program, path],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "ready\n"
        yield path
        process.stdin.close()
        process.wait(30)


@pytest.fixture
def start(workdir, forking):
    """在自己的进程里起一条真正的命令；``rank`` 与 ``port`` 给出时，它是几个进程中的一个。"""
    started = []

    def start(*arguments: str, program=("distillab.cli", "main"), environment=None, **options):
        process = Forked(
            forking, program, arguments, logs=workdir / f"process-{len(started)}", **options,
            environment=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"} | (environment or {}),
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def several(start):
    """几个进程一起走一条命令，像 torchrun 起的那样；各自的环境变量之外可以再加。"""

    def several(processes: int, *arguments: str, environment=None, **options):
        common = {"ACCELERATE_USE_CPU": "true"} | (environment or {})
        return [
            start(*arguments, environment=common | rank, **options) for rank in ranks(processes)
        ]

    return several


@pytest.fixture
def together(several):
    """``several``，等到都走完；失败的说出为什么。"""

    def together(*arguments: str, processes: int = 2) -> None:
        started = several(processes, *arguments)
        for process in started:
            assert process.wait() == 0, [other.err.read_text() for other in started]

    return together


@pytest.fixture
def command(workdir, monkeypatch, capsys):
    """在本进程里走一遍 ``main()``，返回 ``(退出码, stdout, stderr)``；省去重新导入。"""
    from distillab import cli

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["distillab", *arguments])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


@pytest.fixture
def train_recipe(command):
    """训练一份配方，要成功；返回它印出的全部。"""

    def train_recipe(recipe: str, name: str, *overrides: str, resume: bool = False) -> str:
        sets = [word for one in (*overrides, f"name={name}") for word in ("--set", one)]
        code, out, err = command("train", recipe, *sets, *["--resume"] * resume)
        assert code == 0, err
        return out + err

    return train_recipe


@pytest.fixture
def stub(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Stub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()
