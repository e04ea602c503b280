"""认出写进配方的密钥：配方会存进运行目录、报告与来历文件，密钥只能留在环境变量里。"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

HIDDEN = "***"
"""写出来时代替密钥的字。"""

WAY_OUT = "recipes are saved: put it into an environment variable and name that in api_key_env"

_SECRETS = {
    "authorization", "bearer", "cookie", "credential", "credentials", "passphrase", "passwd",
    "password", "pwd", "secret", "secrets",
}  # fmt: skip
"""名字里有其中一个词的字段。"""
_KEYS = {"api", "access", "account", "auth", "private", "secret", "subscription"}
"""``KEY`` 之前的词。"""
_TOKENS = {"access", "api", "auth", "bearer", "hf", "id", "jwt", "refresh", "session"}
"""``TOKEN`` 之前的词；``stop_token``、``eos_token`` 不是密钥。"""
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_VALUE = re.compile(
    r"(?:Bearer|Basic|Token)\s+(?=\S*\d)\S{12,}"
    r"|sk-(?:\w+-)*(?=\w*\d)\w{16,}[\w-]*"  # OpenAI、DeepSeek、DashScope 与 Anthropic
    r"|(?:hf|gh[opsu])_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"
    r"|AKIA[0-9A-Z]{16}|AIza[\w-]{35}|xox[abps]-[\w-]{10,}"
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*"
)

_USER_INFO = re.compile(r"[A-Za-z][\w+.-]*://[^\s/?#]*@\S*")


def is_secret_name(name: str) -> bool:
    """叫这个名字的字段或 HTTP 头放的是不是密钥；大小写与分隔符不论。"""
    words = [word.lower() for word in _WORD.findall(name)]
    if not words:
        return False
    before, last = set(words[:-1]), words[-1]
    return (
        bool(_SECRETS & set(words))
        or last in ("apikey", "apikeys", "accesskey", "accesstoken", "authtoken")
        or (last in ("key", "keys") and bool(before & _KEYS))
        or (last == "token" and (not before or bool(before & _TOKENS)))
    )


def is_secret_value(text: str) -> bool:
    """一段文字整个就是密钥，或是带着用户名、密码的网址。"""
    text = text.strip()
    return _VALUE.fullmatch(text) is not None or _USER_INFO.fullmatch(text) is not None


def secrets_in(values: Any, prefix: str = "") -> Iterator[str]:
    """由 YAML 或 JSON 读出的值里，逐级找出放着密钥的键，如 ``server.api_key``；不说密钥是什么。"""
    if isinstance(values, Mapping):
        for key, value in values.items():
            shown = HIDDEN if is_secret_value(str(key)) else str(key)
            name = f"{prefix}.{shown}" if prefix else shown
            if shown == HIDDEN or _holds_secret(prefix, str(key), value):
                yield name
            else:
                yield from secrets_in(value, name)
    elif isinstance(values, (list, tuple)):
        for number, value in enumerate(values):
            yield from secrets_in(value, f"{prefix}[{number}]")
    elif isinstance(values, str) and is_secret_value(values):
        yield prefix


def without_secrets(values: Any, prefix: str = "") -> Any:
    """同样的值，密钥换成 ``***``：较早写下的文件里也许有。"""
    if isinstance(values, Mapping):
        cleaned = {}
        for key, value in values.items():
            name = HIDDEN if is_secret_value(str(key)) else key
            if _holds_secret(prefix, str(key), value):
                cleaned[name] = HIDDEN
            elif key == "base_url" and isinstance(value, str):
                cleaned[name] = bare_url(value)
            else:
                cleaned[name] = without_secrets(value, str(key))
        return cleaned
    if isinstance(values, (list, tuple)):
        return [without_secrets(value, prefix) for value in values]
    return HIDDEN if isinstance(values, str) and is_secret_value(values) else values


def bare_url(text: str) -> str:
    """网址去掉用户名、密码、参数、查询与片段；路径里看着像密钥的一段换成 ``***``。"""
    try:
        parts = urlsplit(text)
    except ValueError:
        return HIDDEN
    host = parts.netloc.rpartition("@")[2]
    path = re.split(r"[;=]", parts.path)[0].split("/")
    shown = "/".join(HIDDEN if is_secret_value(one) else one for one in path)
    return f"{parts.scheme}://{host}{shown}" if host else HIDDEN


def _holds_secret(parent: str, key: str, value: Any) -> bool:
    if value is None or isinstance(value, bool):
        return False
    named_by_user = parent.rpartition(".")[2] in ("tasks", "texts")
    return is_secret_name(key) and not named_by_user
