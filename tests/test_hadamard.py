"""Hadamard matrices: orthogonal by integer arithmetic; rotations equal their dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pfmc.hadamard import hadamard, rotation

MISSING = {116, 156, 188, 232, 236}  # of the multiples of 4 up to 256


@pytest.mark.parametrize("order", [1, 2, *range(4, 257, 4)])
def test_every_row_is_orthogonal_to_every_other(order: int) -> None:
    found = hadamard(order)
    if order in MISSING:
        assert found is None
        return
    assert found is not None
    assert set(np.unique(found)) <= {-1, 1}
    np.testing.assert_array_equal(found @ found.T, order * np.eye(order))


@pytest.mark.parametrize("order", [0, 3, 6, 30, 50])
def test_there_is_none_of_other_orders(order: int) -> None:
    assert hadamard(order) is None


WIDTHS = [2, 4, 12, 20, 24, 28, 30, 36, 40, 48, 64, 96, 172, 384, 7]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(WIDTHS), st.sampled_from(["hadamard", "random"]), st.integers(0, 10**6))
def test_a_rotation_is_orthogonal_and_fast(width: int, kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    blocks = [b for b in range(1, width + 1) if width % b == 0]
    block = blocks[int(rng.integers(len(blocks)))]
    turn = rotation(width, block, kind, rng)
    dense = turn.rows(np.eye(width))
    np.testing.assert_allclose(dense @ dense.T, np.eye(width), atol=1e-12)
    outside = np.kron(np.eye(width // block), np.ones((block, block))) == 0
    assert np.all(np.abs(dense[outside]) < 1e-12)  # blocks do not touch
    x, w = rng.normal(size=(2, 3, width)), rng.normal(size=(width, 5))
    np.testing.assert_allclose(turn.rows(x), x @ dense, atol=1e-12)
    np.testing.assert_allclose(turn.columns(w), dense.T @ w, atol=1e-12)


@pytest.mark.parametrize(
    ("width", "core", "doublings"), [(4096, 1, 12), (768, 12, 6), (5120, 20, 8), (3584, 28, 7),
                                     (11008, 172, 6), (172, 172, 0)]
)  # fmt: skip
def test_a_hadamard_rotation_spreads_one_number_evenly(
    width: int, core: int, doublings: int
) -> None:
    turn = rotation(width, width, "hadamard", np.random.default_rng(0))
    assert (len(turn.core), turn.doublings) == (core, doublings)
    one = np.zeros(width)
    one[width // 3] = 1.0
    np.testing.assert_allclose(np.abs(turn.rows(one)), width**-0.5, rtol=1e-12)


def test_only_the_core_of_a_wide_rotation_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole matrix of 11,008 numbers would take, and keep, a gigabyte."""
    from pfmc import hadamard as room

    made: list[int] = []
    real = room.hadamard
    monkeypatch.setattr(room, "hadamard", lambda order: made.append(order) or real(order))
    rotation(11008, 11008, "hadamard", np.random.default_rng(0))
    assert max(made) == 172


def test_where_there_is_no_hadamard_matrix_the_rotation_is_random() -> None:
    turn = rotation(30, 30, "hadamard", np.random.default_rng(0))
    assert len(turn.core) == 30
    assert np.ptp(np.abs(turn.rows(np.eye(30)))) > 0.1
