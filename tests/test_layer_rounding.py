"""A layer is never rounded worse than plainly on its calibration data, whatever the format."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pfmc import formats
from pfmc.layer_rounding import ASYMMETRY_DAMPING, Seen, round_layer

FORMS = ["int 2", "int 3", "int 4", "midrise 2", "midrise 3", "ternary 2", "mxint8 8", "mxfp4 4",
         "nvfp4 4"]  # fmt: skip


def error(weight: np.ndarray, x: np.ndarray, held: np.ndarray) -> float:
    """By running the layer."""
    truth = x @ weight.astype(np.float64)
    return float(((truth - x @ held.astype(np.float64)) ** 2).sum() / (truth**2).sum())


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(FORMS), st.integers(0, 10**6), st.integers(2, 70), st.integers(1, 9),
    st.sampled_from([0, 5, 16]), st.sampled_from(["clip", "compensate", "learned"]),
)  # fmt: skip
def test_never_worse_than_plain(
    name: str, seed: int, inputs: int, outputs: int, group: int, search: str
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((200, inputs)) @ rng.standard_normal((inputs, inputs))
    weight = rng.standard_t(4, (inputs, outputs)).astype(np.float32)
    form = formats.of(name.split()[0], int(name.split()[1]))
    seen = Seen((x**2).mean(axis=0), x.T @ x / len(x))
    plain = round_layer(weight, form, group, "plain", seen)
    made = round_layer(weight, form, group, search, seen)  # type: ignore[arg-type]
    assert error(weight, x, made.weights()) <= error(weight, x, plain.weights()) * (1 + 1e-6)
    assert made.format == form.name
    assert made.group == (form.block or group or inputs)
    assert made.diagnostics["plain_error_relative"] == pytest.approx(
        error(weight, x, plain.weights()), rel=1e-6
    )
    assert made.diagnostics["code_error_relative"] == pytest.approx(
        error(weight, x, made.weights()), rel=1e-6
    )
    assert made.choice in ("plain", "clip", "compensate")


def test_the_target_of_rounded_inputs_is_the_damped_least_squares_answer() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 6))
    rounded = x + 0.3 * rng.standard_normal(x.shape) + 0.2 * x[:, ::-1]
    weight = rng.standard_normal((6, 3))
    seen = Seen(None, rounded.T @ rounded / 500, rounded.T @ x / 500)
    damping = ASYMMETRY_DAMPING * float((rounded**2).mean())
    rows = np.concatenate([rounded, np.sqrt(500 * damping) * np.eye(6)])
    wanted = np.concatenate([x @ weight, np.sqrt(500 * damping) * weight])
    truth = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    np.testing.assert_allclose(seen.target(weight), truth, rtol=1e-6, atol=1e-6)


def test_without_calibration_the_clip_search_stands() -> None:
    weight = np.random.default_rng(1).standard_normal((40, 5)).astype(np.float32)
    made = round_layer(weight, formats.of("int", 4), 0, "compensate")
    assert made.choice == "clip"
    assert not made.diagnostics


@pytest.mark.parametrize("search", ["clip", "compensate"])
def test_inputs_that_were_all_zero_tell_nothing(search: str) -> None:
    """Experts without a row, inputs that calibration left at zero: plain is not "perfect"."""
    weight = np.random.default_rng(2).standard_normal((64, 5)).astype(np.float32)
    zero = np.zeros((64, 64))
    truth = round_layer(weight, formats.of("int", 2), 0, search)  # type: ignore[arg-type]
    for seen in (Seen(np.zeros(64)), Seen(np.zeros(64), zero), Seen(np.zeros(64), zero, zero)):
        made = round_layer(weight, formats.of("int", 2), 0, search, seen)  # type: ignore[arg-type]
        assert made.choice == "clip"
        assert not made.diagnostics
        np.testing.assert_array_equal(made.weights(), truth.weights())


@pytest.mark.parametrize("search", ["plain", "clip", "compensate"])
def test_dead_outputs_stay_dead_where_there_is_no_zero(search: str) -> None:
    rng = np.random.default_rng(3)
    x, weight = rng.standard_normal((200, 24)), rng.standard_normal((24, 4)).astype(np.float32)
    weight[:, 1], weight[:8, 2] = 0.0, 0.0
    seen = Seen((x**2).mean(axis=0), x.T @ x / len(x))
    made = round_layer(weight, formats.of("midrise", 2), 8, search, seen)  # type: ignore[arg-type]
    assert np.abs(x @ made.weights()[:, 1]).max() < 1e-30
    if search != "compensate":  # which may let dead inputs make up for the others
        assert np.abs(made.weights()[:8, 2]).max() < 1e-30
