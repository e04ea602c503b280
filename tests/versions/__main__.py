"""别的 PyTorch、transformers、accelerate 上，损失、训练、生成与转换的测试也通过。

    python tests/versions [NAME ...]

一个 ``tests/versions/NAME.txt`` 是一个环境的约束，装在 ``.venv-versions/NAME``：Linux 上是 PyPI 的
CUDA 版 PyTorch，一个环境约 6 GB。别的版本的告警不算失败。最后印出一张表；有失败时退出码是 1。
"""

import os
import subprocess
import sys
import venv
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PACKAGES = ["torch", "transformers", "accelerate", "peft"]
TESTS = ["loss", "train", "generate", "export", "models", "test_batch.py",
         "parity/test_transformers.py", "e2e/test_cli.py"]  # fmt: skip
"""不需要 TRL、DeepSpeed、lm-eval 这些的测试。"""


def check(name: str) -> list[str]:
    """装好一个环境，在里面跑 ``TESTS``；表里的一行。"""
    place = ROOT / ".venv-versions" / name
    python, results = place / "bin/python", place / "results.xml"
    venv.create(place, with_pip=True, symlinks=True)
    install = ["-m", "pip", "install", "--quiet", "-c", HERE / f"{name}.txt", "-e", f"{ROOT}[peft]",
               "pytest", "pytest-xdist", "hypothesis", "tiktoken"]  # fmt: skip
    if subprocess.run([python, *install], check=False).returncode:
        return [name, *["-"] * len(PACKAGES), "cannot be installed"]
    ask = f"from importlib.metadata import version; print(*map(version, {PACKAGES}))"
    versions = subprocess.check_output([python, "-c", ask], text=True).split()
    results.unlink(missing_ok=True)
    subprocess.run(
        [python, "-m", "pytest", "-n", "2", "--dist", "worksteal", "-W", "default",
         "--junit-xml", results, *(ROOT / "tests" / test for test in TESTS)],
        cwd=ROOT, check=False, env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    return [name, *versions, outcome(results)]


def outcome(results: Path) -> str:
    """pytest 的 XML → 几个通过，几个失败，几个跳过，几分钟。"""
    if not results.exists():
        return "pytest did not run"
    suite = ElementTree.parse(results).getroot()[0]
    count = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    minutes = float(suite.get("time", 0)) / 60
    return f"{passed} passed, {failed} failed, {count['skipped']} skipped in {minutes:.0f} min"


def main() -> None:
    names = sys.argv[1:] or sorted(path.stem for path in HERE.glob("*.txt"))
    rows = [check(name) for name in names]
    for row in [["", *PACKAGES, "outcome"], *rows]:
        print("".join(f"{cell:<14}" for cell in row))
    sys.exit(any(" 0 failed" not in row[-1] for row in rows))


if __name__ == "__main__":
    main()
