"""收服务的回复：不跟着它去别的主机，不无限地等，也不让它占满内存。

``openai`` 的客户端按每次读来计时：一秒送来一个字节的服务可以拖到天荒地老。它也跟随一切重定向，
又一口气解开压缩的回复：10 MB 的 gzip 可以是 10 GB 的空白。
"""

from __future__ import annotations

from typing import Any

import anyio
import openai

MAX_BYTES = 64 << 20
"""一个回复解压之后最多这么大；几十万 token 的回答也不过几 MB。"""

_ENCODINGS = ("", "identity", "gzip")
"""收得下的 ``Content-Encoding``：层层相套的，与一步就解开的 ``br``，界限管不住。"""


class BadReply(openai.OpenAIError):  # type: ignore[misc]
    """这样的回复不收；``openai`` 不会为它重试。"""


class Redirected(BadReply):
    """服务要把请求引到别的主机。"""


class BoundedClient(openai.DefaultAsyncHttpxClient):  # type: ignore[misc]
    """``AsyncOpenAI(http_client=...)`` 用的客户端：整个回复一个大小，重定向只在同一个主机之内。

    ``seconds`` 是一个请求连同收完它的回复的时限，拖过的抛出 ``openai.APITimeoutError``；不合规矩的
    回复抛出 ``BadReply``。
    """

    def __init__(self, seconds: float, **options: Any) -> None:
        super().__init__(event_hooks={"response": [_stay]}, **options)
        self.seconds = seconds

    async def send(self, request: Any, **options: Any) -> Any:
        """发出请求，收完回复。"""
        request.headers["Accept-Encoding"] = "gzip"
        try:
            # 一声不响的服务由各次读的时限先发现，那会重试；到这里的是拖着不完的。
            with anyio.fail_after(self.seconds + 1):
                response = await super().send(request, **{**options, "stream": True})
                try:
                    content = await _bounded(response)
                finally:
                    await response.aclose()
        except TimeoutError:
            raise openai.APITimeoutError(request=request) from None
        headers = [
            (name, value)
            for name, value in response.headers.multi_items()
            if name.lower() not in ("content-encoding", "content-length", "transfer-encoding")
        ]
        whole = type(response)(
            response.status_code, headers=headers, content=content, request=response.request
        )
        whole.history = response.history
        return whole


async def _stay(response: Any) -> None:
    """去别的主机的重定向不跟：请求里有密钥，也有数据。"""
    if not response.has_redirect_location:
        return
    here = response.request.url
    there = here.join(response.headers["location"])
    same = (there.scheme, there.host, there.port) == (here.scheme, here.host, here.port)
    upgraded = (here.scheme, there.scheme) == ("http", "https") and there.host == here.host
    if not (same or upgraded):
        raise Redirected(f"{there.scheme}://{there.netloc.decode('ascii', 'replace')}")


async def _bounded(response: Any) -> bytes:
    encoding = response.headers.get("content-encoding", "").strip().lower()
    if encoding not in _ENCODINGS:
        raise BadReply(f"a reply compressed with {encoding[:40]!r}, expected gzip")
    content = bytearray()
    async for part in response.aiter_bytes(1 << 16):
        content += part
        if len(content) > MAX_BYTES:
            raise BadReply(f"a reply above {MAX_BYTES >> 20} MiB")
    return bytes(content)
