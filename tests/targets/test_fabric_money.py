"""Yield and dollars against the published cost table of HNLPU (arXiv 2508.16151v2, App. B)."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfmc import technology
from pfmc.quantity import Estimate
from pfmc.targets.fabric import money


def test_murphy_yield_of_a_reticle_sized_die() -> None:
    assert money.murphy(827e-6, 0.11e4) == pytest.approx(0.431, abs=5e-4)


def test_dies_and_good_die_cost() -> None:
    assert money.dies_per_wafer(827.08e-6, 0.3) == pytest.approx(62, rel=0.01)
    assert money.good_die(827.08e-6, 16988, 0.11e4, 0.3) == pytest.approx(635, rel=0.01)


@given(st.floats(1e-8, 1e-2), st.floats(0, 1e4))
def test_murphy_lies_between_poisson_and_seeds(area: float, defects: float) -> None:
    load = area * defects
    value = money.murphy(area, defects)
    assert math.exp(-load) - 1e-6 <= value <= 1 / (1 + load) + 1e-6


def test_masks_are_the_published_share() -> None:
    tech = technology.load("rom")
    metric = money.masks(tech)
    assert metric.value.typical == pytest.approx(22.5e6 * 2 / 130)
    assert 10 / tech.number("masks.units") == pytest.approx(0.077, abs=5e-4)
    low, high = 15e6 * 10 / 130, 30e6 * 10 / 130
    assert (low, high) == (pytest.approx(1.15e6, rel=0.01), pytest.approx(2.31e6, rel=0.01))


def test_large_areas_are_cut_at_the_reticle() -> None:
    tech = technology.load("rom")
    assert money.dies(Estimate.exact(850, "mm2"), tech).typical == 1
    assert money.dies(Estimate.exact(860, "mm2"), tech).typical == 2
    one, two = (money.unit_cost(Estimate.exact(a, "mm2"), tech).value for a in (800, 1600))
    assert two.typical == pytest.approx(2 * one.typical)
    assert one.low < one.typical < one.high
    assert "fabric.defect_density" in one.constants
