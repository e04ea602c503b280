"""「配方参考」页：由 ``Recipe`` 的字段生成，键、类型、缺省值与说明因而不会过时。"""

from __future__ import annotations

import enum
import html
import inspect
import types
import typing
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from distillab.config.schema import Recipe

_HEADER = """# 配方参考

一份配方是一个 YAML 文件。这一页由代码里的配置模型生成：键、类型、缺省值、说明（英文，与
`distillab schema` 和编辑器里看到的相同）都以代码为准。

除了下面的键，最外层还可以写 `extends: other.yaml`：从另一份配方出发，映射逐键合并，其余整体替换；
`name` 与 `description` 不继承。命令行的 `--set KEY=VALUE` 覆盖任何一个键，可以重复，后者胜，例如
`--set train.learning_rate=1e-4`。不认识的键、类型不符的值、说不通的组合一律拒绝，见
[故障排除](troubleshooting.md#配方)。

`train.alpha`、`train.temperature` 与 `loss.alpha`、`loss.temperature` 是同一个数的两种写法。
"""


def page() -> str:
    """整页的 Markdown。"""
    return "\n".join([_HEADER, *_section()])


def keys() -> list[str]:
    """配方的全部键，写成 ``train.seed`` 的样子；``NAME`` 是使用者起的名字。"""
    return [_joined(section, key) for section, _, own in _sections("", (Recipe,)) for key in own]


Models = tuple[type[BaseModel], ...]
"""一节的写法，通常只有一种。"""
_EACH = {"": "一节", "NAME": "每个名字一节", "N": "第 N 个（从 0 起）一节"}


def _sections(
    name: str, models: Models, seen: Models = ()
) -> Iterator[tuple[str, Models, dict[str, FieldInfo]]]:
    """``(键, 写法, 它的字段)``；另一节也有的字段在那里说。"""
    fields = {
        field.alias or key: field
        for model in models
        for key, field in model.model_fields.items()
        if not any(key in base.model_fields for base in seen if issubclass(model, base))
    }
    yield name, models, fields
    for key, field in fields.items():
        nested, many = _nested(field.annotation)
        if nested:
            child = ".".join(filter(None, (name, key, many)))
            yield from _sections(child, nested, (*seen, *models))


def _section() -> Iterator[str]:
    for name, models, fields in _sections("", (Recipe,)):
        depth = 2 + name.count(".")
        title = f"`{name}`" if name else "最外层"
        anchor = name.replace(".", "-").lower() or "top"
        yield f"{'#' * min(depth, 4)} {title} {{ #{anchor} }}\n"
        yield " 或者：".join(map(_first_paragraph, models)) + "\n"
        yield "| 键 | 类型 | 缺省 | 说明 |\n| --- | --- | --- | --- |"
        for key, field in fields.items():
            yield _row(name, key, field)
        yield ""


def _row(section: str, key: str, field: FieldInfo) -> str:
    nested, many = _nested(field.annotation)
    if not nested:
        kind, description = f"`{_type(field.annotation)}`", field.description or ""
    else:
        anchor = ".".join(filter(None, (section, key, many))).replace(".", "-").lower()
        kind = f"[{_EACH[many]}](#{anchor})"
        description = field.description or _first_paragraph(nested[0])
    limits = _limits(field)
    cells = [f"`{key}`", kind + (f"，{limits}" if limits else ""), _default(field, bool(nested))]
    return "| " + " | ".join([*cells, _escaped(description)]) + " |"


def _joined(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key


def _nested(annotation: Any) -> tuple[Models, str]:
    """``(这个键下面一节的写法, 每个 NAME、每个 N 各一节，或就是一节)``。"""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return (annotation,), ""
    found = tuple(kind for part in get_args(annotation) for kind in _nested(part)[0])
    return found, {dict: "NAME", list: "N"}.get(get_origin(annotation), "") if found else ""


def _type(annotation: Any) -> str:
    """读配方的人看得懂的类型：``int``、``fp32 | bf16``、``int | null``。"""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "null"
    if annotation is Any:
        return "any"
    if origin is typing.Literal:
        return " | ".join(str(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type(part) for part in arguments)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin in (list, tuple, dict):
        return f"{origin.__name__}[{', '.join(_type(part) for part in arguments)}]"
    return str(annotation.__name__)


def _limits(field: FieldInfo) -> str:
    signs = {Gt: ("gt", ">"), Ge: ("ge", "≥"), Lt: ("lt", "<"), Le: ("le", "≤")}
    found = [
        f"{sign} {getattr(limit, name):g}"
        for limit in field.metadata
        for kind, (name, sign) in signs.items()
        if isinstance(limit, kind)
    ]
    found += ["非空" for limit in field.metadata if isinstance(limit, MinLen | MaxLen)]
    return "，".join(found)


def _default(field: FieldInfo, nested: bool) -> str:
    if field.is_required():
        return "**必填**"
    value = field.default if field.default_factory is None else PydanticUndefined
    if isinstance(value, BaseModel):
        changed = {key: getattr(value, key) for key in value.model_fields_set}
        return f"`{changed}`" if changed else "见该节"
    if value is None:
        return "-" if nested else "`null`"
    return f"`{_value(value)}`"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, tuple):
        return str(list(value))
    return repr(value) if isinstance(value, str) else str(value)


def _first_paragraph(model: type[BaseModel]) -> str:
    text = inspect.getdoc(model) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("``", "`")


def _escaped(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|")
