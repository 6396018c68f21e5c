"""Mixed precision: the knapsack against all choices, and the choice of a whole model."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pfmc.errors import InfeasibleError
from pfmc.passes.budget import Option, knapsack

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
