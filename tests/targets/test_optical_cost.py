"""Optical cost: sums, published figures, the 1/width law, geometry, writers, impossible files."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from pfmc import technology as shelf
from pfmc.cost import METRICS, to_json
from pfmc.errors import InfeasibleError, UsageError
from pfmc.hardware import FabricOp, LayerSummary, Workload
from pfmc.quantity import read_quantity
from pfmc.targets.base import Target
from pfmc.targets.optical import OpticalTarget, energy, geometry, physics, size, tiling
from pfmc.targets.optical.validation import changed_constants

TECH = shelf.load("optical")
TARGET: Target = OpticalTarget()
DECODE = Workload("decode", 256)


def layer(inputs: int, outputs: int, tech: shelf.Technology = TECH) -> LayerSummary:
    grid = tiling.grid(inputs, outputs, tech)
    return LayerSummary("layer", inputs, outputs, grid.tiles, tiling.counts(grid, tech), {})


def square(width: int) -> shelf.Technology:
    sizes = {"array.tile_inputs": float(width), "array.tile_outputs": float(width)}
    return changed_constants(TECH, sizes)


NORM = FabricOp("norm", "norm", "", (), {"adds": 512.0, "muls": 1024.0, "roots": 1.0})


def test_terms_add_up_and_every_constant_has_its_source() -> None:
    report = TARGET.cost([layer(512, 1536), layer(1536, 512)], [NORM], TECH, DECODE)
    assert report.metrics.keys() <= METRICS.keys()
    for metric in report.metrics.values():
        if metric.terms:
            for end in ("low", "typical", "high"):
                parts = [getattr(t.value, end) for t in metric.terms]
                assert getattr(metric.value, end) == pytest.approx(math.fsum(parts), rel=1e-12)
        assert metric.value.low <= metric.value.typical <= metric.value.high
        assert metric.value.constants <= report.sources.keys()
    json.dumps(to_json(report))


def test_energy_by_hand() -> None:
    """One 64 x 64 tile: every term from the constants, typical."""
    terms = {t.name: t.value.typical for t in energy.terms([layer(64, 64)], TECH)}
    photon = 6.62607015e-34 * 299792458 / 1550e-9
    assert terms["converters.dac"] == pytest.approx(64 * 10e-12)
    assert terms["light.modulators"] == pytest.approx(64 * 0.4e-12)
    assert terms["converters.receivers"] == pytest.approx(64 * 1e-12)
    assert terms["converters.adc"] == pytest.approx(64 * 3.5e-12)
    assert terms["light.signal"] == pytest.approx(64 * 1e6 * photon / (0.8 * 0.4 * 0.12))
    lo = 10 * 200**2 / 0.68 * photon / (0.8 * 0.12)
    assert terms["light.oscillator"] == pytest.approx(64 * lo)
    assert terms["partial_sums"] == pytest.approx(64 * (0.143e-12 + 0.021e-12))


def test_optical_copies_cost_light_and_save_converters() -> None:
    one, many = (
        {t.name: t.value.typical for t in energy.terms([layer(64, n)], TECH)} for n in (64, 512)
    )  # fmt: skip
    assert many["converters.dac"] == one["converters.dac"]
    assert many["light.signal"] == pytest.approx(8 * one["light.signal"] / 0.97**3)
    wide = layer(64, 64 * 33)
    assert wide.counts["dac_samples"] == 2 * 64


def test_energy_per_mac_falls_as_one_over_width() -> None:
    """Optical Transformers, arXiv 2302.10360: energy per product ~ 1 / width; 15 pJ / width."""
    widths = np.array([64, 256, 1024, 4096])
    found = []
    for width in widths:
        tech = square(int(width))
        terms = {t.name: t.value.typical for t in energy.terms([layer(width, width, tech)], tech)}
        light = {k: v for k, v in terms.items() if k != "partial_sums"}
        found.append(sum(light.values()) / float(width) ** 2)
        pair = sum(terms[k] for k in light if k.startswith("converters") or "modul" in k)
        assert pair / float(width) ** 2 == pytest.approx(15e-12 / float(width), rel=0.01)
    slope = np.polyfit(np.log(widths), np.log(found), 1)[0]
    assert slope == pytest.approx(-1.0, abs=1e-6)


def test_published_figures() -> None:
    report = TARGET.cost([layer(64, 64)], [], TECH, DECODE)
    rows = {v.name: v for v in report.validation}
    for width, figure in ((16, 363), (64, 91), (256, 23)):
        row = rows[f"converters per MAC, width {width}, SimPhony devices"]
        assert row.published == figure
        assert row.ratio == pytest.approx(1.0, abs=0.02)
    assert rows["local oscillator per MAC, 624 electrons, width 64"].ratio == pytest.approx(1, 0.02)
    light = rows["signal light per MAC at 40 dB, power fraction 0.036"]
    assert light.ratio == pytest.approx(1.0, abs=0.03)
    assert rows["weights per mm3, 64 x 64 prototype at 1000 nm"].ratio == pytest.approx(1.0, 0.1)
    fanout = rows["photons of incoherent fan-out over homodyne, 256 x 256"]
    assert fanout.ours == pytest.approx(fanout.published, abs=1.0)
    beside = rows["energy per MAC, whole token, beside the digital baseline"]
    assert (beside.published, beside.unit) == (300.0, "fJ")
    assert beside.ours == pytest.approx(report["energy__mac"].typical * 1e15)
    assert rows["energy per MAC, whole token, beside the arithmetic floor"].published == 40.0


def test_photon_energy_and_oscillator() -> None:
    assert physics.photon_energy(TECH).typical == pytest.approx(1.28e-19, rel=2e-3)
    assert physics.oscillator_photons(TECH).typical * 0.68 == pytest.approx(10 * 200**2)


@pytest.mark.parametrize(("modes", "wavelengths"), [(16, 200), (32, 250), (64, 300)])
def test_gaps_of_the_prototypes(modes: int, wavelengths: int) -> None:
    """Notes 3: gaps of 200, 250, 300 medium wavelengths at pixels of two of them."""
    window = {16: 96, 32: 128, 64: 160}[modes]
    tech = changed_constants(
        TECH,
        {"optics.index": 1.0, "optics.wavelength": 1e-6, "plane.pixel": 2e-6,
         "plane.pixels_per_mode": window**2 / modes},
    )  # fmt: skip
    tile = geometry.tile(modes, modes, tech)
    assert tile.window_pixels.typical == window
    assert tile.gap_m.typical * 1e6 == pytest.approx(wavelengths, rel=0.08)


def test_tile_geometry_of_the_default() -> None:
    tile = geometry.tile(64, 64, TECH)
    assert (tile.planes.typical, tile.window_pixels.typical) == (8, 160)
    assert tile.pixels.typical / 64**2 == pytest.approx(50)
    assert tile.slices.typical == 31
    assert tile.depth_m.typical == pytest.approx(9 * tile.gap_m.typical)
    assert geometry.thickness_parameter(TECH) > 0.5


def test_writers() -> None:
    tiles = {(64, 64): 1000}
    pixels = 1000 * 8 * 160**2
    silica, femto, polymer = (
        size.writing_time(tiles, TECH, w).typical for w in ("silica", "femtosecond", "twophoton")
    )  # fmt: skip
    assert silica == pytest.approx(pixels * 31 * 4 / 65.9e6)
    assert femto == pytest.approx(pixels * 31 / 1e6)
    assert polymer == pytest.approx(femto / 100)
    report = TARGET.cost([layer(640, 6400)], [], TECH, DECODE)
    assert report["time__write"].typical == pytest.approx(femto)
    writing = report.metrics["cost__unit"].terms[0]
    assert writing.value.typical == pytest.approx(femto / 3600 * 50)


def test_rates_latency_and_power_belong_together() -> None:
    report = TARGET.cost([layer(512, 512)] * 3, [NORM], TECH, DECODE)
    assert report["throughput__aggregate"].typical == pytest.approx(1e9 / (1024 / 64 + 16))
    flight = next(
        t for t in report.metrics["latency__token"].terms if t.name == "flight.glass"
    )  # fmt: skip
    depth = geometry.tile(64, 64, TECH).depth_m.typical
    assert flight.value.typical == pytest.approx(3 * depth * 1.444 / 299792458)
    assert report["power__total"].typical == pytest.approx(
        report["energy__token"].typical * report["throughput__aggregate"].typical
    )
    assert report["users__pipeline"].typical == pytest.approx(
        report["latency__token"].typical * report["throughput__aggregate"].typical
    )
    one = TARGET.cost([layer(512, 512)] * 3, [NORM], TECH, Workload("decode", 256, users=1))
    assert one["energy__token"].typical > report["energy__token"].typical
    assert one["throughput__aggregate"].typical == pytest.approx(1 / one["latency__token"].typical)
    encode = TARGET.cost([layer(512, 512)] * 3, [NORM], TECH, Workload("encode", 10))
    assert encode["energy__inference"].typical == pytest.approx(
        10 * encode["energy__token"].typical
    )


def test_notes_state_what_is_not_claimed() -> None:
    summary = replace(
        layer(64, 64),
        diagnostics={"power_fraction_min": 0.05, "power_fraction_median": 0.09, "snr_read_db": 30},
    )
    notes = " ".join(TARGET.cost([summary], [], TECH, DECODE).notes)
    for sentence in ("L0: matrix and noise law; no phase planes designed yet", "isomorphic",
                     "Attention, softmax, norms, nonlinearities and KV memory are electronic",
                     "thin-mask", "least 0.05", "30.0 dB", "20% each"):  # fmt: skip
        assert sentence in notes, sentence


@pytest.mark.parametrize("name", ["optical", "optical_800nm"])
def test_shelf_files_are_complete(name: str) -> None:
    tech = shelf.load(name)
    TARGET.check(tech)
    limits = TARGET.limits(tech)
    assert (limits.tile_inputs, limits.input_bits, limits.static_inputs) == (64, 8, True)


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("matrix.margin", 1.2, "amplify"), ("laser.wall_plug", 1.5, "amplify"),
        ("plane.transmission", 0.0, "amplify"), ("adc.bits", 0.0, "at least 1|positive"),
        ("dac.bits", 1.0, "2 to 24"), ("matrix.max_weight_bits", 9.0, "byte"),
        ("receiver.noise", -1.0, "negative"), ("plane.index_contrast", 1e-4, "raise"),
        ("adc.rate", 0.0, "positive"),
    ],
)  # fmt: skip
def test_impossible_constants_are_refused(key: str, value: float, word: str) -> None:
    with pytest.raises(InfeasibleError) as refused:
        TARGET.check(changed_constants(TECH, {key: value}))
    assert pytest.approx(0) != len(refused.value.mend)
    assert any(w in refused.value.mend for w in word.split("|"))


@pytest.mark.parametrize(("key", "value"), [("photons", 0.0), ("efficiency", 1.3)])
def test_impossible_detection_is_refused(key: str, value: float) -> None:
    law = TECH.noise[0]
    quantity = replace(law.parameters[key], values=(value,), low=value, high=value)
    bent = replace(law, parameters={**law.parameters, key: quantity})
    with pytest.raises(InfeasibleError, match=key):
        TARGET.check(replace(TECH, noise=(bent,)))


def test_incomplete_or_misspelt_files_are_refused() -> None:
    without = {k: q for k, q in TECH.constants.items() if k != "adc.energy"}
    with pytest.raises(UsageError, match=r"adc\.energy is missing"):
        TARGET.check(replace(TECH, constants=without))
    extra = read_quantity("adc.enrgy", {"value": 1, "unit": "pJ", "source": "x", "grade": "design"})
    with pytest.raises(UsageError, match=r"adc\.enrgy is unknown"):
        TARGET.check(replace(TECH, constants={**TECH.constants, "adc.enrgy": extra}))
    with pytest.raises(UsageError, match="writer"):
        TARGET.check(replace(TECH, settings={"writer.choice": "femtosekond"}))
    with pytest.raises(UsageError, match="homodyne_shot"):
        TARGET.check(replace(TECH, noise=()))
    with pytest.raises(UsageError, match="no fixed linear"):
        TARGET.cost([], [], TECH, DECODE)
