"""Closed forms of a layer's correction, against exact solutions and independent optimisers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pfmc.distill.side import (
    RIDGE,
    Moments,
    Plant,
    Side,
    allocate,
    fit,
    gain_of,
    refit_gain,
    spectrum,
)
from pfmc.distill.side_linear import CorrectedLinear, MeasuredLinear

sizes = st.integers(1, 12)
seeds = st.integers(0, 2**32 - 1)


def drawn(inputs: int, outputs: int, seed: int) -> tuple[np.ndarray, Plant, np.random.Generator]:
    """Correlated inputs with a mean, and a layer that is not as meant."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((inputs, inputs)) + 2 * np.eye(inputs)
    rows = rng.standard_normal((8 * inputs + 40, inputs)) @ mix + rng.standard_normal(inputs)
    wanted, bias = rng.standard_normal((inputs, outputs)), rng.standard_normal(outputs)
    matrix = wanted + 0.3 * rng.standard_normal(wanted.shape)
    return rows, Plant(matrix, bias + 0.1, wanted, bias), rng


def output(plant: Plant, side: Side, rows: np.ndarray) -> np.ndarray:
    y = rows @ plant.matrix + plant.constant
    return np.asarray(side.gain * y + side.offset + rows @ side.down @ side.up)


def error(plant: Plant, side: Side, rows: np.ndarray) -> float:
    return float(np.mean((output(plant, side, rows) - rows @ plant.wanted - plant.bias) ** 2))


@settings(max_examples=30, deadline=None)
@given(sizes, sizes, seeds)
def test_a_path_of_full_rank_gives_the_ideal_layer(inputs: int, outputs: int, seed: int) -> None:
    rows, plant, _ = drawn(inputs, outputs, seed)
    side, _ = fit(plant, Moments.of(rows), min(inputs, outputs))
    fresh = np.random.default_rng(seed + 1).standard_normal((20, inputs))
    want = fresh @ plant.wanted + plant.bias
    np.testing.assert_allclose(output(plant, side, fresh), want, atol=1e-4 * np.abs(want).max())


@settings(max_examples=30, deadline=None)
@given(sizes, sizes, seeds)
def test_a_gain_and_an_offset_are_found_exactly(inputs: int, outputs: int, seed: int) -> None:
    rows, plant, rng = drawn(inputs, outputs, seed)
    gain, offset = rng.uniform(0.5, 2, outputs), rng.standard_normal(outputs)
    plant = Plant(plant.wanted / gain, (plant.bias - offset) / gain, plant.wanted, plant.bias)
    side, found = fit(plant, Moments.of(rows), 0)
    np.testing.assert_allclose(side.gain, gain, rtol=1e-5)
    np.testing.assert_allclose(side.offset, offset, atol=1e-4)
    assert found.values.max(initial=0.0) < 1e-6 * np.abs(plant.wanted).sum() * np.abs(rows).max()


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 10), st.integers(3, 10), st.integers(1, 2), seeds)
@example(3, 3, 2, 13865)
def test_the_path_is_best_in_the_weighted_norm(
    inputs: int, outputs: int, rank: int, seed: int
) -> None:
    rows, plant, rng = drawn(inputs, outputs, seed)
    moments = Moments.of(rows)
    missed = plant.wanted - plant.matrix
    importance = rng.uniform(0.1, 3.0, outputs)
    ridge = RIDGE * np.trace(moments.covariance) / inputs  # which decides where little is left
    covariance = moments.covariance + ridge * np.eye(inputs)

    def cost(path: np.ndarray) -> float:
        left = missed - path
        return float(np.einsum("io,io,o->", left, covariance @ left, importance))

    found = spectrum(missed, moments.covariance, importance)
    down, up = found.factors(rank)
    ours = cost(down @ up)
    assert ours == pytest.approx(float(np.square(found.values[rank:]).sum()), rel=1e-6)
    u, s, v = np.linalg.svd(missed)
    assert ours <= cost(u[:, :rank] * s[:rank] @ v[:rank]) * (1 + 1e-6)
    for _ in range(20):
        shaken = [m * (1 + 0.02 * rng.standard_normal(m.shape)) for m in (down, up)]
        assert ours <= cost(shaken[0] @ shaken[1]) * (1 + 1e-6)


def test_each_rank_helps_and_equals_least_squares() -> None:
    rows, plant, _ = drawn(10, 7, 3)
    moments = Moments.of(rows)
    errors = [error(plant, fit(plant, moments, r)[0], rows) for r in range(8)]
    assert all(a > b for a, b in itertools.pairwise(errors))
    gain, offset = [], []
    for o in range(7):  # the gain of numpy's own least squares, with a column of ones
        y = rows @ plant.matrix[:, o] + plant.constant[o]
        design = np.stack([y, np.ones_like(y)], axis=1)
        meant = rows @ plant.wanted[:, o] + plant.bias[o]
        solved = np.linalg.lstsq(design, meant, rcond=None)[0]
        gain.append(solved[0])
        offset.append(solved[1])
    side, _ = fit(plant, moments, 0)
    np.testing.assert_allclose(side.gain, gain, rtol=1e-5)
    np.testing.assert_allclose(side.offset, offset, atol=1e-4)


def test_a_gain_is_refitted_beside_a_path() -> None:
    rows, plant, _ = drawn(9, 6, 5)
    moments = Moments.of(rows)
    side, _ = fit(plant, moments, 2)
    faded = Plant(plant.matrix * 0.8, plant.constant * 0.8, plant.wanted, plant.bias)
    again = refit_gain(faded, moments, side)
    np.testing.assert_allclose(again.gain, side.gain / 0.8, rtol=1e-3)
    assert error(faded, again, rows) < 1.01 * error(plant, side, rows) < error(faded, side, rows)


def test_dead_outputs_keep_their_gain() -> None:
    zero = np.zeros((4, 3))
    plant = Plant(zero, np.zeros(3), zero, np.ones(3))
    side, _ = fit(plant, Moments.of(np.random.default_rng(0).standard_normal((50, 4))), 1)
    np.testing.assert_array_equal(side.gain, 1)
    np.testing.assert_allclose(side.offset, 1)
    assert np.isfinite(side.down).all()
    assert gain_of(plant, Moments(np.zeros(4), np.zeros((4, 4)))).tolist() == [1, 1, 1]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(sizes, sizes, st.lists(st.integers(0, 100), max_size=4)), max_size=5),
    st.integers(0, 150),
)
def test_ranks_keep_to_the_budget_and_are_the_best_choice_of_greed(
    layers: list[tuple[int, int, list[int]]], budget: int
) -> None:
    removed = {f"{i}": sorted(map(float, r), reverse=True) for i, (_, _, r) in enumerate(layers)}
    shapes = {f"{i}": (a, b) for i, (a, b, _) in enumerate(layers)}
    ranks = allocate(removed, shapes, budget)
    spent = sum(ranks[n] * sum(shapes[n]) for n in ranks)
    assert spent <= budget
    for name, rank in ranks.items():
        assert 0 <= rank <= len(removed[name])
        if rank < len(removed[name]) and removed[name][rank] > 0:  # it was too dear in the end
            assert sum(shapes[name]) > budget - spent


def test_greed_prefers_what_removes_most_for_its_size() -> None:
    removed = {"a": [8.0, 1.0], "b": [9.0, 5.0]}
    assert allocate(removed, {"a": (2, 2), "b": (3, 3)}, 16) == {"a": 1, "b": 2}
    assert allocate(removed, {"a": (2, 2), "b": (3, 3)}, 5) == {"a": 1, "b": 0}


def test_the_module_computes_what_is_stored() -> None:
    rows, plant, _ = drawn(8, 5, 11)
    side, _ = fit(plant, Moments.of(rows), 3)
    layer = CorrectedLinear(MeasuredLinear(plant.matrix, plant.constant), side, 2.5)
    y = layer(torch.from_numpy(rows.astype(np.float32)))
    stored = side.stored()
    for part in (stored.down, stored.up):  # 8-bit codes of each column
        codes = part / np.abs(part).max(axis=0, keepdims=True) * 127
        np.testing.assert_allclose(codes, np.round(codes), atol=1e-3)
    want = output(plant, Side(side.gain, side.offset, stored.down, stored.up), rows)
    np.testing.assert_allclose(y.detach().numpy(), want, rtol=1e-4, atol=1e-4)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    back = layer.side()
    np.testing.assert_allclose(back.offset, side.offset, rtol=1e-6)
    assert back.parameters == 2 * 5 + 3 * 13
