"""运行目录 -> 一页自足的 HTML：双击就能看，不要网络，不要服务。

图用 plotly.js 画：悬停时各条曲线的数并列、误差线、对数轴、触屏都是现成的；它的 PyPI 包里就有完整的
脚本，只依赖 narwhals 与 packaging。脚本 4.8 MB，gzip 再 base64 之后不到 2 MB，由浏览器解开。
Bokeh 的脚本较小（1.3 MB），但悬停时每条曲线各出一个框；Altair 要靠 33 MB 的 vl-convert 才能离线。
"""

from __future__ import annotations

import base64
import gzip
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import Terminated
from ..figures import AFTER
from ..files import replace_file
from ..parsing import differing
from .charts import (
    agreement_charts,
    axes,
    color,
    curve_charts,
    optimisation_charts,
    rollout_charts,
    task_charts,
)
from .measures import Key, difference, duration, headline, measures, memory, number
from .run_data import RunData, finite, read_runs, signature
from .tables import (
    answers,
    costs,
    flat,
    initial_layers,
    method,
    model_name,
    results,
    samples,
    shown,
)

logger = logging.getLogger("distillab")

FILE_NAME = "report.html"
MOMENT = "%Y-%m-%d %H:%M UTC"
UNCOUNTED = ("name", "description", "data.today")
"""各次运行总不相同的配方键。"""


def write_report(
    paths: Sequence[Path],
    output: Path | None = None,
    reload_seconds: float | None = None,
    summary: dict[str, Any] | None = None,
) -> tuple[Path, bool]:
    """把一次或几次运行写成一页，头一个是比较的基准；``(写下的文件, 各次运行是否都已走完)``。

    ``output`` 缺省为 ``RUN/report.html``，几次运行时在它们的上级目录里。还没走完时，页面每隔
    ``reload_seconds`` 重新载入自己；``summary`` 是就要写成 ``summary.json`` 的。运行目录里有一个文
    件不成样子时 ``DistillabError``；写不下去是 ``OSError``，旧的还在。
    """
    runs = read_runs(paths)
    if summary is not None:
        runs = [replace(run, summary=finite(summary)) for run in runs]
    complete = all(run.complete for run in runs)
    beside = paths[0].parent if paths[0].name else paths[0].resolve().parent
    target = output or (paths[0] if len(runs) == 1 else beside) / FILE_NAME
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_file(target, page(runs, None if complete else reload_seconds))
    return target, complete


def watch_report(
    paths: Sequence[Path],
    output: Path | None,
    seconds: float,
    written: Callable[[Path], None],
) -> None:
    """每 ``seconds`` 看一次，文件有变就重写，再调用 ``written``；直到每次运行都走完，或 Ctrl-C：那
    时留下不再自己载入的一页。
    """
    seen: list[Any] = []
    try:
        while True:
            now = [signature(path) for path in paths]
            if now != seen:
                target, complete = write_report(paths, output, seconds)
                written(target)
                if complete:
                    return
                seen = now
            time.sleep(seconds)
    except KeyboardInterrupt as stop:
        write_report(paths, output)
        if isinstance(stop, Terminated):
            raise


def page(runs: Sequence[RunData], reload_seconds: float | None = None) -> str:
    """整页 HTML；一切文字都经转义。"""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("distillab.report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {one.__name__: one for one in (number, duration, memory, shown)}
    sections = {
        "curves": curve_charts(runs),
        "agreement": agreement_charts(runs),
        "tasks": task_charts(runs),
        "rollouts": rollout_charts(runs),
        "optimisation": optimisation_charts(runs),
    }
    charts = [chart for found in sections.values() for chart in found]
    changed = differing([run.recipe for run in runs], empty=True)
    drawn = {one["key"]: {k: one[k] for k in ("data", "layout", "training")} for one in charts}
    return environment.get_template("report.html").render(
        title=" · ".join(run.label for run in runs),
        version=__version__,
        written=datetime.now(timezone.utc).strftime(MOMENT),
        reload_milliseconds=None if reload_seconds is None else 1000 * reload_seconds,
        runs=[_card(run, index, headline(runs), runs[0]) for index, run in enumerate(runs)],
        results=results(runs),
        sections=sections,
        figures={"axes": axes(runs), "charts": drawn},
        initial=initial_layers(runs),
        samples=samples(runs),
        answers=answers(runs),
        differences=_differences(runs),
        skipped=any(costs(run)["skipped_steps"] for run in runs),
        recipe_differences=[row for row in changed if row[0] not in UNCOUNTED],
        environment_differences=differing([run.environment for run in runs], empty=True),
        library=_library() if charts else "",
    )


def _card(run: RunData, index: int, key: Key | None, first: RunData) -> dict[str, Any]:
    measure = measures(run).get(key) if key else None
    against = ""
    if index and key and measure:
        reference = measures(first)[key].value(AFTER)
        against = difference(measure.value(AFTER), reference, measure.kind)
    evaluated, evaluation = None, run.evaluation
    if checkpoint := evaluation.get("checkpoint"):
        evaluated = (
            f"{run.label}: {checkpoint}, evaluated {str(evaluation.get('created', ''))[:10]}, "
            f"95 % intervals from {evaluation.get('bootstrap_samples', '?')} bootstrap samples"
        )
    return {
        "label": run.label,
        "color": color(index),
        "state": run.state,
        "complete": run.complete,
        "description": run.get("description", ""),
        "headline": measure,
        "against": against,
        "costs": costs(run),
        "method": method(run),
        "evaluated": evaluated,
        "recipe_text": run.recipe_text,
        "environment": flat(run.environment),
        "changed": datetime.fromtimestamp(run.changed, timezone.utc).strftime(MOMENT),
    }


def _differences(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """``evaluation.json`` 里成对的差：同样的题，前者减后者。"""
    return [
        {
            "run": run.label,
            "task": task,
            "first": model_name(row["models"][0], [run]),
            "second": model_name(row["models"][1], [run]),
            "difference": row["difference"],
        }
        for run in runs
        for task, result in run.evaluation.get("tasks", {}).items()
        for row in result.get("differences", [])
    ]


@lru_cache(maxsize=1)
def _library() -> str:
    """压缩过的 plotly.js；MIT 许可，版权声明在它的开头。"""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()
