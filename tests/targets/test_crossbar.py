"""Crossbar lowering and simulation against slow references, closed forms and aihwkit-lightning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pfmc import noise, technology
from pfmc.errors import InfeasibleError
from pfmc.hardware import FixedLinear, LayerStatistics, QuantisedMatrix, TiledLinear
from pfmc.quantity import Quantity, unit
from pfmc.targets.base import Die, StoredLinear
from pfmc.targets.crossbar import CrossbarTarget, conductance, ranges, tiling
from pfmc.targets.crossbar.technology import design
from pfmc.technology import Technology

TARGET = CrossbarTarget()
IDEAL = Die(seed=None, read_noise=False)


def number(value: float, text: str = "1") -> Quantity:
    return Quantity("test", (value,), value, value, unit(text), "test", "design")


def tech(name: str = "crossbar", **changes: float) -> Technology:
    """A technology with constants changed: ``tile_rows=4`` is ``array.tile_rows``."""
    loaded = technology.load(name)
    keys = {
        "tile_rows": "array.tile_rows", "tile_columns": "array.tile_columns",
        "output_bits": "adc.bits", "input_bits": "dac.bits",
    }  # fmt: skip
    changed = {keys[k]: number(v, "bit" if "bits" in k else "1") for k, v in changes.items()}
    return replace(loaded, constants={**loaded.constants, **changed})


def linear(
    inputs: int, outputs: int, seed: int = 0, bits: int = 8, group: int = 0, scale: float = 0.02,
    statistics: bool = True, input_bits: int = 8,
) -> FixedLinear:  # fmt: skip
    rng = np.random.default_rng(seed)
    top = 2 ** (bits - 1) - 1
    codes = rng.integers(-top, top + 1, (inputs, outputs)).astype(np.int8)
    group = group or inputs
    steps = rng.uniform(0.5, 2, (-(-inputs // group), outputs)).astype(np.float32) / top
    matrix = QuantisedMatrix(codes, bits, steps, group)
    rms = np.sqrt(np.square(matrix.weights()).sum(axis=0)) * 0.5
    known = LayerStatistics(
        2.0, {}, np.full(inputs, 0.25), (4 * rms).astype(np.float32), rms.astype(np.float32), 100
    )
    bias = rng.standard_normal(outputs).astype(np.float32)
    stats = known if statistics else None
    return FixedLinear("net.layer", matrix, bias, input_bits, scale, stats)


def stored(layer: FixedLinear, tiled: TiledLinear) -> StoredLinear:
    return StoredLinear(
        tiled.name, tiled.inputs, tiled.outputs, tiled.tiles, tiled.tensors, layer.bias,
        layer.input_bits, layer.input_scale,
    )  # fmt: skip


def build(
    layer: FixedLinear, t: Technology, die: Die = IDEAL
) -> tuple[StoredLinear, torch.nn.Module]:
    kept = stored(layer, TARGET.lower_linear(layer, t))
    return kept, TARGET.layer(kept, t, die)


def signal(layer: FixedLinear, batch: int, seed: int = 1) -> npt.NDArray[np.float32]:
    """Inputs of the statistics' power; a few lie beyond the input converter's range."""
    drawn = np.random.default_rng(seed).standard_normal((batch, layer.inputs)) * 0.5
    drawn[0, 0] = 1e3
    return drawn.astype(np.float32)


def close(found: npt.ArrayLike, wanted: npt.ArrayLike, share: float) -> bool:
    """Whether two arrays differ by at most `share` of the largest magnitude wanted."""
    a, b = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return a.shape == b.shape and bool(np.abs(a - b).max() <= share * np.abs(b).max())


def codes_of(x: npt.NDArray[np.float32], layer: FixedLinear) -> npt.NDArray[np.float64]:
    top = 2 ** (layer.input_bits - 1) - 1
    assert layer.input_scale is not None
    steps = (torch.from_numpy(x) / layer.input_scale).numpy()  # float32, as the converter sees it
    return np.round(np.clip(steps, -top, top)).astype(np.float64)


def reference(
    kept: StoredLinear, layer: FixedLinear, t: Technology, x: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    """One tile after the other, one converter after the other, in float64."""
    d = design(t)
    codes, steps = codes_of(x, layer), 2 ** (d.output_bits - 1) - 1
    out = np.tile(np.zeros(layer.outputs), (len(x), 1))
    plus, minus, scale = (
        np.asarray(kept.tensors[k], np.float64)
        for k in (conductance.PLUS, conductance.MINUS, conductance.SCALE)
    )
    row_of_tile = {r: k for k, r in enumerate(sorted(set(kept.tiles["row0"].tolist())))}
    names = ("row0", "col0", "rows", "cols", "adc_range")
    for r0, c0, rows, cols, full in zip(*(kept.tiles[n].tolist() for n in names), strict=True):
        r, c = slice(r0, r0 + rows), slice(c0, c0 + cols)
        pairs = (plus[r, c] - minus[r, c]) / (d.g_max_s - d.g_min_s)
        step = full / steps
        samples = np.clip(np.round(codes[:, r] @ pairs / step), -steps, steps)
        assert layer.input_scale is not None
        out[:, c] += samples * step * layer.input_scale * scale[row_of_tile[r0], c]
    return out + (0 if layer.bias is None else layer.bias)


# ------------------------------------------------------------------------------------- lowering


@given(st.integers(1, 5000), st.integers(1, 600))
def test_split_is_even_and_uses_the_fewest_parts(length: int, limit: int) -> None:
    edges = tiling.split(length, limit)
    sizes = np.diff(edges)
    assert edges[0] == 0
    assert edges[-1] == length
    assert len(sizes) == -(-length // limit)
    assert sizes.max() <= limit
    assert sizes.max() - sizes.min() <= 1


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 70), st.integers(1, 50), st.integers(1, 32), st.integers(1, 32),
    st.integers(2, 8), st.integers(0, 20), st.sampled_from(["crossbar", "crossbar_reram"]),
)  # fmt: skip
def test_conductances_give_the_weights_back(
    inputs: int, outputs: int, rows: int, columns: int, bits: int, group: int, name: str
) -> None:
    layer = linear(inputs, outputs, seed=inputs, bits=bits, group=group)
    t = tech(name, tile_rows=rows, tile_columns=columns)
    tiled = TARGET.lower_linear(layer, t)
    edges = tiling.split(inputs, rows)
    back = conductance.weights(tiled.tensors, edges, design(t))
    assert close(back, layer.matrix.weights(), 2e-6)
    d = design(t)
    low = np.minimum(tiled.tensors[conductance.PLUS], tiled.tensors[conductance.MINUS])
    assert np.abs(low - d.g_min_s).max() <= 1e-6 * d.g_max_s


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 90), st.integers(1, 60), st.integers(1, 40), st.integers(1, 40))
def test_what_is_emitted_passes_its_own_verification(
    tmp_path_factory: pytest.TempPathFactory, inputs: int, outputs: int, rows: int, columns: int
) -> None:
    layer, t = linear(inputs, outputs), tech(tile_rows=rows, tile_columns=columns)
    tiled = TARGET.lower_linear(layer, t)
    folder = tmp_path_factory.mktemp("hardware")
    write(folder, tiled)
    checks = TARGET.verify(stored(layer, tiled), folder, t)
    assert len(checks) == 5
    assert all(c.passed for c in checks), [c for c in checks if not c.passed]


def write(folder: Path, tiled: TiledLinear) -> None:
    for name, body in tiled.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)


def test_verification_finds_a_changed_conductance(tmp_path: Path) -> None:
    layer, t = linear(12, 9), tech()
    tiled = TARGET.lower_linear(layer, t)
    assert [c.name for c in TARGET.verify(stored(layer, tiled), tmp_path, t) if not c.passed] == [
        "conductances that differ in CSV"
    ]
    write(tmp_path, tiled)
    tensors = {**tiled.tensors, conductance.PLUS: tiled.tensors[conductance.PLUS].copy()}
    tensors[conductance.PLUS][3, 4] = 1.1 * design(t).g_max_s
    failed = TARGET.verify(replace(stored(layer, tiled), tensors=tensors), tmp_path, t)
    assert {c.name for c in failed if not c.passed} >= {
        "conductances outside g_min..g_max", "conductances that differ in CSV",
    }  # fmt: skip


def test_lowering_is_deterministic_and_counts_what_it_lays_out() -> None:
    layer, t = linear(300, 70), tech(tile_rows=128, tile_columns=64)
    one, two = TARGET.lower_linear(layer, t), TARGET.lower_linear(layer, t)
    for key, column in one.tiles.items():
        assert np.array_equal(column, two.tiles[key]), key
    for key, tensor in one.tensors.items():
        assert np.array_equal(tensor, two.tensors[key]), key
    assert one.counts["tiles"] == 3 * 2 == len(one.tiles["row0"])
    assert one.counts["adc_samples"] == 3 * 70
    assert one.counts["dac_samples"] == 2 * 300
    assert one.diagnostics["utilisation"] == pytest.approx(300 * 70 / (6 * 128 * 64))
    assert one.tiles["adc_range_ampere"] == pytest.approx(
        one.tiles["adc_range"] * 0.2 * 20.7e-6 / 127, rel=1e-5
    )


def test_mean_conductances_and_read_siemens_are_those_of_the_tensors() -> None:
    layer, t = linear(60, 40), tech("crossbar_reram", tile_rows=32, tile_columns=32)
    tiled = TARGET.lower_linear(layer, t)
    both = np.asarray(tiled.tensors[conductance.PLUS], np.float64)
    both = both + tiled.tensors[conductance.MINUS]
    r, c = slice(30, 60), slice(20, 40)
    assert tiled.tiles["mean_conductance_siemens"][3] == pytest.approx(
        both[r, c].mean() / 2, rel=1e-5
    )
    mean_input = np.sqrt(2 / np.pi) * 0.5 / 0.02 / 127
    assert tiled.counts["read_siemens"] == pytest.approx(both.sum() * mean_input, rel=1e-5)


def test_without_calibration_the_range_is_the_worst_case() -> None:
    layer, t = linear(40, 6, statistics=False), tech(tile_rows=20, tile_columns=6)
    tiled = TARGET.lower_linear(layer, t)
    weights = np.abs(layer.matrix.weights())[:20]
    worst = (weights.sum(axis=0) / weights.max(axis=0)).max() * 127
    assert tiled.tiles["adc_range"][0] == pytest.approx(worst, rel=1e-5)
    assert tiled.diagnostics["clip_fraction"] == 0


@pytest.mark.parametrize("deviation", [1.0, 30.0])
def test_the_best_range_is_that_of_a_gaussian(deviation: float) -> None:
    """At 8 bits the least mean square error of a clipped uniform quantiser of a Gaussian is near
    3.92 deviations and -40.6 dB (e.g. Hui and Neuhoff, 2001)."""
    found = ranges.best(np.full(4, deviation), np.ones(4), 127, 1.0, 1e9)
    assert found.value / deviation == pytest.approx(3.92, rel=0.12)
    assert 10 * np.log10(found.error) == pytest.approx(-40.6, abs=0.5)
    z = np.random.default_rng(0).standard_normal(400_000)
    step = found.value / deviation / 127
    samples = np.clip(np.round(z / step), -127, 127) * step
    assert found.error == pytest.approx(np.mean((samples - z) ** 2), rel=0.03)
    clipped = np.mean(np.abs(z) > found.value / deviation)
    assert found.clip_fraction == pytest.approx(clipped, abs=3e-5)


def test_inputs_without_a_static_range_or_too_wide_are_refused() -> None:
    layer, t = linear(8, 8), tech()
    with pytest.raises(InfeasibleError, match="calibrate"):
        TARGET.lower_linear(replace(layer, input_scale=None), t)
    with pytest.raises(InfeasibleError, match="do not fit the DAC"):
        TARGET.lower_linear(replace(layer, input_bits=10), t)


# ----------------------------------------------------------------------------------- simulation


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 70), st.integers(1, 40), st.integers(1, 33), st.integers(1, 33))
def test_the_ideal_die_with_fine_converters_is_the_exact_product(
    inputs: int, outputs: int, rows: int, columns: int
) -> None:
    layer = linear(inputs, outputs, seed=outputs, statistics=False)
    _, module = build(layer, tech(tile_rows=rows, tile_columns=columns, output_bits=24))
    x = signal(layer, 5)
    exact = codes_of(x, layer) * 0.02 @ layer.matrix.weights().astype(np.float64) + layer.bias
    got = module(torch.from_numpy(x)).numpy()
    assert close(got, exact, 3e-5)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 70), st.integers(1, 40), st.integers(1, 33), st.integers(1, 33),
    st.integers(3, 10), st.booleans(),
)  # fmt: skip
def test_converters_are_those_of_the_slow_loop(
    inputs: int, outputs: int, rows: int, columns: int, output_bits: int, statistics: bool
) -> None:
    layer = linear(inputs, outputs, seed=rows, statistics=statistics)
    t = tech(tile_rows=rows, tile_columns=columns, output_bits=output_bits)
    kept, module = build(layer, t)
    x = signal(layer, 20)
    got, want = module(torch.from_numpy(x)).numpy(), reference(kept, layer, t, x)
    near = np.isclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    # a current that lies on the border of two codes may round either way in float32
    assert (~near).mean() <= 2e-3 + 1.01 / near.size


def test_shapes_of_any_rank() -> None:
    layer = linear(30, 7)
    _, module = build(layer, tech(tile_rows=16))
    x = torch.randn(2, 3, 30)
    assert module(x).shape == (2, 3, 7)
    assert torch.equal(module(x)[1, 2], module(x[1, 2]))


def readout(module: torch.nn.Module, layer: FixedLinear) -> npt.NDArray[np.float64]:
    """The weights a layer acts with, from unit inputs (one code each)."""
    unit_inputs = torch.eye(layer.inputs) * float(layer.input_scale or 1)
    assert layer.bias is not None
    return (module(unit_inputs).numpy().astype(np.float64) - layer.bias) / (layer.input_scale or 1)


def levels(inputs: int, outputs: int) -> FixedLinear:
    """Each row holds one of eleven magnitudes; row 0 sets the scale."""
    codes = np.round(np.linspace(0, 100, 11)).astype(np.int8)[(10 - np.arange(inputs)) % 11]
    matrix = QuantisedMatrix(
        np.repeat(codes[:, None], outputs, axis=1), 8, np.full((1, outputs), 0.01, np.float32),
        inputs,
    )  # fmt: skip
    return FixedLinear("levels", matrix, np.zeros(outputs, np.float32), 8, 0.02)


@pytest.mark.parametrize("name", ["crossbar", "crossbar_pcm", "crossbar_reram"])
def test_write_noise_of_the_simulated_tile_has_the_law_s_moments(name: str) -> None:
    layer, t = levels(22, 6000), tech(name, output_bits=24)
    _, module = build(layer, t, Die(seed=5, read_noise=False))
    found = readout(module, layer)
    d = design(t)
    span = 1 - d.floor
    law = d.noise
    for level in range(2, 11):  # the plus device is far from the clip at zero
        target = d.floor + span * level / 10
        rows = [r for r in range(22) if (10 - r) % 11 == level]
        low = np.full(400_000, d.floor, np.float32)
        rest = law.device(low, 1, "other", 0.0)[0].std() / span
        sigma = float(law.write_sigma(np.array([target]))[0]) / span
        assert found[rows].std() == pytest.approx(np.hypot(sigma, rest), rel=0.03)


def test_drift_and_its_compensation() -> None:
    layer, t = levels(22, 3000), tech("crossbar_pcm", output_bits=24)
    plain = replace(t, settings={**t.settings, "drift.compensation": "none"})
    die = Die(seed=2, age_s=86400.0, read_noise=False)
    top = [0, 11]
    drifted = readout(build(layer, plain, die)[1], layer)[top].mean()
    assert drifted == pytest.approx(0.663, abs=0.004)  # aihwkit's retention of w = 1
    mended = readout(build(layer, t, die)[1], layer)
    assert mended[top].mean() == pytest.approx(1.0, abs=0.03)
    assert np.abs(mended).mean() == pytest.approx(
        np.abs(readout(build(layer, t, Die(2, 0.0, False))[1], layer)).mean(), rel=1e-4
    )


def test_read_noise_is_the_sum_over_the_column() -> None:
    layer, t = linear(96, 5), tech("crossbar_pcm", tile_rows=48, output_bits=24)
    kept, module = build(layer, t, Die(seed=3, age_s=3600.0))
    x = signal(layer, 1)
    y = module(torch.from_numpy(np.repeat(x, 20_000, axis=0))).numpy()
    d = design(t)
    drawn = conductance.die_conductances(kept.tensors, kept.name, d, Die(3, 3600.0))
    sigma = d.noise.read_sigma(drawn.written, drawn.aged, 3600.0).astype(np.float64)
    variance = sigma[0] ** 2 + sigma[1] ** 2
    codes = codes_of(x, layer)[0] ** 2
    magnitude = np.abs(drawn.written[0] - drawn.written[1])
    aged = np.abs(drawn.aged[0] - drawn.aged[1])
    want = np.zeros(5)
    for k in range(2):
        r = slice(48 * k, 48 * k + 48)
        gain = magnitude[r].mean() / aged[r].mean()
        scale = kept.tensors[conductance.SCALE][k] * 0.02 * gain
        want += (codes[r] @ variance[r]) * scale.astype(np.float64) ** 2
    assert y.std(axis=0) == pytest.approx(np.sqrt(want), rel=0.02)


def test_a_die_is_its_seed() -> None:
    layer, t = linear(40, 20), tech(tile_rows=16)
    x = torch.from_numpy(signal(layer, 6))
    runs = [
        build(layer, t, Die(seed, 3600.0))[1](x) for seed in (0, 0, 1)
    ]  # fmt: skip
    assert torch.equal(runs[0], runs[1])
    assert not torch.allclose(runs[0], runs[2], rtol=1e-3)
    other = build(replace(layer, name="net.other"), t, Die(0, 3600.0))[1](x)
    assert not torch.allclose(runs[0], other, rtol=1e-3)
    module = build(layer, t, Die(0))[1]
    assert not torch.equal(module(x), module(x))


def test_simulation_and_emission_see_the_same_devices() -> None:
    layer, t = linear(24, 9), tech(output_bits=24)
    kept, module = build(layer, t, Die(7, read_noise=False))
    d = design(t)
    siemens = conductance.die_conductances(kept.tensors, kept.name, d, Die(7)).siemens(d)
    scale = kept.tensors[conductance.SCALE]
    weights = (siemens[0] - siemens[1]) / (d.g_max_s - d.g_min_s) * scale
    assert close(readout(module, layer), weights, 1e-4)


def test_gradients_flow_straight_through_and_stop_at_clips() -> None:
    layer, t = linear(40, 20), tech(tile_rows=16)
    _, module = build(layer, t)
    x = torch.from_numpy(signal(layer, 6)).requires_grad_()
    upstream = torch.randn(6, 20)
    module(x).backward(upstream)
    assert x.grad is not None
    assert x.grad[0, 0] == 0
    wide = tech(tile_rows=16, output_bits=24)
    _, fine = build(replace(layer, statistics=None), wide)
    z = torch.from_numpy(signal(layer, 6)).requires_grad_()
    fine(z).backward(upstream)
    weights = torch.from_numpy(layer.matrix.weights())
    inside = z.detach().abs() <= 0.02 * 127
    assert z.grad is not None
    torch.testing.assert_close(z.grad, (upstream @ weights.T) * inside, rtol=1e-4, atol=1e-5)


def test_additive_output_noise() -> None:
    t = tech(output_bits=16)
    extra = technology.NoiseLaw("read", "additive", {"relative": number(0.01)})
    t = replace(t, noise=(extra,))
    layer = linear(16, 4)
    kept, module = build(layer, t, Die(0))
    y = module(torch.zeros(20_000, 16)).numpy()
    scale = kept.tensors[conductance.SCALE][0] * kept.tiles["adc_range"][0] * 0.02
    assert y.std(axis=0) == pytest.approx(0.01 * scale, rel=0.03)
    assert noise.model([extra]).output_sigma() == 0.01


@pytest.mark.parametrize(("inputs", "size"), [(64, 64), (96, 32), (50, 20)])
@pytest.mark.parametrize("bits", [6, 8])
def test_equal_to_aihwkit_lightning_on_the_effects_both_have(
    inputs: int, size: int, bits: int
) -> None:
    """Static input quantisation, one output converter per slice and channel, summed slices."""
    configs = pytest.importorskip("aihwkit_lightning.simulator.configs")
    linear_class = pytest.importorskip("aihwkit_lightning.nn").AnalogLinear
    bound, outputs = 6.17, 24  # no current lies on the border of two codes
    layer, t = linear(inputs, outputs), tech(tile_rows=size, output_bits=bits)
    kept = stored(layer, TARGET.lower_linear(layer, t))
    # their range: out_bound * input range * max |w| of the slice's channel
    tiles = {**kept.tiles, "adc_range": np.full(len(kept.tiles["row0"]), bound * 127, np.float32)}
    module = TARGET.layer(replace(kept, tiles=tiles), t, IDEAL)
    config = configs.TorchInferenceRPUConfig()
    config.forward.inp_res, config.forward.out_res = 254, 2**bits - 2
    config.forward.out_bound = bound
    config.mapping.max_input_size = size
    config.clip.type = configs.WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL
    config.clip.sigma = 2.5
    config.pre_post.input_range.enable = True
    theirs = linear_class(inputs, outputs, bias=True, rpu_config=config).eval()
    with torch.no_grad():
        theirs.weight.copy_(torch.from_numpy(layer.matrix.weights().T.copy()))
        theirs.bias.copy_(torch.from_numpy(layer.bias))
        theirs.input_range.fill_(127 * 0.02)
        x = torch.from_numpy(signal(layer, 200))
        want, got = theirs(x.clone()), module(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
