"""Intervals and rank correlations against scipy and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pfmc.evaluation.figures import (
    Figure,
    difference_figure,
    mean_figure,
    rank_figure,
    spearman,
)


def test_the_interval_is_students_over_the_mean_of_the_dies() -> None:
    rng = np.random.default_rng(0)
    per_die = [rng.normal(size=20), rng.normal(size=20)]
    found = mean_figure("x", per_die)
    mean = np.mean(per_die, axis=0)
    low, high = stats.t.interval(0.95, 19, mean.mean(), stats.sem(mean))
    assert (found.low, found.high) == pytest.approx((low, high))
    over_dies = [float(d.mean()) for d in per_die]
    low, high = stats.t.interval(0.95, 1, np.mean(over_dies), stats.sem(over_dies))
    assert (found.die_low, found.die_high) == pytest.approx((low, high))
    assert found.dies == pytest.approx(over_dies)
    assert found.die_sd == pytest.approx(np.std(over_dies, ddof=1))


def test_ratios_are_made_from_means() -> None:
    found = mean_figure("r", [np.log([2.0, 8.0])], through=math.exp, better="lower")
    assert found.value == pytest.approx(4.0)
    assert found.low is not None
    assert found.low < 4.0


def test_one_document_has_no_interval_and_one_die_no_spread() -> None:
    found = mean_figure("x", [np.array([1.0])])
    assert (found.low, found.high, found.die_sd, found.die_low) == (None, None, None, None)


@pytest.mark.parametrize(("better", "worst"), [("higher", 1.0), ("lower", 3.0), ("", 3.0)])
def test_the_worst_die(better: str, worst: float) -> None:
    assert Figure("x", 2.0, dies=(1.0, 2.0, 3.0), better=better).worst == worst


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=30))
def test_spearman_is_scipys(pairs: list[tuple[int, int]]) -> None:
    a, b = np.array(pairs, float).T
    if len(set(a)) < 2 or len(set(b)) < 2:
        assert math.isnan(spearman(a, b))
        return
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_rank_figures_cover_the_truth() -> None:
    rng = np.random.default_rng(1)
    scores = rng.normal(size=300)
    truth = scores + rng.normal(size=300)
    ours = truth + 0.1 * rng.normal(size=300)
    found = rank_figure("rho", [ours], scores)
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.value < found.high
    paired = difference_figure("d", [ours], truth, scores)
    assert paired.low is not None
    assert paired.high is not None
    assert paired.high - paired.low < 0.5 * (found.high - found.low), "the same pairs on both sides"


@pytest.mark.filterwarnings("error")
def test_constant_scores_have_no_rank_and_no_interval() -> None:
    found = rank_figure("rho", [np.arange(6.0)], np.ones(6))
    assert math.isnan(found.value)
    assert (found.low, found.high) == (None, None)
