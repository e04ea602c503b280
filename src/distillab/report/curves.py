"""训练曲线：画成 PNG，或在 notebook 里随训练更新。只读 ``metrics.jsonl``，不导入 torch。"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..figures import BEFORE, TEACHER
from ..files import replace_file
from ..run_file_shapes import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]
"""``metrics.jsonl`` 的若干行。"""


def plot_run(run_dir: Path) -> list[Path]:
    """由运行目录的 ``metrics.jsonl`` 画出 ``plots/loss.png`` 与 ``plots/perplexity.png``。"""
    rows = read_metrics(run_dir / "metrics.jsonl")
    written = []
    for name, draw in (("loss", _draw_loss), ("perplexity", _draw_perplexity)):
        figure = _figure(7)
        axes = figure.subplots()
        draw(axes, rows)
        axes.set_title(f"{run_dir.name}: {name}", loc="left", fontweight="bold")
        path = run_dir / "plots" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        replace_file(path, _png(figure, 130))
        written.append(path)
    return written


class LiveCurves:
    """notebook 里的曲线：左边训练损失，右边验证困惑度；每次调用重画同一张图。

    交给 ``distillab.run.train`` 或 ``DistillationTrainer.train`` 的 ``on_metrics``；要在 notebook
    里用，IPython 由它自带。
    """

    def __init__(self) -> None:
        self._handle: Any = None

    def __call__(self, metrics_file: Path) -> None:
        """按 ``metrics.jsonl`` 现在的内容重画；恢复的训练因此画出中断以前的部分。"""
        from IPython.display import Image, display

        rows, figure = read_metrics(metrics_file), _figure(11)
        for axes, draw in zip(figure.subplots(1, 2), (_draw_loss, _draw_perplexity), strict=True):
            draw(axes, rows)
        image = Image(data=_png(figure, 90), format="png")
        if self._handle is None:
            self._handle = display(image, display_id=True)
        else:
            self._handle.update(image)


def _png(figure: Figure, dpi: int) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def _figure(width: float) -> Figure:
    """不经 pyplot：它的 backend 属于使用者，notebook 里尤其不能换。"""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, 4.2), layout="constrained")


def _style(axes: Axes, ylabel: str) -> None:
    from matplotlib.ticker import EngFormatter

    axes.grid(alpha=0.25)
    axes.set_xlabel("training tokens")
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)


def _draw_loss(axes: Axes, rows: Rows) -> None:
    rows = [row for row in rows if row["kind"] == "train" and "loss" in row]
    tokens = [row["tokens"] for row in rows]
    labels = {"loss": "training loss", "divergence": "divergence", "cross_entropy": "cross-entropy"}
    for key, label in labels.items():
        values = [row[key] for row in rows]
        if any(values):  # alpha 为 0 或 1 时有一项不计算
            axes.plot(tokens, values, label=label, linewidth=2 if key == "loss" else 1.2)
    _style(axes, "nats per token")


def _draw_perplexity(axes: Axes, rows: Rows) -> None:
    rows = [row for row in rows if math.isfinite(row.get("perplexity") or math.inf)]
    reference = {row["model"]: row for row in rows if row["kind"] == "reference"}
    points = [row for row in rows if row["kind"] == "validation"]
    if BEFORE in reference:
        points = [{"tokens": 0, **reference[BEFORE]}, *points]
    tokens, values = [row["tokens"] for row in points], [row["perplexity"] for row in points]
    axes.set_yscale("log")
    if points:
        axes.plot(tokens, values, marker="o", label="student (validation)")
    for x, y in zip(tokens, values, strict=True):
        axes.annotate(f"{y:,.1f}", (x, y), xytext=(4, 6), textcoords="offset points")
    if TEACHER in reference:
        value = reference[TEACHER]["perplexity"]
        axes.axhline(value, color="gray", linestyle="--", linewidth=1)
        place: Any = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate(f"teacher {value:.1f}", (0, value), xytext=(4, 4), color="gray", **place)
    axes.yaxis.set_minor_formatter(lambda *_: "")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _style(axes, "perplexity (log scale)")
