"""区间：由种子决定、盖得住真值、总和之比而不是比值的均值。"""

import math
import subprocess
import sys

import numpy as np
import pytest

from distillab.evaluate import bootstrap
from distillab.evaluate.bootstrap import difference_figure, ratio_figure
from distillab.figures import AFTER, BEFORE, TEACHER, gap_closed


def test_value_is_the_ratio_of_sums_and_not_the_mean_of_ratios():
    figure = ratio_figure([1.0, 90.0], [1.0, 9.0])
    assert figure["value"] == pytest.approx(9.1)  # 比值的均值是 5.5


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    values, ones = np.random.default_rng(1).normal(size=50).tolist(), [1.0] * 50
    first = ratio_figure(values, ones, seed=3)
    assert first == ratio_figure(values, ones, seed=3)
    assert first["low"] != ratio_figure(values, ones, seed=4)["low"]
    assert first["low"] < first["value"] < first["high"]


def test_interval_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        figure = ratio_figure(random.normal(5, 2, 100).tolist(), [1.0] * 100, seed, samples=300)
        covered += figure["low"] <= 5 <= figure["high"]
    assert 0.90 <= covered / 200 <= 0.99


def test_interval_is_as_wide_as_the_theory_of_means_says():
    values = np.random.default_rng(2).normal(size=400)
    figure = ratio_figure(values.tolist(), [1.0] * 400, samples=4000)
    assert figure["high"] - figure["low"] == pytest.approx(
        2 * 1.96 * values.std() / math.sqrt(400), rel=0.1
    )


def test_items_are_resampled_whole_so_numerators_stay_with_their_denominators():
    figure = ratio_figure([2.0, 20.0, 200.0], [1.0, 10.0, 100.0])
    assert figure == {"value": 2.0, "low": 2.0, "high": 2.0}


def test_one_item_has_no_spread():
    assert ratio_figure([3.0], [2.0]) == {"value": 1.5, "low": 1.5, "high": 1.5}


@pytest.mark.parametrize("transform", [math.exp, lambda x: -x])
def test_transform_is_applied_to_value_and_ends_and_keeps_them_in_order(transform):
    values, ones = [1.0, 2.0, 4.0, 0.5], [1.0] * 4
    plain, seen = ratio_figure(values, ones), ratio_figure(values, ones, transform=transform)
    assert seen["value"] == transform(plain["value"])
    assert [seen["low"], seen["high"]] == sorted(
        [transform(plain["low"]), transform(plain["high"])]
    )


def test_what_is_not_finite_is_null():
    figure = ratio_figure([1.0, 9.0], [1.0, 1.0], transform=lambda x: math.inf if x > 4 else x)
    assert figure == {"value": None, "low": 1.0, "high": None}
    assert ratio_figure([math.nan, 1.0], [1.0, 1.0]) == {"value": None, "low": None, "high": None}


@pytest.mark.parametrize("denominators", [[0.0, 0.0], [1.0, -1.0]])
def test_denominators_without_a_positive_sum_are_refused(denominators):
    with pytest.raises(ValueError, match="add up to 0, expected above 0"):
        ratio_figure([1.0, 2.0], denominators)


@pytest.mark.parametrize(("top", "bottom"), [([], []), ([1.0], [1.0, 2.0])])
def test_no_items_or_unequal_lengths_are_refused(top, bottom):
    with pytest.raises(ValueError, match="two lists of one length"):
        ratio_figure(top, bottom)


def test_blocks_of_resamples_change_nothing(monkeypatch):
    values = np.random.default_rng(5).normal(size=30).tolist()
    whole = ratio_figure(values, [1.0] * 30)
    monkeypatch.setattr(bootstrap, "BLOCK", 100)
    assert ratio_figure(values, [1.0] * 30) == whole


def test_difference_is_paired():
    # 各条相差很大，两个模型每条只差 1：不配对的话，区间会宽得看不出来。
    a = [float(10**i) for i in range(6)]
    figure = difference_figure([x + 1 for x in a], a)
    assert figure == {"value": 1.0, "low": 1.0, "high": 1.0}
    with pytest.raises(ValueError, match="paired"):
        difference_figure([1.0], [1.0, 2.0])


def gap_figure(teacher, before, after):
    return gap_closed({TEACHER: teacher, BEFORE: before, AFTER: after}, ratio_figure)


def test_gap_closed_is_a_share_of_the_teachers_lead():
    figure = gap_figure(teacher=[1, 1, 1, 1], before=[0, 0, 0, 1], after=[1, 1, 0, 1])
    assert figure["value"] == pytest.approx(2 / 3)
    assert gap_figure(teacher=[0, 1], before=[1, 0], after=[1, 1]) is None


def test_gap_that_vanishes_in_some_resample_has_no_interval():
    figure = gap_figure(teacher=[1, 1, 0], before=[0, 0, 1], after=[1, 0, 1])
    assert figure == {"value": 1.0, "low": None, "high": None}


def test_no_torch_is_needed():
    code = "import sys, distillab.evaluate.bootstrap; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
