"""配方文件：读 YAML、``extends``、``--set`` 覆盖，把不合法之处说成一行。"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from ..cache import expanded
from ..errors import DistillabError, nearest
from ..parsing import leaves, parse_yaml
from ..sources import shipped_directory
from .mixture import TAGS
from .schema import Recipe

OVERRIDE = "--set"
"""覆盖项在报错里的「文件名」。"""


def shipped_recipes() -> dict[str, Path]:
    """随包发布的配方：名字到文件；``_`` 开头的只供 ``extends``，旁边的数据与引擎配置不是配方。"""
    directory, found = shipped_directory(), {}
    for path in sorted(directory.rglob("*.yaml")):
        name = path.relative_to(directory).with_suffix("").as_posix()
        if path.name[0] != "_" and name.count("/") < 2 and not name.startswith("accelerate/"):
            found[name] = path
    return found


def find_recipe(name: str) -> Path:
    """把命令行上的 RECIPE 变成文件：一个路径，或随包配方的名字。"""
    path = expanded(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    if path.suffix in (".yaml", ".yml") or os.sep in name:
        raise DistillabError(f"{name}: no such recipe file")
    raise DistillabError(f"no recipe named '{name}'; {nearest(name, shipped)}")


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """读出一份配方：文件路径或随包配方的名字，加上 ``train.seed=1`` 这样的覆盖项，后者胜。

    ``name`` 这个键缺省为文件名。读不了、有不合法的键与值都是一行的 ``DistillabError``。
    """
    path = find_recipe(name)
    origins: dict[str, str] = {}
    values = _with_parents(path, origins)
    values.setdefault("name", path.stem)
    for override in overrides:
        _merge(values, _override(override), OVERRIDE, origins)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise DistillabError(_one_line(error, origins, str(path))) from None


def dump_recipe(recipe: Recipe, *, public: bool = False) -> str:
    """解析后的配方，可以原样再读的 YAML；``public`` 的没有 ``synthesize.server``：那是自己的。"""
    values = recipe.values()
    if public:
        del values["synthesize"]["server"]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def recipe_schema() -> dict[str, Any]:
    """配方文件的 JSON Schema，供编辑器补全。父配方可以给出任何键，故没有必填项。"""
    schema = Recipe.model_json_schema(by_alias=True)
    schema["title"] = "distillab recipe"
    schema["properties"] = {
        "extends": {"type": "string", "description": "Recipe file that this one starts from."},
        **schema["properties"],
    }
    schema.pop("required", None)
    return schema


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DistillabError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DistillabError(f"{path}: not UTF-8 text; a recipe is a YAML file") from None
    values = parse_yaml(text, str(path))
    if values is None:
        raise DistillabError(f"{path}: empty; a recipe needs at least data.source")
    if not isinstance(values, dict):
        found = type(values).__name__
        raise DistillabError(
            f"{path}: found a {found}, expected a mapping with keys like student, teacher, data"
        )
    return values


def _with_parents(
    path: Path, origins: dict[str, str], children: tuple[Path, ...] = ()
) -> dict[str, Any]:
    if path.resolve() in children:
        raise DistillabError(f"{path}: extends itself, through {children[-1].name}")
    values = _read(path)
    parent = values.pop("extends", None)
    merged: dict[str, Any] = {}
    if parent is not None:
        if not isinstance(parent, str):
            raise DistillabError(f"{path}: extends: found {parent!r}, expected one file name")
        parent_path = path.parent / parent
        if not parent_path.is_file():
            siblings = [entry.name for entry in path.parent.glob("*.yaml") if entry != path]
            hint = f"; {nearest(parent, siblings)}" if siblings else ""
            raise DistillabError(f"{path}: extends: no file {parent}{hint}")
        merged = _with_parents(parent_path, origins, (*children, path.resolve()))
        for inherited in ("name", "description"):  # 名字与说明属于文件，不随 extends 继承
            merged.pop(inherited, None)
    _merge(merged, values, str(path), origins)
    return merged


def _merge(
    target: dict[str, Any],
    source: dict[str, Any],
    origin: str,
    origins: dict[str, str],
    prefix: str = "",
) -> None:
    """``source`` 的值盖过 ``target``：映射逐键合并，列表按序号（``data.mixture.1.weight``），其余整
    体替换；记下每个键出自哪里。
    """
    for key, value in source.items():
        name = f"{prefix}{key}"
        origins[name] = origin
        old = target.get(key)
        if name == "data" and isinstance(value, dict) and isinstance(value.get("mixture"), list):
            old = None  # 几个来源各有自己的键，父配方那一个来源的不留下
        if isinstance(old, list) and isinstance(value, dict):
            items = {str(i): item for i, item in enumerate(old)}
            _merge(items, value, origin, origins, f"{name}.")
            if len(items) > len(old):
                raise DistillabError(f"{origin}: {name} has items 0 to {len(old) - 1}, found "
                                     f"{list(items)[-1]!r}")  # fmt: skip
            target[key] = list(items.values())
        elif isinstance(value, dict) and isinstance(old, dict):
            _merge(old, value, origin, origins, f"{name}.")
        else:
            target[key] = value
            origins |= {child: origin for child, _ in leaves(value, name)}


def _override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise DistillabError(  # 值不写出来：它可能是密钥
            f"{OVERRIDE} {key.partition(':')[0]}: expected KEY=VALUE, as in "
            f"train.learning_rate=1e-4"
        )
    *outer, last = key.split(".")
    override = {last: parse_yaml(value, f"{OVERRIDE} {key}")}
    for part in reversed(outer):
        override = {part: override}
    return override


def _one_line(error: ValidationError, origins: dict[str, str], default: str) -> str:
    details = error.errors(include_url=False)
    first = details[0]
    first["loc"] = tuple(part for part in first["loc"] if part not in TAGS)
    key = ".".join(str(part) for part in first["loc"])
    known = first["ctx"]["key"] if first["type"] == "secret" else key
    while known and known not in origins:
        known = known.rpartition("[" if known.endswith("]") else ".")[0]
    where = origins.get(known, default)
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return f"{where}: {_problem(key, first)}{more}"


def _problem(key: str, detail: Any) -> str:
    kind, parent = detail["type"], detail["loc"][:-1]
    if kind == "secret":
        return str(detail["msg"])
    found = repr(detail["input"])
    if detail["loc"][:2] == ("synthesize", "server"):  # 那一节里，写错了地方的多半就是密钥
        found = f"a {type(detail['input']).__name__}"
    if kind == "extra_forbidden":
        return f"unknown key '{key}'; {nearest(key.rpartition('.')[2], _fields(parent))}"
    if kind == "missing":
        return f"key '{key}' is required"
    if kind == "value_error":
        message = detail["msg"].removeprefix("Value error, ")
        return f"{key}: {message}" if key else message
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
        return f"{key}: found {found}; {nearest(str(detail['input']), choices)}"
    if kind == "model_type":
        keys = ", ".join(_fields(detail["loc"]))
        return f"{key}: found {found}, expected a mapping with keys {keys}"
    if kind == "string_pattern_mismatch":
        return f"{key}: found {found}, expected text that matches {detail['ctx']['pattern']}"
    expected = re.sub(r"^(Input should be (a valid )?|\w+ should have )", "", detail["msg"])
    return f"{key}: found {found}, expected {expected}"


def _fields(location: Sequence[Any]) -> list[str]:
    """``location`` 所指那一节的合法键。"""
    section: type[BaseModel] = Recipe
    for part, inner in zip_longest(location, location[1:]):
        field = section.model_fields.get(str(part)) or next(
            (field for field in section.model_fields.values() if field.alias == part), None
        )
        annotation = field.annotation if field else None
        options = [annotation, *get_args(annotation)]
        options += [kind for option in options for kind in get_args(option)[:1]]
        sections = [
            kind for kind in options if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        having = (kind for kind in sections if inner in kind.model_fields)
        section = next(having, sections[0] if sections else section)
    return [field.alias or name for name, field in section.model_fields.items()]
