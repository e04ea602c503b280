"""印出该跑哪些测试：与 ``main`` 分叉以来改过的（也算还没有提交的），按房间。

改了 ``src`` 的一个房间就跑 ``tests`` 里同名的，base 是 ``tests`` 最外层的；测试文件改了就跑它自己。架构测试
总是跑。端到端的与对照别人的要几分钟，只有自己改了才在其中，其余留给 ``make test``。
"""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
ALWAYS = ROOT / "tests/test_architecture.py"
OUTSIDE = {"docs": "test_docs.py", "results": "test_results.py", "benchmarks": "benchmarks",
           "notebooks": "test_notebooks.py", "recipes": "config"}  # fmt: skip
"""包以外的目录，以及 ``tests`` 里与它对应的。"""


def changed() -> set[Path]:
    def git(*arguments: str) -> list[str]:
        done = subprocess.run(
            ["git", "-C", ROOT, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.split("\n")[:-1]

    (start,) = git("merge-base", "main", "HEAD")
    names = git("diff", "--name-only", start) + git("ls-files", "--others", "--exclude-standard")
    return {Path(name) for name in names}


def tests_of(paths: set[Path]) -> set[Path]:
    found = {ALWAYS}
    for path in paths:
        where, *parts = path.parts
        if where == "src":  # src/distillab/ROOM/FILE，或 base 的 src/distillab/FILE
            room = ROOT / "tests" / parts[1]
            found |= {room} if room.is_dir() else set((ROOT / "tests").glob("test_*.py"))
        elif path.name.startswith("test_") and path.suffix == ".py":
            found.add(ROOT / path)
        elif where == "tests" and len(parts) > 1 and parts[0] not in ("e2e", "fuzz"):
            found.add(ROOT / where / parts[0])
        elif where in OUTSIDE:
            found.add(ROOT / "tests" / OUTSIDE[where])
    return {path for path in found if path.exists()}


def distinct(paths: set[Path]) -> list[Path]:
    """去掉已在别的目录里的；pytest 把它们当作两遍。"""
    return sorted(path for path in paths if not paths & set(path.parents))


if __name__ == "__main__":
    print(*(path.relative_to(ROOT) for path in distinct(tests_of(changed()))))
