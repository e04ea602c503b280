"""曲线图：写进运行目录的 PNG，与 notebook 里随训练更新的那一张。"""

import json

import pytest
from IPython import display

from distillab.report.curves import LiveCurves, plot_run

PNG = b"\x89PNG"


def train_row(step, loss):
    return {"kind": "train", "step": step, "tokens": 100 * step, "loss": loss,
            "divergence": loss / 2, "cross_entropy": loss}  # fmt: skip


REFERENCE = [{"kind": "reference", "step": 0, "model": "student_before", "perplexity": 900.0},
             {"kind": "reference", "step": 0, "model": "teacher", "perplexity": 9.0}]  # fmt: skip
VALIDATION = {"kind": "validation", "step": 2, "tokens": 200, "perplexity": 90.0}


@pytest.fixture
def write(tmp_path):
    def write(*rows):
        path = tmp_path / "run" / "metrics.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


class Handle:
    def __init__(self):
        self.images = []

    def update(self, image):
        self.images.append(image)


@pytest.fixture
def shown(monkeypatch):
    """IPython 里显示过的图；头一张之后都是更新。"""
    handle = Handle()

    def show(image, display_id):
        assert display_id
        assert not handle.images
        handle.images.append(image)
        return handle

    monkeypatch.setattr(display, "display", show)
    return handle.images


def test_live_curves_redraw_one_image_as_rows_arrive(write, shown):
    curves = LiveCurves()
    for rows in ([train_row(1, 5.0)], [train_row(2, 4.0)], [VALIDATION]):
        curves(write(*REFERENCE, train_row(1, 5.0), *rows))
    assert len(shown) == 3
    assert all(image.data.startswith(PNG) for image in shown)
    assert len({image.data for image in shown}) == 3  # 每次都多画了一点


@pytest.mark.parametrize("perplexity", [None, float("inf")])
def test_a_perplexity_too_large_to_draw_leaves_the_curve_without_that_point(
    write, shown, perplexity
):
    finite = [*REFERENCE, train_row(1, 5.0), VALIDATION]
    curves = LiveCurves()
    curves(write(*finite))
    curves(write(*finite, VALIDATION | {"step": 3, "tokens": 150, "perplexity": perplexity}))
    assert shown[0].data == shown[1].data


def test_curves_of_a_run_that_has_only_skipped_steps_are_empty(write, shown):
    LiveCurves()(write({"kind": "train", "step": 1, "tokens": 0, "skipped_steps": 1}))
    assert len(shown) == 1


def test_plots_of_a_run_leave_the_users_backend_alone(write):
    import matplotlib

    before = matplotlib.rcParams._get("backend")
    written = plot_run(write(*REFERENCE, train_row(1, 5.0), VALIDATION).parent)
    assert [path.name for path in written] == ["loss.png", "perplexity.png"]
    assert all(path.read_bytes().startswith(PNG) for path in written)
    assert matplotlib.rcParams._get("backend") == before
