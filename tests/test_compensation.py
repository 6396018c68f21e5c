"""Compensating rounding: never worse than the clip search, and near the best there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pfmc import compensation, rounding


def case(seed: int, inputs: int, outputs: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A matrix and the second moments of correlated inputs."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * inputs, rank)) @ rng.standard_normal((rank, inputs))
    x += 0.1 * rng.standard_normal(x.shape)
    weight = rng.standard_normal((inputs, outputs)).astype(np.float32)
    return weight, x.T @ x / len(x)


def output_error(
    weight: np.ndarray, moment: np.ndarray, codes: np.ndarray, scale: np.ndarray, group: int
) -> np.ndarray:
    """E^T C E per output by another way: the mean square of X E, with X a root of C."""
    wrong = weight.astype(np.float64) - rounding.dequantise(codes, scale, group)
    values, vectors = np.linalg.eigh(moment)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    return np.asarray(((root.T @ wrong) ** 2).sum(axis=0))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 5), st.integers(1, 8),
    st.integers(2, 8), st.sampled_from([0, 1, 7, 16]), st.booleans(),
)  # fmt: skip
def test_no_output_is_worse_than_with_the_clip_search(
    seed: int, inputs: int, outputs: int, rank: int, bits: int, group: int, small_blocks: bool
) -> None:
    weight, moment = case(seed, inputs, outputs, rank)
    power = np.diagonal(moment).copy()
    clip = rounding.quantise(weight, bits, group, input_power=power)
    before, block = output_error(weight, moment, *clip, group), compensation.BLOCK
    try:
        compensation.BLOCK = 4 if small_blocks else block
        found = compensation.compensate(weight, bits, group, moment=moment)
    finally:
        compensation.BLOCK = block
    after = output_error(weight, moment, found.codes, found.scale, group)
    assert (after <= before * (1 + 1e-6) + 1e-9).all()
    assert np.abs(found.codes.astype(int)).max() <= rounding.top_of(bits)
    assert (found.scale > 0).all()
    assert found.error <= found.clip_error
    power_out = float((weight.astype(np.float64) * (moment @ weight)).sum())
    assert found.error * power_out == pytest.approx(after.sum(), rel=1e-4, abs=1e-7 * power_out)


def test_uncorrelated_inputs_leave_nothing_to_make_up_for() -> None:
    """With C = I the error splits by weight: nothing beats the nearest code at the same scale."""
    weight = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    found = compensation.compensate(weight, 4, moment=np.eye(64))
    nearest = np.clip(np.rint(weight / found.scale[0]), -7, 7)
    np.testing.assert_array_equal(found.codes, nearest)


def test_near_the_best_of_all_codes_at_the_same_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compensation, "DAMPING", 0.01)  # the moments are exact here
    weight, moment = case(3, 6, 12, 2)
    found = compensation.compensate(weight, 2, moment=moment)
    grid = np.array(list(itertools.product((-1, 0, 1), repeat=6)), np.float64)  # 729 columns
    best = []
    for output in range(weight.shape[1]):
        wrong = weight[:, output].astype(np.float64) - grid * float(found.scale[0, output])
        best.append(np.einsum("ni,ij,nj->n", wrong, moment, wrong).min())
    error = output_error(weight, moment, found.codes, found.scale, 0)
    assert error.sum() <= 1.7 * sum(best)  # all 729 codes are tried for the best
    clip = rounding.quantise(weight, 2, input_power=np.diagonal(moment).copy())
    assert error.sum() < 0.7 * output_error(weight, moment, *clip, 0).sum()


@pytest.mark.parametrize(("bits", "share"), [(3, 0.5), (4, 0.5), (8, 0.6)])
def test_correlated_inputs_gain_much(bits: int, share: float) -> None:
    weight, moment = case(1, 200, 32, 20)  # more than one block
    found = compensation.compensate(weight, bits, moment=moment)
    assert found.error < share * found.clip_error
    assert found.kept == 1.0
    again = compensation.compensate(weight, bits, moment=moment)
    np.testing.assert_array_equal(found.codes, again.codes)
    np.testing.assert_array_equal(found.scale, again.scale)


@pytest.mark.parametrize("moment", [np.zeros((16, 16)), np.full((16, 16), np.nan)])
def test_useless_moments_fall_back_to_the_clip_search(moment: np.ndarray) -> None:
    weight = np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32)
    found = compensation.compensate(weight, 4, moment=moment)
    assert found.failed
    codes, scale = rounding.quantise(weight, 4, input_power=np.diagonal(moment).copy())
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_array_equal(found.scale, scale)


def test_inputs_that_were_never_seen_are_rounded_all_the_same() -> None:
    weight, moment = case(2, 24, 4, 6)
    moment[5] = moment[:, 5] = 0.0
    found = compensation.compensate(weight, 8, moment=moment)
    assert not found.failed
    error = np.abs(rounding.dequantise(found.codes, found.scale)[5] - weight[5])
    assert (error <= 0.51 * found.scale[0] + 1e-6).all() or found.kept == 0.0


@pytest.mark.parametrize("size", [1, 5, 300])
def test_the_factor_is_that_of_the_inverse(size: int) -> None:
    """``U^T U = H^-1`` in the order asked for, U upper."""
    rng = np.random.default_rng(size)
    x = rng.normal(size=(3 * size, size))
    moment, order = x.T @ x, rng.permutation(size)
    upper = compensation._factor(moment, order)
    assert upper is not None
    np.testing.assert_array_equal(upper, np.triu(upper))
    wanted = np.linalg.inv(moment[np.ix_(order, order)])
    np.testing.assert_allclose(upper.T @ upper, wanted, rtol=1e-8, atol=1e-8 * wanted.max())
