"""房间在一道楼梯上：导入只往下走，重的库不进轻的房间，一个文件一题。

python tests/test_architecture.py  # 各个房间的文件数与行数，以及它导入谁、几处
"""

import ast
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "distillab"
TOP = "run"
"""``run``、``terminal`` 与 ``cli``：楼梯的最上面。"""

STAIR = ("base", "config", "models", "loss", "data", "generate", "export", "distributed",
         "teachers", "synthesize", "train", "assembly", "evaluate")  # fmt: skip
"""每个房间可以导入它前面的。"""

NARROWER = {
    "loss": {"base", "config"},
    "plan": {"base", "config", "models", "loss", "data"},
    "report": {"base"},
    TOP: {*STAIR, "plan", "report"},
}
"""只可以导入这些的房间。"""

MODULES = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in PACKAGE.rglob("*.py")}
ROOMS = {*STAIR, *NARROWER}


def room(module: str) -> str:
    outer, dot, _ = module.partition(".")
    if dot:
        return outer
    return TOP if outer in ("run", "terminal", "cli", "__main__") else "base"


def imports(module: str) -> list[tuple[str, str]]:
    """``(模块, 名字)``；函数里的导入也算。"""
    package = module.split(".")[:-1]
    found = []
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = package[: len(package) + 1 - node.level]
            origin = ".".join([*start, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                inner = f"{origin}.{alias.name}".strip(".")
                found.append((inner, "") if inner in MODULES else (origin, alias.name))
    return [(origin, name) for origin, name in found if name != "__version__"]


def test_every_room_is_on_the_stair_and_says_what_it_holds():
    rooms = {path.parent.name for path in PACKAGE.rglob("*.py")} - {PACKAGE.name}
    assert rooms == ROOMS - {"base", TOP}
    assert all(
        ast.get_docstring(ast.parse((PACKAGE / r / "__init__.py").read_text())) for r in rooms
    )


def test_stems_are_unique():
    stems = [m.rpartition(".")[2] for m in MODULES if not m.endswith("__")]
    assert sorted(set(stems)) == sorted(stems)


@pytest.mark.parametrize("where", sorted(ROOMS))
def test_imports_point_down_the_stair(where):
    allowed = NARROWER.get(where) or {*STAIR[: STAIR.index(where)]}
    modules = [module for module in MODULES if room(module) == where]
    assert modules
    upward = [
        (module, origin)
        for module in modules
        for origin, _ in imports(module)
        if room(origin) not in allowed | {where}
    ]
    assert upward == []


def test_no_circles():
    """房间之间有楼梯，房间里面也没有。"""
    graph = {module: {origin for origin, _ in imports(module)} for module in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


def test_no_private_name_crosses_modules():
    crossing = [
        (module, origin, name)
        for module in MODULES
        for origin, name in imports(module)
        if name.startswith("_")
    ]
    assert crossing == []


def test_recipe_files_are_read_by_the_run_directory_and_the_commands_alone():
    users = {m for m in MODULES if any(origin == "config.recipes" for origin, _ in imports(m))}
    assert users == {"config.run_dir", "run", "cli"}


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("cli", "torch transformers pydantic matplotlib plotly jinja2 rich"),
        ("report.page, distillab.report.terminal_tables",
         "torch transformers pydantic matplotlib plotly"),
        ("config.recipes, distillab.config.run_dir", "torch transformers"),
        ("plan.plan, distillab.plan.table", "torch transformers"),
    ],
)  # fmt: skip
def test_light_rooms_need_none_of_the_heavy_libraries(modules, heavy):
    code = (
        f"import sys, distillab.{modules}; heavy = set('{heavy}'.split()) & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_files_are_of_one_subject():
    long = {m: count for m, path in MODULES.items() if (count := lines(path)) > 400}
    assert long == {}


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


if __name__ == "__main__":
    for where in (*STAIR, "plan", "report", TOP):
        inside = [module for module in MODULES if room(module) == where]
        arrows = Counter(
            room(origin)
            for module in inside
            for origin in {origin for origin, _ in imports(module)}
            if room(origin) != where
        )
        size = sum(lines(MODULES[module]) for module in inside)
        print(f"{where:12} {len(inside):3} files {size:6,} lines  ", dict(arrows))
