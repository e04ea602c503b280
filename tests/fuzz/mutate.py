"""怎样把一份好的输入改坏：改它的结构（JSON 的值、键、层次），或改它的字节。"""

import copy
from random import Random
from typing import Any

ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 10**9, -(10**18), 10**400, 0.0, -0.5, 1e-300, 1e308,
    float("nan"), float("inf"), "", " ", "0", "-1", "null", "x" * 5000, "a\nb", "\x00", "\x1b[31m",
    "[/red]", "\ud800", "\u202e", "../../etc", "~nobody/x", "<|im_end|>", "{{ 1 }}", [], [[]], {},
    [None], {"": None}, [1, "a", None], {"a": {"b": [1, 2]}},
]  # fmt: skip
"""容易被想当然的值。"""


def structure(value: Any, random: Random) -> Any:
    """改一到三处：换成怪值、删去、重复、换键、换成别处的值、包一层、套得很深。"""
    value = copy.deepcopy(value)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = list(_places(value, []))
        path = random.choice(places)
        if not path:
            value = random.choice(ODD_VALUES) if random.random() < 0.2 else [value]
            continue
        parent = value
        for step in path[:-1]:
            parent = parent[step]
        key = path[-1]
        kind = random.randrange(7)
        if kind < 3:
            parent[key] = copy.deepcopy(random.choice(ODD_VALUES))
        elif kind == 3:
            del parent[key]
        elif kind == 4:
            other = random.choice(places)
            found = value
            for step in other:
                found = found[step]
            parent[key] = copy.deepcopy(found)
        elif kind == 5 and isinstance(parent, dict):
            name = random.choice(["", "id", f"{key}s", str(key).upper(), "\x00", "x" * 300])
            parent[name] = parent.pop(key)
        else:
            inner = parent[key]
            for _ in range(random.choice((1, 1, 3, 200))):
                inner = [inner]
            parent[key] = inner
    return value


def _places(value: Any, path: list[Any]) -> Any:
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _places(inner, [*path, key])
    elif isinstance(value, list):
        for index, inner in enumerate(value[:20]):
            yield from _places(inner, [*path, index])


def content(data: bytes, random: Random) -> bytes:
    """翻一位、改几个字节、删一段、插一段、重复一段、截断、清空、整段换成零。"""
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        kind, size = random.randrange(8), len(out)
        at = random.randrange(size) if size else 0
        end = min(size, at + random.choice((1, 2, 8, 64, 512)))
        if kind == 0 and size:
            out[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            for index in range(at, end):
                out[index] = random.randrange(256)
        elif kind == 2:
            del out[at:end]
        elif kind == 3:
            out[at:at] = random.choice(
                (b"\x00", b"\xff\xfe", b"\n", b'"', b"{", b"]" * 300, b"[" * 3000, b"9" * 5000,
                 b"\xed\xa0\x80", b"- *a\n", b"\x1b]0;x\x07")
            )  # fmt: skip
        elif kind == 4:
            out[at:at] = out[at:end]
        elif kind == 5:
            del out[at:]
        elif kind == 6:
            out[at:end] = bytes(end - at)
        elif kind == 7 and random.random() < 0.1:
            out.clear()
    return bytes(out)
