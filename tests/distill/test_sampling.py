"""Sampling against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pfmc.distill.sampling import Sampling
from pfmc.errors import UsageError

SCORES = np.log(np.array([[0.5, 0.3, 0.15, 0.05]]))


@pytest.mark.parametrize(
    ("sampling", "want"),
    [
        (Sampling(), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(top_k=2), [0.625, 0.375, 0, 0]),
        (Sampling(top_p=0.79), [0.625, 0.375, 0, 0]),
        (Sampling(top_p=0.1), [1, 0, 0, 0]),
        (Sampling(top_k=3, top_p=0.6), [0.625, 0.375, 0, 0]),
        (Sampling(temperature=0.5), [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
    ],
)
def test_probabilities(sampling: Sampling, want: list[float]) -> None:
    np.testing.assert_allclose(sampling.probabilities(SCORES)[0], want, atol=1e-12)


def test_draws_follow_the_probabilities() -> None:
    drawn = Sampling().choose(np.repeat(SCORES, 40000, axis=0), np.random.default_rng(0))
    np.testing.assert_allclose(np.bincount(drawn) / 40000, [0.5, 0.3, 0.15, 0.05], atol=0.01)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    scores=st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=9),
    k=st.integers(0, 9),
    p=st.floats(0.01, 1),
)
def test_the_best_token_is_always_possible(scores: list[float], k: int, p: float) -> None:
    row = np.array([scores], np.float32)
    chances = Sampling(top_k=k, top_p=p).probabilities(row)
    assert chances.sum() == pytest.approx(1)
    assert chances[0, int(np.argmax(row))] > 0
    assert np.count_nonzero(chances) <= (k or len(scores))
    assert Sampling(greedy=True).choose(row, np.random.default_rng(0))[0] == np.argmax(row)


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_k": -1}, {"top_p": 1.5}])
def test_wrong_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="mend"):
        Sampling(**wrong)  # type: ignore[arg-type]
