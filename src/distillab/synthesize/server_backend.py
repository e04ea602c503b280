"""OpenAI 兼容的服务当教师：vLLM、SGLang、``transformers serve``、DashScope、DeepSeek 等。

重试、退避与 ``Retry-After`` 由 ``openai`` 的客户端做（429、408、409、5xx、断线与超时；服务要求
等两分钟以上的不再重试）。这里分清三种失败：密钥或模型名不对，马上停；一个问题没有答成，跳过它；
接连失败，多半是服务坏了，停下来。
"""

from __future__ import annotations

import json
import os
import queue
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from ..config.sections import SamplingConfig, ServerConfig
from ..errors import DistillabError, reason
from ..parsing import parse_json
from .questions import TOO_LONG, Answer, Outcome, Question, Unanswered

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

_POLL_SECONDS = 0.2
_ERROR_CHARACTERS = 1 << 16
_CANNOT_CONNECT = "cannot connect"
_HOPELESS = {401, 402, 403, 404, 405}  # 密钥、余额、权限、模型名或地址：再问一万次也一样
_REFUSED = {400, 422}  # 这一个请求不合服务的意；有的服务也用它说没有这个模型
_NO_SUCH_MODEL = re.compile(r"model\b.*\bnot (exist|found)|server is pinned to", re.I)
_CONTEXT = re.compile(r"context.?length|maximum context", re.I)


class _Part(BaseModel):
    """一段文字；图片、拒答等别的东西认不出。"""

    type: Literal["text"]
    text: str


class _Message(BaseModel):
    """``content`` 之外的都要么收下，要么认作没有答成：略过它们就不是服务的回答了。"""

    content: str | list[_Part] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None
    refusal: str | None = None

    @property
    def text(self) -> str:
        """说出来的话。"""
        parts = self.content or ""
        return parts if isinstance(parts, str) else "".join(part.text for part in parts)

    @property
    def thought(self) -> str | None:
        """思考过程；多数服务叫它 ``reasoning_content``，新的 vLLM 叫 ``reasoning``。"""
        return self.reasoning_content or self.reasoning or None

    @property
    def unusable(self) -> str | None:
        """有什么用不上的。"""
        names = ("tool_calls", "function_call", "refusal")
        return next((name for name in names if getattr(self, name)), None)


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    completion_tokens: int | None = None


class _Completion(BaseModel):
    """``/chat/completions`` 的回复里用得到的部分；openai 的客户端自己不查。"""

    choices: list[_Choice] = Field(min_length=1)
    model: str | None = None
    usage: _Usage | None = None


class _HopelessError(Exception):
    """不必再问下去了。"""


class ServerBackend:
    """由服务回答，至多 ``config.concurrency`` 个请求同时在途。

    ``temperature`` 大于 0 时每个请求带自己的种子；服务不认就不带。同一个种子是否给出同一个回答，
    取决于服务。没有装 ``openai``，或说好放密钥的环境变量里没有密钥，就是 ``DistillabError``。
    """

    def __init__(self, config: ServerConfig, sampling: SamplingConfig) -> None:
        try:
            import openai
        except ImportError as error:
            raise DistillabError(
                "synthesize.server needs the openai package: pip install 'distillab[server]'"
            ) from error
        self.config = config
        self._key = _read_key(config.api_key_env)
        self._send_seed = sampling.temperature > 0
        self._options: dict[str, Any] = {
            "model": config.model,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "extra_body": dict(config.extra_body),
        }
        if sampling.top_p is not None:
            self._options["top_p"] = sampling.top_p
        if sampling.top_k is not None:  # 不在 OpenAI 的协议里
            self._options["extra_body"]["top_k"] = sampling.top_k
        if self._key is None:
            self._options["extra_headers"] = {"Authorization": openai.Omit()}

    def describe(self) -> dict[str, Any]:
        """写进来历的信息；没有密钥。"""
        return {
            "kind": "server",
            "model": self.config.model,
            "base_url": self.config.base_url,
            "extra_body": self.config.extra_body,
        }

    def answer(
        self, questions: Sequence[Question], stopped: Callable[[], bool]
    ) -> Generator[Sequence[Outcome], None, None]:
        """回答全部问题，谁先答完谁先给出；密钥、模型名或地址不对，或接连 ``2 * concurrency`` 个没有
        答成，是 ``DistillabError``。
        """
        from anyio.from_thread import start_blocking_portal

        # 网络在另一个线程里：落盘与使用者的过滤再慢，也不会让途中的请求超时；notebook 的主线程
        # 已经有事件循环，也不能再起一个。
        outcomes: queue.SimpleQueue[Outcome | None] = queue.SimpleQueue()
        with start_blocking_portal() as portal:
            asking = portal.start_task_soon(self._ask_all, questions, outcomes.put)
            asking.add_done_callback(lambda _: outcomes.put(None))
            while not asking.done():
                yield list(_waiting(outcomes, _POLL_SECONDS))
                if stopped():
                    asking.cancel()
        yield list(_waiting(outcomes, 0))
        if not asking.cancelled() and (problem := asking.result()) is not None:
            raise DistillabError(problem)

    async def _ask_all(
        self, questions: Sequence[Question], emit: Callable[[Outcome], None]
    ) -> str | None:
        """并发地问；返回半途而废的原因。"""
        import anyio

        remaining = iter(questions)
        problem: str | None = None
        failures, answered = 0, False

        async def work() -> None:
            nonlocal problem, failures, answered
            for question in remaining:  # 几个 work 共用一个迭代器
                try:
                    outcome = await self._ask(client, question)
                except _HopelessError as error:
                    problem = problem or str(error)
                    break
                emit(outcome)
                if isinstance(outcome, Answer):
                    failures, answered = 0, True
                    continue
                failures += 1
                if not answered and outcome.reason == _CANNOT_CONNECT:
                    problem = f"cannot connect to {self.config.base_url}: is it up?"
                elif failures >= 2 * self.config.concurrency:
                    problem = (
                        f"{self.config.base_url} failed {failures} times in a row, "
                        f"the last with: {outcome.reason}"
                    )
                if problem is not None:
                    break
            if problem is not None:
                group.cancel_scope.cancel()

        async with self._client() as client, anyio.create_task_group() as group:
            for _ in range(self.config.concurrency):
                group.start_soon(work)
        return problem

    def _client(self) -> AsyncOpenAI:
        from openai import AsyncOpenAI

        from .replies import BoundedClient

        return AsyncOpenAI(
            http_client=BoundedClient(self.config.timeout),
            base_url=self.config.base_url,
            # 不给的话客户端会去读 OPENAI_API_KEY：别人的服务不该收到它。
            api_key=self._key or "none",
            max_retries=self.config.max_retries,
            timeout=self.config.timeout,
        )

    async def _ask(self, client: AsyncOpenAI, question: Question) -> Outcome:
        import openai

        from .replies import BadReply, Redirected

        seed = question.seed if self._send_seed else None
        options = self._options if seed is None else self._options | {"seed": seed}
        if question.task.tools is not None:
            options = options | {"tools": question.task.tools}
        try:
            reply = await client.chat.completions.with_raw_response.create(
                messages=question.task.messages, **options
            )
            body: bytes = reply.content
        except Redirected as error:
            raise _HopelessError(
                f"{self.config.base_url} redirects to {error}, which is not followed: the request "
                f"holds data, and may hold a key; where you trust it, set server.base_url to it"
            ) from None
        except BadReply as error:
            return Unanswered(question, str(error))
        except openai.APIStatusError as error:
            return await self._refused(client, question, seed, error)
        except openai.APITimeoutError:
            return Unanswered(question, f"no reply within {self.config.timeout:g} s")
        except openai.APIConnectionError:
            return Unanswered(question, _CANNOT_CONNECT)
        except openai.OpenAIError as error:
            return Unanswered(question, type(error).__name__)
        except Exception as error:  # 乱写的头与正文，让 openai 与 httpx 抛出什么的都有
            return Unanswered(question, f"unexpected reply ({reason(error)})")
        try:
            return self._answer(question, body, seed)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "body"
            return Unanswered(question, f"unexpected reply ({where}: {first['msg']})")

    def _answer(self, question: Question, body: bytes, seed: int | None) -> Outcome:
        completion = _Completion.model_validate_json(body)
        choice, usage = completion.choices[0], completion.usage
        message = choice.message
        if message.unusable is not None:
            return Unanswered(
                question, f"unexpected reply (choices.0.message: it holds {message.unusable})"
            )
        # 还没想完就到了上限：记下来，再问一遍也一样。
        if not message.text and not (message.thought and choice.finish_reason == "length"):
            return Unanswered(question, "unexpected reply (choices.0.message.content: no text)")
        return Answer(
            question,
            message.text,
            finish_reason=choice.finish_reason or "unknown",
            model=completion.model or self.config.model,
            tokens=usage.completion_tokens if usage is not None else None,
            seed=seed,
            reasoning=message.thought,
        )

    async def _refused(
        self, client: AsyncOpenAI, question: Question, seed: int | None, error: APIStatusError
    ) -> Outcome:
        """服务回了 4xx 或 5xx，而且重试也没有用。"""
        status, text = error.status_code, self._text(error)
        if status in _REFUSED and seed is not None and "seed" in text:
            self._send_seed = False
            return await self._ask(client, question)
        if status in _REFUSED and _CONTEXT.search(text):
            return Answer(question, "", TOO_LONG, self.config.model, tokens=0, error=text)
        server, model = self.config.base_url, self.config.model
        if status in (401, 403):
            key = self.config.api_key_env
            cause = f"the key in {key} was refused" if key else "set server.api_key_env"
            raise _HopelessError(f"{server} answered HTTP {status} for model {model!r}: {cause}")
        if status in _HOPELESS or (status in _REFUSED and _NO_SUCH_MODEL.search(text)):
            raise _HopelessError(
                f"{server} answered HTTP {status} for model {model!r}: {text}; "
                f"check server.model and server.base_url (up to and including /v1)"
            )
        return Unanswered(question, f"HTTP {status}: {text}" if text else f"HTTP {status}")

    def _text(self, error: APIStatusError) -> str:
        """服务的话，一行；有的服务会把密钥原样送回来。"""
        text = error.response.text[:_ERROR_CHARACTERS]
        with suppress(DistillabError):
            body = parse_json(text, "reply")
            for key in ("error", "message", "detail"):  # OpenAI 与 vLLM、FastAPI 各有写法
                body = body[key] if isinstance(body, dict) and key in body else body
            text = body if isinstance(body, str) else json.dumps(body)
        if self._key:
            text = text.replace(self._key, "***")
        text = " ".join(text.split())
        return text if len(text) <= 160 else f"{text[:157]}..."


def _read_key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise DistillabError(
            f"server.api_key_env names {name}, which is not set: export {name}=... first"
        )
    if not (key.isascii() and key.isprintable()):  # 否则 httpx 的异常会把它整个印出来
        raise DistillabError(f"{name} holds characters that no key has; set it again")
    return key


def _waiting(outcomes: queue.SimpleQueue[Outcome | None], timeout: float) -> Iterator[Outcome]:
    """队列里现有的；空着就至多等 ``timeout`` 秒。"""
    with suppress(queue.Empty):
        while True:
            if (outcome := outcomes.get(timeout=timeout)) is not None:  # None 只是叫醒等待的人
                yield outcome
            timeout = 0
