"""How counts grow: exact laws are recognised, anything else is bounded from above."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfmc.ir.probe import Growth, ShapeProbe, growth

A, B = (3, 8), (5, 14)  # (positions, context) of the two runs


def points(law: str) -> list[tuple[float, int, int]]:
    return [(eval(law, {"S": s, "T": t}), s, t) for s, t in (A, B)]


@pytest.mark.parametrize(
    ("law", "grown"),
    [
        ("7 * S", Growth(7)),
        ("7 * S * T", Growth(0, 7)),
        ("7 * T", Growth(0, 7)),
        ("7", Growth(7)),
        ("S * (2 + 3 * T)", Growth(2, 3)),
        ("0", Growth(0)),
    ],
)
def test_laws_are_recognised(law: str, grown: Growth) -> None:
    found = growth(points(law))
    assert found.fixed == pytest.approx(grown.fixed)
    assert found.per_context == pytest.approx(grown.per_context)


def test_encoder_squares_are_per_context() -> None:
    assert growth([(9.0, 3, 3), (25.0, 5, 5)]) == Growth(0, 1)


def test_fixed_size_is_divided_by_positions() -> None:
    assert growth([(50.0, 10, 10), (50.0, 10, 10)]) == Growth(5)
    assert growth([(50.0, 10, 10)]) == Growth(5)


def test_one_position_a_run_with_growing_memory() -> None:
    assert growth([(8.0, 1, 6), (8.0, 1, 10)]) == Growth(8)
    assert growth([(12.0, 1, 6), (20.0, 1, 10)]) == Growth(0, 2)


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_never_less_than_seen_at_its_own_runs(a: int, b: int) -> None:
    found = growth([(float(a), *A), (float(b), *B)])
    for count, (s, t) in ((a, A), (b, B)):
        assert s * (found.fixed + found.per_context * t) >= count * (1 - 1e-9)


def test_probe_size_and_kind() -> None:
    probe = ShapeProbe((2, 3), "float32", 3, 8)
    assert probe.size == 6
    assert probe.floating
    assert not ShapeProbe((), "int64", 3, 8).floating
    assert Growth(1, 2).plus(Growth(3, 4)).times(2) == Growth(8, 12)
