"""``benchmarks/shapes.py``：各种形状的参数一样多，都裁得成。"""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def shapes(monkeypatch):
    """像脚本那样导入彼此。"""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return __import__("shapes")


def test_every_shape_has_as_many_parameters_as_the_short_one(shapes):
    whole = shapes.parameters(shapes.CASES["depth"])
    for case in shapes.CASES:
        assert shapes.parameters(shapes.solved(case)) == pytest.approx(whole, rel=2e-3), case
    assert shapes.parameters(shapes.HALFWAY) > whole
