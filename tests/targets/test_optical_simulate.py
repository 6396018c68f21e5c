"""Optical physics and simulation against Poisson counting, closed forms and the notes' figures."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pfmc import technology as shelf
from pfmc.hardware import FixedLinear, LayerStatistics, QuantisedMatrix
from pfmc.targets.base import Die, StoredLinear, Target
from pfmc.targets.optical import OpticalTarget, lower, physics
from pfmc.targets.optical.validation import changed_constants

TECH = shelf.load("optical")
TARGET: Target = OpticalTarget()
LOSSLESS = {
    "plane.transmission": 1.0, "coupling.output": 1.0, "write.phase_error": 0.0,
    "plane.phase_bits": 24.0, "oscillator.ratio": 1e12,
}  # fmt: skip
PRECISE = {"adc.bits": 20.0, "adc.range_sigmas": 12.0}


def light(tech: shelf.Technology, photons: float, efficiency: float = 1.0) -> shelf.Technology:
    law = tech.noise[0]
    wanted = {"photons": photons, "efficiency": efficiency}
    changed = {
        k: replace(q, values=(wanted[k],), low=wanted[k], high=wanted[k])
        for k, q in law.parameters.items()
    }
    return replace(tech, noise=(replace(law, parameters=changed),))


def tiles(tech: shelf.Technology, height: int, width: int) -> shelf.Technology:
    sizes = {"array.tile_inputs": float(height), "array.tile_outputs": float(width)}
    return changed_constants(tech, sizes)


def linear(
    inputs: int, outputs: int, seed: int = 0, bits: int = 8, bias: bool = False
) -> FixedLinear:
    rng = np.random.default_rng(seed)
    codes = np.clip(np.round(rng.standard_normal((inputs, outputs)) * 30), -127, 127)
    matrix = QuantisedMatrix(
        codes.astype(np.int8), 8, np.full((1, outputs), 1e-3, np.float32), inputs
    )
    offset = rng.standard_normal(outputs).astype(np.float32) if bias else None
    return FixedLinear("layer", matrix, offset, bits, 2.0 / (2 ** (bits - 1) - 1))


def build(fixed: FixedLinear, tech: shelf.Technology, die: Die) -> torch.nn.Module:
    tiled = TARGET.lower_linear(fixed, tech)
    stored = StoredLinear(
        fixed.name, fixed.inputs, fixed.outputs, tiled.tiles, tiled.tensors, fixed.bias,
        fixed.input_bits, fixed.input_scale,
    )  # fmt: skip
    return TARGET.layer(stored, tech, die)


def field(rows: int, inputs: int, seed: int = 0) -> torch.Tensor:
    numbers = np.random.default_rng(seed).uniform(-2, 2, (rows, inputs))
    return torch.from_numpy(numbers.astype(np.float32))


# -- laws ----------------------------------------------------------------------------------------


def homodyne(
    amplitude: np.ndarray, oscillator: float, rng: np.random.Generator, thermal: float = 0.0
) -> np.ndarray:
    """Counts photons at both ports of a balanced receiver and returns the amplitude it infers."""
    root = math.sqrt(oscillator)
    plus = rng.poisson((root + amplitude) ** 2 / 2.0)
    minus = rng.poisson((root - amplitude) ** 2 / 2.0)
    return (plus - minus + thermal * rng.standard_normal(amplitude.shape)) / (2.0 * root)


def test_100_photons_per_output_of_256_modes_give_20_decibel() -> None:
    """Notes 2c: N = M = 256, 100 photons per output -> 20.2 dB, here by counting photons."""
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((1, 256, 256))
    transfer = lower.passive(weights, lower.largest_singular_values(weights), 1.0)[0].astype(float)
    x = rng.standard_normal((400, 256))
    x *= np.sqrt(256 * 100.0) / np.linalg.norm(x, axis=1, keepdims=True)
    clean = x @ transfer
    read = homodyne(clean, 1e6, rng)
    counted = 10 * math.log10((clean**2).mean() / ((read - clean) ** 2).mean())
    fraction = float((transfer**2).sum()) / 256
    law = physics.decibel(physics.homodyne_snr(256 * 100.0, fraction, 256))
    assert counted == pytest.approx(law, abs=0.15)
    assert counted == pytest.approx(20.2, abs=0.3)


def test_output_sigma_counts_loss_efficiency_and_receiver_noise() -> None:
    tech = light(TECH, 5e4, 0.7)
    survive = physics.transmission(tech, 8).typical * 0.7
    oscillator = physics.oscillator_photons(tech).typical * 0.7
    rng = np.random.default_rng(2)
    amplitude = np.full(200_000, 0.05 * math.sqrt(5e4 * survive))
    read = homodyne(amplitude, oscillator, rng, TECH.number("receiver.noise"))
    sigma = (read / math.sqrt(5e4 * survive)).std()
    assert physics.output_sigma(tech, 8) == pytest.approx(sigma, rel=0.01)


@pytest.mark.parametrize(
    ("variance", "nmse"),
    [
        (0.1**2, 1.0e-3), (0.3**2, 1.16e-2),
        *(((2 * math.pi / 2**b) ** 2 / 12, e) for b, e in
          ((2, 0.22), (3, 9.6e-3), (4, 1.4e-3), (6, 1.7e-4))),
    ],
)  # fmt: skip
def test_scatter_law_fits_the_wave_optics_prototype(variance: float, nmse: float) -> None:
    """Notes 3: 16 modes, 16 planes; the undisturbed design has 9e-5."""
    law = physics.scatter_nmse(variance, 16, TECH.number("write.scatter_fraction"))
    assert 1 / 1.75 < law / (nmse - 9e-5) < 1.75


def test_light_lost_by_scattering() -> None:
    """Notes 3: 0.1 rad over 16 planes leaves .5606 / .6566 of the power."""
    tech = changed_constants(TECH, LOSSLESS | {"write.phase_error": 0.1})
    assert physics.transmission(tech, 16).typical == pytest.approx(0.5606 / 0.6566, rel=5e-3)


def test_incoherent_fanout_law_against_counting_and_the_notes() -> None:
    """Notes 2c: incoherent rails need 31 dB more photons than homodyne at N = 256."""
    rng = np.random.default_rng(3)
    weights = rng.standard_normal((256, 256))
    power = rng.uniform(0, 1, (300, 256))
    power /= power.sum(axis=1, keepdims=True)
    photons = 1e9
    rail = photons / (2 * 256 * np.abs(weights).max())
    plus, minus = (rail * (power @ np.maximum(s * weights, 0)) for s in (1, -1))
    error = rng.poisson(plus) - rng.poisson(minus) - (plus - minus)
    counted = ((plus - minus) ** 2).mean() / (error**2).mean()
    assert physics.fanout_snr(photons, weights, power) == pytest.approx(counted, rel=0.05)
    sigma = np.linalg.norm(weights, 2)
    coherent = physics.homodyne_snr(photons, float((weights**2).sum()) / 256 / sigma**2, 256)
    assert physics.decibel(coherent / counted) == pytest.approx(31.0, abs=1.0)


# -- the torch module ----------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 50), st.integers(1, 40), st.integers(2, 20), st.integers(2, 20), st.booleans()
)
def test_much_light_and_many_bits_give_the_exact_product(
    inputs: int, outputs: int, height: int, width: int, bias: bool
) -> None:
    tech = light(tiles(changed_constants(TECH, PRECISE), height, width), 1e20)
    fixed = linear(inputs, outputs, bits=20, bias=bias)
    x = field(7, inputs)
    y = build(fixed, tech, Die(seed=None))(x)
    wanted = x.numpy() @ fixed.matrix.weights() + (0 if fixed.bias is None else fixed.bias)
    largest = float(np.abs(fixed.matrix.weights()).sum(axis=0).max()) * 2.0
    assert y.numpy() == pytest.approx(wanted, abs=2e-5 * largest + 1e-6)


def test_leading_dimensions_and_dynamic_scale() -> None:
    fixed = replace(linear(40, 30), input_scale=None)
    x = field(6, 40) * torch.tensor([1e-3, 1, 10, 0, 1, 1])[:, None]
    tech = light(changed_constants(TECH, PRECISE), 1e20)
    y = build(replace(fixed, input_bits=16), tech, Die(None))(x.reshape(2, 3, 40))
    assert y.shape == (2, 3, 30)
    wanted = x.numpy() @ fixed.matrix.weights()
    peak = np.abs(x.numpy()).max(axis=1, keepdims=True)
    assert (np.abs(y.reshape(6, 30).numpy() - wanted) <= 2e-3 * peak + 1e-9).all()


def test_read_noise_moments() -> None:
    fixed = linear(130, 70)
    tech = light(changed_constants(TECH, PRECISE), 1e3)
    tiled = TARGET.lower_linear(fixed, tech)
    noisy, quiet = build(fixed, tech, Die(None)), build(fixed, tech, Die(None, read_noise=False))
    x = field(1, 130).repeat(4000, 1)
    error = (noisy(x) - quiet(x[:1])).numpy()
    per_tile = tiled.tiles["noise_sigma"] * tiled.tiles["sigma_max"] * tiled.tiles["scale"] * 2.0
    expected = np.sqrt((per_tile**2).reshape(3, 2).sum(axis=0))
    assert np.abs(error.mean(axis=0)).max() < 5 * expected.max() / math.sqrt(4000)
    assert error[:, :64].std() == pytest.approx(expected[0], rel=0.02)
    assert error[:, 64:].std() == pytest.approx(expected[1], rel=0.02)


def test_stated_read_snr_is_the_simulated_one() -> None:
    fixed = linear(130, 70)
    tech = light(changed_constants(TECH, PRECISE), 1e4)
    power = np.random.default_rng(1).uniform(0.01, 1.0, 130)
    peak = np.ones(70, np.float32)
    rms = np.sqrt(power @ fixed.matrix.weights().astype(np.float64) ** 2).astype(np.float32)
    fixed = replace(fixed, statistics=LayerStatistics(2.0, {}, power, peak, rms, 4000))
    signs = np.sign(np.random.default_rng(2).standard_normal((4000, 130)))
    x = torch.from_numpy((signs * np.sqrt(power)).astype(np.float32))
    quiet = build(fixed, tech, Die(None, read_noise=False))(x)
    error = build(fixed, tech, Die(None))(x) - quiet
    found = physics.decibel(float((quiet**2).mean() / (error**2).mean()))
    stated = TARGET.lower_linear(fixed, tech).diagnostics["snr_read_db"]
    assert stated == pytest.approx(found, abs=0.1)


def test_read_noise_falls_with_the_root_of_the_photons() -> None:
    fixed, x = linear(64, 64), field(2000, 64)
    errors = []
    for photons in (1e4, 1e6):
        tech = light(changed_constants(TECH, PRECISE), photons)
        quiet = build(fixed, tech, Die(None, read_noise=False))(x)
        errors.append(float((build(fixed, tech, Die(None))(x) - quiet).std()))
    assert errors[0] / errors[1] == pytest.approx(10.0, rel=0.02)


def test_write_noise_follows_the_law_and_names_the_die() -> None:
    fixed, x = linear(256, 256), field(64, 256)
    tech = light(changed_constants(TECH, PRECISE), 1e20)
    ideal, first, again, other = (
        build(fixed, tech, Die(seed, read_noise=False))(x).numpy() for seed in (None, 3, 3, 4)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    nmse = ((first - ideal) ** 2).mean() / (ideal**2).mean()
    assert nmse == pytest.approx(float(physics.write_nmse(tech, 8)), rel=0.05)


def test_read_noise_of_a_die_repeats_from_the_start() -> None:
    fixed, x = linear(64, 64), field(3, 64)
    module = build(fixed, TECH, Die(5))
    first, second = module(x), module(x)
    assert not torch.equal(first, second)
    assert torch.equal(first, build(fixed, TECH, Die(5))(x))


def test_converter_rounding_has_the_variance_of_its_step() -> None:
    fixed, x = linear(64, 64), field(3000, 64)
    coarse = changed_constants(light(TECH, 1e20), {"adc.bits": 6.0, "adc.range_sigmas": 8.0})
    exact = build(fixed, changed_constants(coarse, {"adc.bits": 22.0}), Die(None))(x)
    error = (build(fixed, coarse, Die(None))(x) - exact).numpy()
    tiled = TARGET.lower_linear(fixed, coarse)
    gain = float(tiled.tiles["sigma_max"][0] * tiled.tiles["scale"][0]) * 2.0
    step = tiled.tensors["adc_range"][0] / 31.0 * gain
    assert error.std(axis=0) == pytest.approx(step / math.sqrt(12.0), rel=0.06)


def test_inputs_beyond_full_drive_are_clipped() -> None:
    fixed = linear(64, 8)
    module = build(fixed, TECH, Die(None, read_noise=False))
    x = field(4, 64)
    assert torch.equal(module(x.sign() * 2.0), module(x.sign() * 9.0))


def test_gradient_passes_the_rounding() -> None:
    fixed = linear(64, 16)
    tech = light(changed_constants(TECH, PRECISE), 1e20)
    x = (field(5, 64) * 0.9).requires_grad_()
    build(fixed, tech, Die(None))(x).sum().backward()
    assert x.grad is not None
    wanted = fixed.matrix.weights().sum(axis=1)
    assert x.grad.numpy() == pytest.approx(np.tile(wanted, (5, 1)), rel=1e-4, abs=1e-5)


def test_chunks_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    from pfmc.targets.optical import simulate

    fixed, x = linear(130, 70), field(9, 130)
    module = build(fixed, TECH, Die(1, read_noise=False))
    whole = module(x)
    monkeypatch.setattr(simulate, "_CHUNK", 3 * 3 * 2 * 64)
    assert torch.allclose(module(x), whole, rtol=1e-6, atol=1e-6)
