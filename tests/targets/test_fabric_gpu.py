"""The GPU baseline: the published row at its own size, in proportion elsewhere, and its notes."""

from __future__ import annotations

import pytest

from pfmc.targets.fabric.gpu import baseline


def test_llama_8b_is_the_published_row() -> None:
    report = baseline(8.03e9)
    low, typical, high = report["energy__token"].to("mJ")
    assert (low, high) == (pytest.approx(30.8, abs=0.1), pytest.approx(46.0, abs=0.1))
    assert low < typical < high
    assert report["throughput__aggregate"].low == pytest.approx(15220)
    assert report["throughput__user"].typical == pytest.approx(230)
    assert len(report.notes) == 1
    assert report.sources["gpu.throughput"].grade == "full"


def test_scaling_is_in_proportion_and_small_models_are_flagged() -> None:
    large, small = baseline(8.03e9), baseline(8.03e6)
    assert small["energy__token"].typical == pytest.approx(large["energy__token"].typical / 1e3)
    assert small["throughput__aggregate"].typical == pytest.approx(
        large["throughput__aggregate"].typical * 1e3
    )
    assert "optimistic bound for the GPU" in small.notes[-1]
