"""The clip search: never worse than plain rounding, ties to even, and codes packed as ONNX does."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pfmc import rounding
from pfmc.errors import InputError, UsageError
from pfmc.hardware import QuantisedMatrix

MATRICES = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 40), st.integers(1, 6)),
    elements=st.floats(-100, 100, width=32) | st.just(0.0),
)


def squares(weight: np.ndarray, codes: np.ndarray, scale: np.ndarray, group: int) -> np.ndarray:
    """Mean square error per group and output, float64."""
    error = (rounding.dequantise(codes, scale, group).astype(np.float64) - weight) ** 2
    rows = rounding.groups_of(len(weight), group)
    return np.stack([error[r].mean(axis=0) for r in rows])


@settings(max_examples=150, deadline=None)
@given(MATRICES, st.integers(2, 8), st.sampled_from([0, 1, 7, 16]), st.booleans(), st.booleans())
def test_never_worse_than_plain(
    weight: np.ndarray, bits: int, group: int, weighted: bool, sampled: bool
) -> None:
    power = np.linspace(0.0, 3.0, len(weight)) if weighted else None
    plain = rounding.quantise(weight, bits, group, search=False)
    old = rounding.EXACT_ELEMENTS
    try:
        rounding.EXACT_ELEMENTS = 0 if sampled else old
        found = rounding.quantise(weight, bits, group, input_power=power)
    finally:
        rounding.EXACT_ELEMENTS = old
    top = rounding.top_of(bits)
    assert found[0].dtype == np.int8
    assert np.abs(found[0].astype(int)).max() <= top
    assert (found[1] > 0).all()
    floor = 1e-12 * (1 + (weight.astype(np.float64) ** 2).max())
    assert (squares(weight, *found, group) <= squares(weight, *plain, group) + floor).all()


@settings(max_examples=60, deadline=None)
@given(MATRICES, st.integers(2, 8))
def test_plain_rounding_is_the_formula(weight: np.ndarray, bits: int) -> None:
    top = np.float32(rounding.top_of(bits))
    peak = np.abs(weight).max(axis=0)
    tiny = np.finfo(np.float32).tiny
    scale = np.where(peak > 0, np.maximum(peak / top, tiny), np.float32(1)).astype(np.float32)
    codes, found = rounding.quantise(weight, bits, search=False)
    np.testing.assert_array_equal(found[0], scale)
    np.testing.assert_array_equal(codes, np.clip(np.rint(weight / scale), -top, top))


def test_ties_round_to_even_and_zero_channels_stay_zero() -> None:
    weight = np.array([[7.0, 0.0], [0.5, 0.0], [1.5, 0.0], [-2.5, 0.0]], np.float32)
    codes, scale = rounding.quantise(weight, 4, search=False)
    np.testing.assert_array_equal(codes, [[7, 0], [0, 0], [2, 0], [-2, 0]])
    np.testing.assert_array_equal(scale, [[1.0, 1.0]])


def least_distortion(top: int) -> float:
    """Of the best symmetric uniform quantiser with 2 top + 1 levels, of a unit normal variable."""
    x = np.linspace(-8, 8, 160_001)
    density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi) * (x[1] - x[0])
    steps = np.linspace(0.05, 1.5, 400)
    return min(
        float((density * (x - s * np.clip(np.rint(x / s), -top, top)) ** 2).sum()) for s in steps
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_weights_reach_the_best_uniform_quantiser(bits: int) -> None:
    weight = np.random.default_rng(0).standard_normal((4096, 8)).astype(np.float32)
    codes, scale = rounding.quantise(weight, bits)
    error = float(((rounding.dequantise(codes, scale) - weight) ** 2).mean())
    plain = rounding.quantise(weight, bits, search=False)
    before = float(((rounding.dequantise(*plain) - weight) ** 2).mean())
    best = least_distortion(rounding.top_of(bits))
    assert 0.97 * best < error < 1.06 * best
    assert error < 0.6 * before


def test_a_sample_finds_nearly_what_the_whole_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(1).standard_normal((2048, 64)).astype(np.float16)
    errors = []
    for limit in (0, 1 << 30):
        monkeypatch.setattr(rounding, "EXACT_ELEMENTS", limit)
        codes, scale = rounding.quantise(weight, 4)
        errors.append(squares(weight.astype(np.float64), codes, scale, 0).mean())
    assert errors[0] < 1.08 * errors[1]


def test_input_power_lowers_the_weighted_error() -> None:
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((512, 32)).astype(np.float32)
    power = np.exp(rng.normal(0, 2, 512))

    def output_error(p: np.ndarray | None) -> float:
        error = rounding.dequantise(*rounding.quantise(weight, 3, input_power=p)) - weight
        return float((power[:, None] * error.astype(np.float64) ** 2).sum())

    assert output_error(power) < output_error(None)


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_every_float_type_and_layout(kind: type) -> None:
    weight = np.random.default_rng(3).standard_normal((24, 10)).astype(kind)
    one = rounding.quantise(weight, 4, 5)
    other = rounding.quantise(np.asfortranarray(weight), 4, 5)
    np.testing.assert_array_equal(one[0], other[0])
    assert one[1].shape == (5, 10)
    matrix = QuantisedMatrix(one[0], 4, one[1], 5)
    np.testing.assert_array_equal(matrix.weights(), rounding.dequantise(*one, 5))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_is_refused(bad: float) -> None:
    weight = np.zeros((300, 4), np.float32)
    weight[257, 2] = bad
    with pytest.raises(InputError) as caught:
        rounding.quantise(weight, 4, 16)
    assert "[257, 2]" in caught.value.where


def test_bits_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match="9 bits"):
        rounding.quantise(np.zeros((2, 2), np.float32), 9)


@settings(deadline=None)
@given(hnp.arrays(np.int8, hnp.array_shapes(max_dims=3, max_side=9), elements=st.integers(-8, 7)))
def test_packing_goes_there_and_back_and_is_that_of_onnx(codes: np.ndarray) -> None:
    import onnx_ir as ir

    packed = rounding.pack_int4(codes)
    assert packed.size == -(-codes.size // 2)
    np.testing.assert_array_equal(rounding.unpack_int4(packed, codes.shape), codes)
    tensor = ir.PackedTensor(packed, ir.DataType.INT4, shape=codes.shape)
    np.testing.assert_array_equal(tensor.numpy().astype(np.int8), codes)


def test_low_nibble_first() -> None:
    assert rounding.pack_int4(np.array([1, -2, 7], np.int8)).tolist() == [0xE1, 0x07]


def test_best_range_clips_a_lone_outlier_and_keeps_a_uniform_one() -> None:
    uniform = {i / 100: i / 100 for i in range(1, 101)}
    assert rounding.best_range(uniform, 1.0, 127.0) == pytest.approx(1.0)
    lone = {**{i / 100: i / 100 for i in range(1, 100)}, 0.9999999: 1.0, 1.0: 30.0}
    assert 0.9 < rounding.best_range(lone, 30.0, 127.0) < 6.0
    assert rounding.best_range({}, 0.0, 127.0) == 0.0
