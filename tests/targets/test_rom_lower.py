"""Lowering to ROM: tiles cover the matrix, requantisers equal scales, counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pfmc import targets, technology
from pfmc.errors import InfeasibleError, UsageError
from pfmc.hardware import FixedLinear, QuantisedMatrix
from pfmc.targets.rom.lower import accumulator_bits, lower, nonzero_codes, requantiser

TECH = technology.load("rom")
TARGET = targets.get("rom")


def linear_of(
    rows: int, cols: int, bits: int, seed: int = 0, group: int | None = None, name: str = "a.b"
) -> FixedLinear:
    rng = np.random.default_rng(seed)
    top = 2 ** (bits - 1) - 1
    codes = rng.integers(-top, top + 1, (rows, cols), np.int8)
    group = group or rows
    scale = rng.uniform(1e-3, 1e-1, (-(-rows // group), cols)).astype(np.float32)
    bias = rng.normal(size=cols).astype(np.float32)
    return FixedLinear(name, QuantisedMatrix(codes, bits, scale, group), bias, 8, None)


@settings(max_examples=30)
@given(st.integers(1, 600), st.integers(1, 200), st.integers(2, 8), st.integers(0, 9))
def test_tiles_cover_the_matrix(rows: int, cols: int, bits: int, seed: int) -> None:
    linear = linear_of(rows, cols, bits, seed)
    tiled = lower(linear, TECH)
    t = tiled.tiles
    assert int((t["rows"].astype(int) * t["cols"]).sum()) == rows * cols
    zeros = float((t["zero_fraction"] * t["rows"] * t["cols"]).sum())
    assert zeros == pytest.approx(np.count_nonzero(linear.matrix.codes == 0), abs=0.1)
    assert tiled.summary().tiles == -(-rows // 256) * -(-cols // 64) == tiled.counts["tiles"]
    assert tiled.counts["macs"] == rows * cols


@given(st.floats(1e-12, 1e6), st.floats(1e-12, 1e3) | st.none())
def test_requantiser_is_the_scale(scale: float, step: float | None) -> None:
    scales = np.array([[scale]], np.float32)
    multiplier, shift = requantiser(scales, step)
    exact = float(scales[0, 0]) * (step or 1.0)
    assert 2**30 <= int(multiplier[0, 0]) < 2**31
    assert float(multiplier[0, 0]) * 2.0 ** -int(shift[0, 0]) == pytest.approx(exact, rel=2**-31)


def test_zero_scale_has_a_zero_multiplier() -> None:
    multiplier, _ = requantiser(np.zeros((1, 2), np.float32), None)
    assert not multiplier.any()


def test_accumulator_holds_the_largest_sum() -> None:
    assert accumulator_bits(2048, 7, 8) == (2048 * 7 * 127).bit_length() + 1 == 22
    assert accumulator_bits(1, 1, 8) == 8


def test_small_layers_emit_text_and_large_ones_binary() -> None:
    small = lower(linear_of(300, 70, 4, name="m.x"), TECH)
    assert sorted(small.files) == [f"rom/m.x/tile_{r}_{c}.hex" for r in (0, 1) for c in (0, 1)]
    assert small.files["rom/m.x/tile_1_0.hex"].count(b"\n") == 300 - 256
    large = lower(linear_of(1024, 1000, 4, name="m.y"), TECH)
    assert list(large.files) == ["rom/m.y.bin"]
    assert len(large.files["rom/m.y.bin"]) == 1024 * 1024 // 2


def test_deterministic() -> None:
    one, two = (lower(linear_of(300, 70, 3), TECH) for _ in range(2))
    assert one.files == two.files


def test_codes_too_wide_are_refused() -> None:
    tech = technology.load("rom")
    narrow = {**tech.constants, "array.weight_bits_max": tech.quantity("array.weight_bits_min")}
    limited = technology.Technology("narrow", "rom", "", narrow)
    with pytest.raises(InfeasibleError, match="codes of 4 bits") as error:
        lower(linear_of(8, 8, 4), limited)
    assert "quantise to 2 bits" in str(error.value)


@pytest.mark.parametrize("name", ["rom", "rom_n7", "rom_n28", "rom_sky130"])
def test_shelf_is_sound(name: str) -> None:
    TARGET.check(technology.load(name))
    limits = TARGET.limits(technology.load(name))
    assert limits.weight_bits == (2, 8)
    assert (limits.tile_inputs, limits.tile_outputs) == (256, 64)
    assert not limits.static_inputs


def test_impossible_technology_is_refused() -> None:
    tech = technology.load("rom")
    odd = {**tech.constants, "array.tile_outputs": tech.quantity("array.weight_bits_min")}
    with pytest.raises(UsageError, match="multiple of 8"):
        TARGET.check(technology.Technology("odd", "rom", "", odd))


def test_definition_depends_on_the_shape_alone() -> None:
    one, two = (
        TARGET.definition(lower(linear_of(300, 70, 4, s), TECH).summary(), TECH) for s in (0, 1)
    )
    assert one == two
    assert one.name == "rom_300x70_w4"
    assert {c.kind: c.count for c in one.cells} == {
        "rom_macro": 4, "mac_lane": 256, "join_adder": 2, "requantiser": 2
    }  # fmt: skip


@settings(max_examples=30)
@given(st.integers(1, 900), st.integers(1, 90), st.sampled_from([7, 255, 256, 600]), st.just(16))
def test_codes_that_are_not_zero_are_counted_tile_by_tile(
    rows: int, cols: int, tile_inputs: int, tile_outputs: int
) -> None:
    codes = np.random.default_rng(rows).integers(-1, 2, (rows, cols), np.int8)
    codes[:, ::3] = 1  # whole columns of ones: byte sums must not overflow
    counted = nonzero_codes(codes, tile_inputs, tile_outputs)
    for (r, c), n in np.ndenumerate(counted):
        tile = codes[r * tile_inputs :, c * tile_outputs :][:tile_inputs, :tile_outputs]
        assert n == np.count_nonzero(tile)
    assert counted.sum() == np.count_nonzero(codes)
