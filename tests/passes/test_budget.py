"""Mixed precision: the knapsack against all choices, and the choice of a whole model."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pfmc import formats
from pfmc.errors import InfeasibleError, UsageError
from pfmc.formats import Format
from pfmc.hardware import Limits
from pfmc.passes.budget import Chosen, Option, choose, knapsack
from pfmc.passes.quantise import Quantise
from pfmc.passes.recipe import Budget
from tests.one_linear import one_linear

tables = st.lists(
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 50)), min_size=1, max_size=4),
    min_size=1, max_size=4,
)  # fmt: skip


@settings(max_examples=100)
@given(tables, st.integers(4, 80))
def test_within_the_limit_and_near_the_best(
    given_tables: list[list[tuple[int, int]]], limit: int
) -> None:
    table = {
        f"l{i}": tuple(Option(b + 2, float(p), float(h)) for b, (p, h) in enumerate(rows))
        for i, rows in enumerate(given_tables)
    }
    fitting = [c for c in itertools.product(*table.values()) if sum(o.price for o in c) <= limit]
    if not fitting:
        with pytest.raises(InfeasibleError, match="narrowest"):
            knapsack(table, limit)
        return
    found = knapsack(table, limit)
    assert sum(o.price for o in found.values()) <= limit
    best = min(sum(o.harm for o in c) for c in fitting)
    harm = sum(o.harm for o in found.values())
    largest = max(o.harm - min(p.harm for p in os) for os in table.values() for o in os)
    assert best <= harm <= best + largest  # greedy errs by one step at most


def test_harm_decides_who_gets_the_bits() -> None:
    table = {
        "sturdy": (Option(2, 2, 1.0), Option(4, 4, 0.9)),
        "tender": (Option(2, 2, 9.0), Option(4, 4, 1.0)),
    }
    assert {n: o.bits for n, o in knapsack(table, 6).items()} == {"sturdy": 2, "tender": 4}
    assert {n: o.bits for n, o in knapsack(table, 8).items()} == {"sturdy": 4, "tender": 4}


LIMITS = Limits((2, 8), 8, 0, 64, 64, False, formats=formats.NAMES)


def one_layer() -> ir.Model:
    """A fixed linear of 64 inputs and 4 outputs."""
    return one_linear(np.random.default_rng(0).standard_normal((64, 4)), np.zeros(4))


def chosen(options: Quantise, **budget: object) -> Chosen:
    feeds = [{"x": np.random.default_rng(1).standard_normal((50, 64)).astype(np.float32)}]

    def price(_: str, inputs: int, outputs: int, form: Format, group: int) -> float:
        return inputs * outputs * form.weight_bits(inputs, group)

    asked = Budget.model_validate({"metric": "weight bits", "sensitivity": "error", **budget})
    return choose(one_layer(), options, LIMITS, asked, price, feeds)


def test_what_is_too_little_is_said_in_the_unit_that_was_asked_in() -> None:
    with pytest.raises(InfeasibleError) as caught:
        chosen(Quantise(), most=1.5, least_bits=3)
    assert "take 3 of a budget of 1.5" in caught.value.what
    assert "at least 3," in caught.value.mend
    assert chosen(Quantise(), most=3, least_bits=3).bits == {"fc": 3}


def test_no_width_at_all_is_refused() -> None:
    with pytest.raises(UsageError, match="6 to 4 bits and the target's 2 to 8"):
        chosen(Quantise(), most=5, least_bits=6, most_bits=4)


def test_a_format_that_fixes_its_bits_is_told_with_them() -> None:
    found = chosen(Quantise(format="mxfp4"), most=5)
    assert found.bits == {"fc": 4}
    assert [o.bits for o in found.options["fc"]] == [4]
    assert found.spent == pytest.approx(4.25)
