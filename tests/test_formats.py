"""Number formats: codes and scales against ml_dtypes and against a search over all codes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfmc import formats, rounding
from pfmc.errors import UsageError

ALL = [formats.of(n, b) for n in ("int", "midrise") for b in range(2, 8)] + [
    formats.of(n) for n in ("ternary", "mxint8", "mxfp4", "nvfp4")
]


def values_of(form: formats.Format) -> np.ndarray:
    """Every code by the module's table."""
    if form.name == "midrise":
        return np.arange(-form.top, form.top + 1, 2)
    if form.name in ("mxfp4", "nvfp4"):
        return np.unique(np.concatenate([-formats.E2M1.astype(int), formats.E2M1]))
    return np.arange(-form.top, form.top + 1)


@pytest.mark.parametrize("form", ALL, ids=lambda f: f"{f.name}{f.bits}")
@given(st.integers(0, 10**6))
def test_codes_are_the_nearest(form: formats.Format, seed: int) -> None:
    ratio = np.random.default_rng(seed).normal(0, form.top, 50)
    codes = form.codes(ratio.copy())
    known = values_of(form)
    least = np.abs(ratio[:, None] - known).min(axis=1)
    assert np.isin(codes, known).all()
    np.testing.assert_allclose(np.abs(ratio - codes), least, rtol=0, atol=1e-9)
    assert len(known) <= 2**form.bits


def test_e2m1_rounds_as_ml_dtypes() -> None:
    ratio = np.linspace(-8, 8, 4001).astype(np.float32)
    truth = ratio.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    found = formats.of("mxfp4").codes(2 * ratio) / 2
    np.testing.assert_array_equal(found, truth)


@given(st.lists(st.floats(1e-20, 1e20), min_size=1, max_size=20))
def test_powers_of_two_are_those_of_e8m0(given_scales: list[float]) -> None:
    form = formats.of("mxfp4")
    scale = form.lattice(np.array(given_scales, np.float32))
    held = form.scale_bytes(scale)
    truth = held.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(truth, scale)
    np.testing.assert_array_equal(form.scale_of_bytes(held), scale)


def test_e4m3_scales_come_back() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    form = formats.of("nvfp4").bound(weight)
    _, scale = rounding.quantise(weight, 4, form.block, form=form)
    np.testing.assert_array_equal(form.scale_of_bytes(form.scale_bytes(scale)), scale)
    assert scale.max() <= 448 * form.unit * (1 + 1e-6)


def test_plain_mx_scale_is_that_of_the_specification() -> None:
    weight = np.array([[0.1], [-3.0], [0.7]], np.float32)  # OCP MX 6.3: 2^(floor(log2 3) - 2)
    codes, scale = rounding.quantise(weight, 4, 32, search=False, form=formats.of("mxfp4"))
    assert scale[0, 0] == 0.25  # of doubled codes: half of 2^-1
    np.testing.assert_array_equal(codes[:, 0], [0, -12, 3])


def test_stored_bits() -> None:
    assert formats.of("ternary").weight_bits(256, 0) == 1.6
    assert formats.of("mxfp4").weight_bits(256, 32) == 4.25
    assert formats.of("nvfp4").weight_bits(256, 16) == 4.5
    assert formats.of("int", 3).weight_bits(256, 0) == 3
    assert formats.of("int", 3).weight_bits(256, 128) == 3 + 2 * 39 / 256
    assert formats.of("ternary").word_bytes(64) == 13


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(UsageError, match="no number format") as caught:
        formats.of("mxfp5")
    assert "mxfp4" in str(caught.value)
    with pytest.raises(UsageError, match="255"):
        formats.of("midrise", 8)
    with pytest.raises(UsageError, match="no power of two"):
        formats.of("mxfp4").scale_bytes(np.array([3.0], np.float32))


@pytest.mark.parametrize("search", [True, False])
def test_blocks_of_zeros_have_scales_that_can_be_stored(search: bool) -> None:
    weight = np.random.default_rng(0).normal(0, 0.1, (64, 8)).astype(np.float32)
    weight[16:32, 3] = 0.0
    for name in ("mxint8", "mxfp4", "nvfp4"):
        form = formats.of(name).bound(weight)
        codes, scale = rounding.quantise(weight, form.bits, form.block, search=search, form=form)
        assert not codes[16:32, 3].any()
        np.testing.assert_array_equal(form.scale_of_bytes(form.scale_bytes(scale)), scale)
