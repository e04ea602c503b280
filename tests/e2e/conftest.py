"""端到端测试的零件：磁盘上的小教师、小文本和一份配方，全部离线。"""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
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


@pytest.fixture
def start(workdir):
    """在子进程里起一条真正的命令。"""

    def start(*arguments: str) -> subprocess.Popen:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"}
        return subprocess.Popen(
            [sys.executable, "-m", "distillab", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    return start


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
