"""Optical lowering: passivity, faithfulness, tile tables, netlist, and what verify catches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pfmc import technology as shelf
from pfmc.hardware import FixedLinear, LayerStatistics, QuantisedMatrix
from pfmc.netlist import Netlist
from pfmc.targets import get
from pfmc.targets.base import StoredLinear, Target
from pfmc.targets.optical import OpticalTarget, lower, tiling
from pfmc.targets.optical.validation import changed_constants

TECH = shelf.load("optical")
TARGET: Target = OpticalTarget()


def make(inputs: int, outputs: int, seed: int = 0, **more: object) -> FixedLinear:
    rng = np.random.default_rng(seed)
    codes = np.clip(np.round(rng.standard_normal((inputs, outputs)) * 30), -127, 127)
    scale = rng.uniform(1e-3, 2e-3, (1, outputs)).astype(np.float32)
    matrix = QuantisedMatrix(codes.astype(np.int8), 8, scale, inputs)
    return replace(FixedLinear("layer", matrix, None, 8, 0.02), **more)  # type: ignore[arg-type]


def store(linear: FixedLinear, tech: shelf.Technology = TECH) -> StoredLinear:
    tiled = TARGET.lower_linear(linear, tech)
    tensors = {**tiled.tensors, "codes": linear.matrix.codes, "scale": linear.matrix.scale}
    return StoredLinear(
        linear.name, linear.inputs, linear.outputs, tiled.tiles, tensors, linear.bias,
        linear.input_bits, linear.input_scale,
    )  # fmt: skip


def small(height: int, width: int) -> shelf.Technology:
    sizes = {"array.tile_inputs": float(height), "array.tile_outputs": float(width)}
    return changed_constants(TECH, sizes)


def test_registered() -> None:
    assert isinstance(get("optical"), OpticalTarget)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 17), st.integers(1, 17),
    st.integers(0, 9),
)  # fmt: skip
def test_any_shape_is_passive_and_faithful(
    inputs: int, outputs: int, height: int, width: int, seed: int
) -> None:
    linear, tech = make(inputs, outputs, seed), small(height, width)
    stored = store(linear, tech)
    sigma = np.linalg.svd(stored.tensors["transfer"].astype(np.float64), compute_uv=False)
    assert sigma.max() <= 0.6
    lit = stored.tensors["transfer"].any(axis=(1, 2))
    assert sigma[:, 0] == pytest.approx(np.where(lit, 0.6, 0.0), rel=1e-5)
    gain = stored.tiles["sigma_max"] * stored.tiles["scale"]
    for k, tile in enumerate(stored.tensors["transfer"]):
        row, col, rows, cols = (int(stored.tiles[n][k]) for n in ("row0", "col0", "rows", "cols"))
        wanted = linear.matrix.weights()[row : row + rows, col : col + cols]
        assert tile[:rows, :cols] * gain[k] == pytest.approx(wanted, rel=1e-5, abs=1e-7)
        assert not tile[rows:].any()
        assert not tile[:, cols:].any()
    assert all(c.passed for c in TARGET.verify(stored, Path(), tech))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 20), st.integers(1, 20))
def test_split_and_join_are_inverse_and_shapes_count_all(
    inputs: int, outputs: int, height: int, width: int
) -> None:
    grid = tiling.Grid(inputs, outputs, height, width)
    matrix = np.arange(inputs * outputs, dtype=np.float64).reshape(inputs, outputs)
    assert np.array_equal(grid.join(grid.split(matrix)), matrix)
    shapes = list(grid.shapes())
    assert sum(n for *_, n in shapes) == grid.tiles
    assert sum(r * c * n for r, c, n in shapes) == inputs * outputs


def test_table_against_an_independent_svd() -> None:
    linear = make(100, 70)
    tiles = TARGET.lower_linear(linear, TECH).tiles
    block = linear.matrix.weights()[64:, :64].astype(np.float64)
    sigma = np.linalg.svd(block, compute_uv=False)
    k = 2
    assert (int(tiles["row0"][k]), int(tiles["col0"][k])) == (64, 0)
    assert tiles["sigma_max"][k] == pytest.approx(sigma[0], rel=2e-6)
    rank = (sigma**2).sum() / sigma[0] ** 2
    assert tiles["stable_rank"][k] == pytest.approx(rank, rel=1e-5)
    assert tiles["power_fraction"][k] == pytest.approx(0.36 * rank / 36, rel=1e-5)
    snr = 4.0 * (1e6 * 36 / 64) * (0.36 * rank / 36) * float(tiles["transmission"][k]) * 0.68 / 1.1
    assert tiles["snr_full_db"][k] == pytest.approx(10 * np.log10(snr), abs=1e-4)


def test_delivered_power_of_a_gaussian_square_is_a_quarter() -> None:
    """Notes 2a: |W|_F² / (N sigma_max²) = 1/4 for a square iid Gaussian matrix."""
    weights = np.random.default_rng(0).standard_normal((1, 512, 512))
    sigma = lower.largest_singular_values(weights)
    transfer = lower.passive(weights, sigma, 1.0)
    assert float((transfer**2).sum()) / 512 == pytest.approx(0.25, rel=0.04)


def test_zero_tiles_stay_dark() -> None:
    linear = make(70, 10)
    codes = linear.matrix.codes.copy()
    codes[:64] = 0
    tiled = TARGET.lower_linear(replace(linear, matrix=replace(linear.matrix, codes=codes)), TECH)
    assert tiled.tiles["sigma_max"][0] == 0.0
    assert not tiled.tensors["transfer"][0].any()
    assert np.isfinite(tiled.tensors["adc_range"]).all()
    assert np.isfinite(list(tiled.diagnostics.values())).all()


def test_calibration_sets_the_converter_ranges() -> None:
    linear = make(128, 8)
    power = np.full(128, 0.01)
    rms = np.sqrt(power @ linear.matrix.weights().astype(np.float64) ** 2)
    calm = LayerStatistics(2.54, {}, power, rms.astype(np.float32), rms.astype(np.float32), 10)
    loud = replace(calm, output_rms=(3 * rms).astype(np.float32))
    narrow, wide = (
        TARGET.lower_linear(replace(linear, statistics=s), TECH) for s in (calm, loud)
    )  # fmt: skip
    tile, gain = 1, narrow.tiles["sigma_max"][1] * narrow.tiles["scale"][1] * 0.02 * 127
    block = linear.matrix.weights()[64:].astype(np.float64)
    signal = np.sqrt(0.01 * (block**2).sum(axis=0)) / gain
    expected = 5.0 * np.sqrt(signal**2 + float(narrow.tiles["noise_sigma"][1]) ** 2)
    assert narrow.tensors["adc_range"][tile, :8] == pytest.approx(expected, rel=1e-4)
    ratio = wide.tensors["adc_range"][tile, :8] / narrow.tensors["adc_range"][tile, :8]
    assert ratio == pytest.approx(3.0, rel=0.02)


def test_lowering_is_deterministic() -> None:
    first, second = (TARGET.lower_linear(make(65, 130), TECH) for _ in range(2))
    for key, tensor in first.tensors.items():
        assert tensor.tobytes() == second.tensors[key].tobytes()
    assert {k: c.tolist() for k, c in first.tiles.items()} == {
        k: c.tolist() for k, c in second.tiles.items()
    }


def test_verify_catches_gain_and_a_wrong_weight() -> None:
    stored = store(make(80, 80))
    amplified = stored.tensors["transfer"] * np.float32(1.7)
    checks = TARGET.verify(replace(stored, tensors={**stored.tensors, "transfer": amplified}),
                           Path(), TECH)  # fmt: skip
    assert {c.name for c in checks if not c.passed} == {
        "spectral norm", "energy", "weights", "power fraction",
    }  # fmt: skip
    codes = stored.tensors["codes"].copy()
    codes[79, 79] ^= 1
    bent = replace(stored, tensors={**stored.tensors, "codes": codes})
    assert [c.name for c in TARGET.verify(bent, Path(), TECH) if not c.passed] == ["weights"]


def test_diagnostics_state_the_fidelity_level() -> None:
    summary = TARGET.lower_linear(make(64, 64), TECH).summary()
    assert summary.diagnostics["fidelity_level"] == 0.0
    assert summary.diagnostics["passive_scale"] == 0.6
    assert 0.0 < summary.diagnostics["power_fraction_min"] < 0.36


def test_netlist_text() -> None:
    layer = TARGET.lower_linear(make(70, 130), TECH).summary()
    text = Netlist("layer", {"layer": TARGET.definition(layer, TECH)}).to_text()
    assert text == (
        "netlist layer\n"
        "module layer\n"
        "  in  x 8\n"
        "  out y 32\n"
        "  cells optical_dac 70 bits=8\n"
        "  cells optical_modulator 70 photons_per_copy=1000000.0\n"
        "  cells optical_splitter 140\n"
        "  cells optical_tile 2 inputs=64 outputs=64 planes=8\n"
        "  cells optical_tile 1 inputs=64 outputs=2 planes=8\n"
        "  cells optical_tile 2 inputs=6 outputs=64 planes=8\n"
        "  cells optical_tile 1 inputs=6 outputs=2 planes=4\n"
        "  cells optical_receiver 260\n"
        "  cells optical_adc 17 bits=8\n"
        "  cells optical_accumulator 17 bits=32\n"
    )
