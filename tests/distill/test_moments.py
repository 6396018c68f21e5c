"""Second moments of calibration: once per shared input, bounded, and without padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pfmc.distill import calibrate
from pfmc.distill.calibrate import Gatherer


class _Student:
    """Stands in for a student: only its linears are looked at."""

    def __init__(self, *names: str) -> None:
        self.linears = {name: torch.nn.Identity() for name in names}


def gathered(moments: bool = True) -> Gatherer:
    """q and k share their input, o has its own; two batches."""
    gatherer = Gatherer(_Student("q", "k", "o"), moments)  # type: ignore[arg-type]
    made = torch.Generator().manual_seed(0)
    for rows in (3, 5):
        x, z = (torch.randn(2, rows, width, generator=made) for width in (4, 6))
        for name, value in (("q", x), ("k", x), ("o", z)):
            gatherer(name, value, torch.zeros(2, rows, 1))
    return gatherer


def test_moments_are_the_mean_product_and_shared() -> None:
    made = torch.Generator().manual_seed(0)
    seen: list[np.ndarray] = []
    for rows in (3, 5):
        x = torch.randn(2, rows, 4, generator=made)
        torch.randn(2, rows, 6, generator=made)
        seen.append(x.reshape(-1, 4).numpy().astype(np.float64))
    x = np.concatenate(seen)
    found = gathered().statistics()
    assert found["q"].input_moment is not None
    np.testing.assert_allclose(found["q"].input_moment, x.T @ x / 16, rtol=1e-12)
    np.testing.assert_allclose(
        np.diagonal(found["q"].input_moment), found["q"].input_power, rtol=1e-12
    )
    assert found["k"].input_moment is found["q"].input_moment
    assert found["o"].input_moment is not None
    assert found["o"].input_moment.shape == (6, 6)


def test_none_unless_asked_for_and_none_beyond_the_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert all(s.input_moment is None for s in gathered(moments=False).statistics().values())
    monkeypatch.setattr(calibrate, "MOMENT_WIDEST", 5)
    found = gathered().statistics()
    assert found["q"].input_moment is not None
    assert found["o"].input_moment is None
    monkeypatch.setattr(calibrate, "MOMENT_WIDEST", 4096)
    monkeypatch.setattr(calibrate, "MOMENT_BYTES", 8 * 4 * 4)
    found = gathered().statistics()
    assert found["k"].input_moment is not None
    assert found["o"].input_moment is None


def test_padding_does_not_count() -> None:
    gatherer = Gatherer(_Student("a"), True)  # type: ignore[arg-type]
    x = torch.tensor([[[1.0, 2.0], [900.0, 900.0]], [[3.0, -1.0], [0.5, 0.0]]])
    gatherer.real = torch.tensor([[True, False], [True, True]])
    gatherer("a", x, x)
    found = gatherer.statistics()["a"]
    assert found.samples == 3
    assert found.input_peak == 3.0
    assert found.output_peak.tolist() == [3.0, 2.0]
    rows = np.array([[1, 2], [3, -1], [0.5, 0]])
    np.testing.assert_allclose(found.input_moment, rows.T @ rows / 3)
