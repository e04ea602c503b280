"""把一次走完的运行留下的小文件抄进 ``results/NAME/``，并记下命令、机器、日期与版本。

python results/record.py runs/quickstart --command "distillab train quickstart"
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from distillab.config.recipes import load_recipe
from distillab.errors import DistillabError
from distillab.parsing import differing
from distillab.run_file_shapes import read_metrics

RESULTS = Path(__file__).parent
REQUIRED = ("recipe.yaml", "metrics.jsonl", "summary.json", "environment.json")
OPTIONAL = ("evaluation.json", "samples.jsonl", "checks")


def record(run: Path, command: str, machine: str | None = None, name: str | None = None) -> Path:
    """抄下一次运行。

    Args:
        run: 运行目录。
        command: 重做它的命令；读出的配方必须与运行目录里的相同。
        machine: 机器的一句话；缺省由 ``environment.json`` 与 ``lscpu`` 得出。
        name: ``results`` 下的名字；缺省为运行目录的名字。

    Returns:
        写下的目录；原来有的被替换。

    Raises:
        DistillabError: 运行没有走完，或命令不是这次运行的。
    """
    check_complete(run)
    check_command(run, command)
    environment = json.loads((run / "environment.json").read_text())
    finished = datetime.fromtimestamp((run / "summary.json").stat().st_mtime, timezone.utc)
    content = {
        "format": 1,
        "command": command,
        "machine": machine or describe_machine(environment),
        "date": finished.date().isoformat(),
        "versions": {"distillab": environment["distillab"], "python": environment["python"],
                     **environment["packages"]},
        "git": environment["git"],
        "git_dirty": environment["git_dirty"],
    }  # fmt: skip
    target = RESULTS / (name or run.resolve().name)
    with tempfile.TemporaryDirectory(dir=RESULTS, prefix=".recording-") as place:
        copy = Path(place) / target.name
        copy.mkdir()
        for part in (*REQUIRED, *OPTIONAL):
            if (run / part).is_dir():
                shutil.copytree(run / part, copy / part)
            elif (run / part).exists():
                shutil.copyfile(run / part, copy / part)
        (copy / "record.json").write_text(
            json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        if target.exists():
            shutil.rmtree(target)
        copy.rename(target)
    return target


def check_complete(run: Path) -> None:
    """运行走完了，而且指标一直记到最后一步。

    Raises:
        DistillabError: 缺文件，或指标没有记到最后。
    """
    for part in REQUIRED:
        if not (run / part).is_file():
            raise DistillabError(f"{run}: not a complete run: {part} is missing")
    steps = json.loads((run / "summary.json").read_text())["steps"]
    rows = [row["step"] for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"]
    if max(rows, default=0) != steps:
        raise DistillabError(
            f"{run}: not a complete run: metrics.jsonl ends at step {max(rows, default=0)}, "
            f"expected {steps}"
        )


def check_command(run: Path, command: str) -> None:
    """命令说的就是这次运行：它的配方逐键与运行目录里的相同。

    Raises:
        DistillabError: 不是 ``distillab train``，或有一个键不同。
    """
    words = shlex.split(command)
    if words[:2] != ["distillab", "train"] or len(words) < 3:
        raise DistillabError(f"--command {command!r}: expected distillab train RECIPE ...")
    sets = [value for option, value in itertools.pairwise(words) if option == "--set"]
    ran, told = load_recipe(str(run / "recipe.yaml")), load_recipe(words[2], sets)
    both = [recipe.model_dump(mode="json") for recipe in (ran, told)]
    for key, (found, expected) in sorted(differing(both)):
        if key != "description":
            raise DistillabError(
                f"--command {command!r} gives {key}={expected!r}, but the run has {found!r}"
            )


def describe_machine(environment: dict[str, Any]) -> str:
    """``environment.json`` 里的 GPU，或这台机器的 CPU 与用到的线程数。"""
    if environment["devices"]:
        return f"{environment['devices']} x {environment['device']}"
    try:
        listed = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        listed = ""
    fields = dict(line.split(":", 1) for line in listed.splitlines() if ":" in line)
    model = fields.get("Model name", environment["device"]).strip()
    threads = environment["cpu_threads"]
    return f"{threads} thread{'s' * (threads > 1)} on {model}"


def main() -> None:
    """命令行。"""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--command", required=True, help="the command that makes this run")
    parser.add_argument("--machine", help="one line; default: from environment.json and lscpu")
    parser.add_argument("--name", help="directory under results/; default: that of the run")
    options = parser.parse_args()
    try:
        print(record(options.run, options.command, options.machine, options.name))
    except DistillabError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
