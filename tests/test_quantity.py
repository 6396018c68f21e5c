from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfmc.errors import UsageError
from pfmc.quantity import NONE, Estimate, read_quantity, unit


@pytest.mark.parametrize(
    ("text", "factor", "like"),
    [
        ("pJ/sample", 1e-12, "J"),
        ("um2", 1e-12, "m2"),
        ("1/cm2", 1e4, "1/m2"),
        ("W/mm2", 1e6, "W/m2"),
        ("fJ/bit", 1e-15, "J"),
        ("Gbit/mm3", 1e18, "1/m3"),
        ("uS", 1e-6, "S"),
        ("ohm", 1.0, "V/A"),
        ("pJ/byte", 1e-12 / 8, "J"),
        ("%", 0.01, "1"),
        ("h", 3600.0, "s"),
        ("USD/h", 1 / 3600, "USD/s"),
        ("GHz", 1e9, "1/s"),
    ],
)
def test_units_are_read(text: str, factor: float, like: str) -> None:
    assert unit(text).factor == pytest.approx(factor)
    assert unit(text).dims == unit(like).dims


def test_an_unknown_unit_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean|known"):
        unit("Jouel")


positive = st.floats(1e-6, 1e6)


@given(st.tuples(positive, positive, positive), st.tuples(positive, positive, positive))
def test_interval_arithmetic_holds_every_choice(
    a: tuple[float, float, float], b: tuple[float, float, float]
) -> None:
    """Whatever values the two numbers take inside their ranges, the result lies in the range."""
    x, y = Estimate(*sorted(a)), Estimate(*sorted(b))
    for p in (x.low, x.typical, x.high):
        for q in (y.low, y.typical, y.high):
            for got, value in ((x + y, p + q), (x * y, p * q), (x / y, p / q), (x - y, p - q)):
                slack = 1e-9 * (abs(value) + abs(p) + abs(q))
                assert got.low - slack <= value <= got.high + slack


def test_mixed_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="dimensions"):
        Estimate.exact(1, "J") + Estimate.exact(1, "s")
    with pytest.raises(ValueError, match="measure"):
        Estimate.exact(1, "J").to("s")
    assert (Estimate.exact(1, "J") / Estimate.exact(2, "s")).to("W")[1] == 0.5


def test_an_estimate_remembers_its_constants() -> None:
    table = {"value": 2, "range": [1, 3], "unit": "pJ", "source": "a paper", "grade": "published"}
    a, b = read_quantity("adc.energy", table).estimate, read_quantity("dac.energy", table).estimate
    assert (a * 3 + b).constants == {"adc.energy", "dac.energy"}
    assert (a * 3 + b).to("pJ") == pytest.approx((4, 8, 12))
    assert a.dims != NONE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"range": [3, 4]}, "does not hold"),
        ({"unit": "furlong"}, "unknown unit"),
        ({"source": ""}, "no source"),
        ({"grade": "hearsay"}, "unknown grade"),
        ({"rnage": [1, 2]}, "unknown key"),
        ({"value": "two"}, "not a number"),
        ({"range": None}, "not a number"),
    ],
)
def test_a_constant_without_unit_source_or_range_is_refused(
    change: dict[str, object], message: str
) -> None:
    table = {"value": 2, "range": [1, 3], "unit": "pJ", "source": "a paper", "grade": "published"}
    with pytest.raises(UsageError, match=message):
        read_quantity("x", table | change)
