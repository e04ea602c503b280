"""chat template 在另一个进程里渲染：时间与内存都有界。

模板是别人写的程序。Jinja 的沙箱管得住它碰什么，管不住它算多久、占多少，逐个防也防不完，所以让操作系
统来管：子进程的 CPU 时间与地址空间有上限，超过了就停下它，说一行。渲染用的是 transformers 自己的
``render_jinja_template``，文字与 ``apply_chat_template`` 相同，只有 ``strftime_now`` 给出的日期可以
由调用者定下来。
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

from ..errors import DistillabError, reason
from .forms import Message

Span = tuple[int, int]
"""文字里的 ``[start, end)``，单位是字符。"""

SECONDS = 10.0
"""一段对话的各次渲染一共最多用多少 CPU 时间。"""
MEMORY = 1 << 30
"""渲染最多用多少内存，单位字节。"""
_PLAIN, _TIMES = 1_000_000, 20
"""渲染出的文字至多比给它的长这么多字符、这么多倍：再长，分词就占满内存了。"""
_START = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); " \
         "from distillab.data.rendering import serve; serve()"  # fmt: skip


@dataclass(frozen=True)
class Rendered:
    """一次渲染。"""

    text: str
    blocks: list[Span]  # {% generation %} 圈出的各段
    error: str | None  # 模板为什么拒绝；那时 text 为空


@dataclass(frozen=True)
class Request:
    """一段对话的若干个开头。"""

    messages: Sequence[Message]
    wanted: Sequence[tuple[int, bool]]  # （前几轮，要不要 generation prompt）
    variables: Mapping[str, Any]  # 模板读的其余变量，能写成 JSON
    blocks: bool = False  # 要不要 {% generation %} 圈出的各段
    today: date | None = None  # 模板写的日期

    def line(self) -> bytes:
        """写成一行 JSON。"""
        text = json.dumps(self.__dict__, ensure_ascii=False, separators=(",", ":"), default=str)
        return text.encode("utf-8", "surrogatepass")


def rendered(template: str, request: Request) -> list[Rendered]:
    """渲染一段对话的若干个开头；模板用的时间或内存超过了界限，或写得太长，就报错。"""
    line = request.line()
    reply = _ahead.pop((template, line), None) or _process.ask(template, [line])[0]
    if "stopped" in reply:
        raise DistillabError(f"the chat template was stopped: it {reply['stopped']}")
    return [
        Rendered(text, [(start, end) for start, end in spans], error)
        for text, spans, error in reply["rendered"]
    ]


def render_ahead(template: str, requests: Sequence[Request]) -> None:
    """先渲染好接下来要的几段，分摊来回一次的等待；其中有一段超限时什么也不留下：轮到它时再渲染一
    次，错误才说得出是哪一条数据。
    """
    lines = [request.line() for request in requests]
    _ahead.clear()
    replies = _process.ask(template, lines)
    if len(replies) == len(lines):
        _ahead.update(zip([(template, line) for line in lines], replies, strict=True))


_ahead: dict[tuple[str, bytes], dict[str, Any]] = {}


# ---------------------------------------------------------------------- 这边


class _Process:
    """渲染的子进程：第一次用到时才起，停下了就另起一个。"""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._template: str | None = None

    def ask(self, template: str, lines: list[bytes]) -> list[dict[str, Any]]:
        """问几段；子进程因为超限而死，就只有一个答复，说它超了什么。"""
        head: dict[str, Any] = {"seconds": SECONDS}
        with self._lock:
            child = self._running()
            if self._template != template:  # 模板有几千字，只送一次
                head["template"] = template
            body = b'{"requests":[' + b",".join(lines) + b"]," + json.dumps(head).encode()[1:]
            try:
                line = self._exchange(child, body + b"\n")
                self._template = template
            except BaseException:  # 半途而废，管道里还留着别人的答案
                self._stop()
                raise
            if line:
                reply: Any = json.loads(line)
                if "bug" in reply:
                    raise RuntimeError(reply["bug"])
                replies: list[dict[str, Any]] = reply["replies"]
                return replies
            code = child.wait()
            self._stop()
            if code == -signal.SIGPROF:
                return [{"stopped": f"took more than {SECONDS:g} s"}]
            if code < 0:  # 没有内存时，C 写的库常常不抛异常就结束进程
                return [{"stopped": f"crashed its process ({signal.Signals(-code).name})"}]
            raise RuntimeError(f"the rendering process ended with exit code {code}")

    @staticmethod
    def _exchange(child: subprocess.Popen[bytes], line: bytes) -> bytes:
        assert child.stdin is not None
        assert child.stdout is not None
        with suppress(BrokenPipeError):  # 已经死了：读到的是空，下面看它的退出码
            child.stdin.write(line)
            child.stdin.flush()
        return child.stdout.readline()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._owner != os.getpid():  # fork 出来的进程不能与别人共用一根管道
            self._child = None
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C 是给这边的
            )
            self._owner, self._template = os.getpid(), None
        return self._child

    def _stop(self) -> None:
        if self._child is not None and self._owner == os.getpid():
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                with suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
        self._child = None


_process = _Process()
atexit.register(_process._stop)


# ---------------------------------------------------------------------- 那边


def serve() -> None:
    """子进程的循环：从标准输入读一行请求，往标准输出写一行答复，直到输入结束。"""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # 库里的 print 不能混进答复
    from transformers.utils import chat_template_utils

    _limit_memory()
    template = ""
    for line in sys.stdin.buffer:
        try:
            asked = json.loads(line)
            template = asked.get("template", template)
            replies = [
                _reply(chat_template_utils, template, request, asked["seconds"])
                for request in asked["requests"]
            ]
            answer: dict[str, Any] = {"replies": replies}
        except Exception:  # 我们自己的错：traceback 交回去
            import traceback

            answer = {"bug": traceback.format_exc()}
        text = json.dumps(answer, ensure_ascii=False, separators=(",", ":"))
        answers.write(text.encode("utf-8", "surrogatepass") + b"\n")
        answers.flush()


class _TooLongError(Exception):
    """渲染出的文字太长。"""


def _reply(library: Any, template: str, request: Any, seconds: float) -> dict[str, Any]:
    # 默认的处置是结束进程：卡在一次大数乘法里的 Python 听不见信号的处理函数。
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return {"rendered": _answers(library, template, request)}
    except MemoryError:
        return {"stopped": f"took more than {MEMORY >> 20} MB of memory"}
    except _TooLongError as error:
        return {"stopped": str(error)}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _answers(library: Any, template: str, request: Any) -> list[tuple[str, list[Span], str | None]]:
    given = sum(len(str(text)) for turn in request["messages"] for text in turn.values())
    longest = _PLAIN + _TIMES * (given + len(str(request["variables"])))
    answers: list[tuple[str, list[Span], str | None]] = []
    for turns, prompt in request["wanted"]:
        messages = request["messages"][:turns]
        try:
            _fix_date(library._compile_jinja_template(template), request["today"])
            texts, spans = library.render_jinja_template(
                conversations=[messages],
                chat_template=template,
                return_assistant_tokens_mask=request["blocks"],
                add_generation_prompt=prompt,
                **request["variables"],
            )
        except MemoryError:
            raise
        except Exception as error:  # 模板是别人的程序，什么都可能抛出
            answers.append(("", [], reason(error)))
            continue
        if len(texts[0]) > longest:
            raise _TooLongError(f"writes {len(texts[0]):,} characters for {turns} turns")
        answers.append((texts[0], spans[0] if request["blocks"] else [], None))
    return answers


def _fix_date(template: Any, today: str | None) -> None:
    def strftime_now(form: str) -> str:
        day = datetime.now() if today is None else datetime.fromisoformat(today)
        return day.strftime(form)

    template.globals["strftime_now"] = strftime_now


def _limit_memory() -> None:
    try:
        import resource

        import psutil
    except ImportError:  # Windows 没有 resource
        return
    limit = psutil.Process().memory_info().vms + MEMORY
    with suppress(ValueError, OSError):  # macOS 不管地址空间
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
