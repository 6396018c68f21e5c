from __future__ import annotations

import pytest

from pfmc.cost import CostReport, Term, Validation, ratio, to_json, total
from pfmc.quantity import Estimate


def energy(low: float, typical: float, high: float, name: str = "c") -> Estimate:
    return Estimate(low, typical, high, Estimate.exact(1, "J").dims, frozenset({name}))


def test_terms_add_up() -> None:
    terms = [Term("adc", energy(1, 2, 3, "a"), "n E"), Term("dac", energy(2, 4, 8, "b"), "m E")]
    metric = total("energy__token", [*terms, Term("none", energy(0, 0, 0), "0")])
    assert metric.value.to("J") == (3, 6, 11)
    assert metric.value.constants == {"a", "b"}
    assert [t.name for t in metric.terms] == ["adc", "dac"]


def test_wrong_dimensions_and_unknown_metrics_are_refused() -> None:
    with pytest.raises(ValueError, match="measure"):
        total("area__total", [Term("adc", energy(1, 2, 3), "")])
    with pytest.raises(KeyError):
        total("energy__tokn", [])
    with pytest.raises(ValueError, match="measure"):
        ratio("power__total", energy(1, 2, 3), "")


def test_a_report_becomes_plain_json() -> None:
    metric = total("energy__token", [Term("adc", energy(1, 2, 3), "n E")])
    row = Validation("chip", 2.0, 3.0, "J", "paper", "abstract")
    report = CostReport("rom", "rom", "decode", {"energy__token": metric}, {}, (row,), ("note",))
    body = to_json(report)
    assert body["metrics"]["energy__token"]["terms"][0]["constants"] == ["c"]  # type: ignore[index]
    assert body["validation"][0]["ratio"] == 1.5  # type: ignore[index]
    assert report["energy__token"].typical == 2
