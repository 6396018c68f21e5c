"""The twins that models are trained with, against the targets' own simulated layers and dies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pfmc import technology
from pfmc.hardware import FixedLinear, LayerStatistics, QuantisedMatrix, TiledLinear
from pfmc.quantity import Quantity, unit
from pfmc.targets import get
from pfmc.targets.base import Die, StoredLinear
from pfmc.targets.crossbar import conductance, tiling
from pfmc.targets.crossbar import technology as crossbar
from pfmc.targets.crossbar.conductance import MINUS, PLUS, SCALE
from pfmc.targets.crossbar.moments import POINTS, moments
from pfmc.targets.crossbar.train import Cut
from pfmc.targets.grids import on_grid, on_own_grid, peak_step
from pfmc.technology import Technology

IDEAL = Die(None, 0.0, False)
DAY = 86400.0
SMALL = {
    "crossbar": {"array.tile_rows": 48, "array.tile_columns": 24},
    "optical": {"array.tile_inputs": 48, "array.tile_outputs": 24},
    "rom": {},
}


def tech(name: str) -> Technology:
    """A technology with small tiles."""
    loaded = technology.load(name)
    small = {
        k: Quantity("test", (v,), v, v, unit(loaded.quantity(k).unit.text), "test", "design")
        for k, v in SMALL[loaded.kind].items()
    }
    return replace(loaded, constants={**loaded.constants, **small})


def linear(inputs: int = 100, outputs: int = 40, bits: int = 8) -> FixedLinear:
    rng = np.random.default_rng(inputs + outputs)
    top = 2 ** (bits - 1) - 1
    codes = rng.integers(-top, top + 1, (inputs, outputs)).astype(np.int8)
    steps = rng.uniform(0.5, 2, (1, outputs)).astype(np.float32) / top
    matrix = QuantisedMatrix(codes, bits, steps, inputs)
    rms = np.sqrt(np.square(matrix.weights()).sum(axis=0)) * 0.5
    seen = LayerStatistics(2.0, {}, np.full(inputs, 0.25), 4 * rms, rms.astype(np.float32), 100)
    return FixedLinear("net.layer", matrix, None, 8, 0.02, seen)


def stored(layer: FixedLinear, tiled: TiledLinear) -> StoredLinear:
    extra = {"codes": layer.matrix.codes, "scale": layer.matrix.scale}
    return StoredLinear(
        layer.name, layer.inputs, layer.outputs, tiled.tiles, {**tiled.tensors, **extra}, None,
        layer.input_bits, layer.input_scale,
    )  # fmt: skip


def signal(layer: FixedLinear, batch: int = 64) -> Tensor:
    drawn = np.random.default_rng(1).standard_normal((batch, layer.inputs)) * 0.5
    return torch.from_numpy(drawn.astype(np.float32))


class Pair:
    """A layer's simulation and its twin on the same rounded operands."""

    def __init__(self, name: str, layer: FixedLinear) -> None:
        self.tech = tech(name)
        self.target = get(self.tech.kind)
        self.layer = layer
        self.kept = stored(layer, self.target.lower_linear(layer, self.tech))
        self.twin: Any = self.target.twin(layer, self.tech)
        self.twin.eval()
        self.weight = torch.from_numpy(layer.matrix.weights().T.copy())

    def simulated(self, x: Tensor, die: Die) -> Tensor:
        with torch.no_grad():
            made: Tensor = self.target.layer(self.kept, self.tech, die)(x)
        return made

    def trained(self, x: Tensor, die: Die, converters: bool = True) -> Tensor:
        step = torch.tensor(self.layer.input_scale)
        self.twin.face(die, converters)
        with torch.no_grad():
            made: Tensor = self.twin(on_grid(x, step, 127.0), self.weight, step * 127)
        return made

    def faced(self, x: Tensor, die: Die, readings: int | None = None) -> Tensor:
        """The twin as the very die that is simulated."""
        step = torch.tensor(self.layer.input_scale)
        self.twin.face(die, True, (die.seed or 0) if readings is None else readings)
        with torch.no_grad():
            made: Tensor = self.twin(on_grid(x, step, 127.0), self.weight, step * 127)
        return made


@pytest.mark.parametrize("name", ["rom", "crossbar", "crossbar_reram", "optical"])
@pytest.mark.parametrize(("inputs", "outputs"), [(40, 24), (100, 40), (97, 31)])
def test_an_ideal_twin_is_the_ideal_layer(name: str, inputs: int, outputs: int) -> None:
    pair = Pair(name, linear(inputs, outputs))
    x = signal(pair.layer)
    truth, ours = pair.simulated(x, IDEAL), pair.trained(x, IDEAL)
    off = (truth - ours).abs() / truth.std()
    # a sample at the very edge between two codes may fall to either side
    assert float((off > 1e-4).float().mean()) < 1e-3
    assert float(off.median()) < 1e-6
    plain = pair.trained(x, IDEAL, converters=False)
    exact = on_grid(x, torch.tensor(0.02), 127.0).double() @ pair.weight.T.double()
    np.testing.assert_allclose(plain, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["crossbar", "crossbar_pcm", "crossbar_reram", "optical"])
@pytest.mark.parametrize(("age", "read"), [(0.0, False), (0.0, True), (DAY, True)])
@pytest.mark.parametrize(("converters", "training"), [(True, False), (True, True), (False, True)])
def test_the_noise_of_a_twin_has_the_moments_of_a_die(
    name: str, age: float, read: bool, converters: bool, training: bool
) -> None:
    if name == "optical" and read and not converters:
        pytest.skip("light's read noise stands at the receivers, which are left out")
    pair = Pair(name, linear())
    pair.twin.train(training)
    x, dies = signal(pair.layer), range(30)
    truth = torch.stack([pair.simulated(x, Die(s, age, read)) for s in dies])
    ours = torch.stack([pair.trained(x, Die(s, age, read), converters) for s in dies])
    clean = pair.simulated(x, IDEAL)
    spread = [float(v.var(0).mean().sqrt()) for v in (truth, ours)]
    rounding = 0.05 if converters else 0.1  # which differs from die to die, too
    assert spread[1] == pytest.approx(spread[0], rel=rounding)
    slope = [float((v.mean(0) * clean).sum() / clean.square().sum()) for v in (truth, ours)]
    assert slope[1] == pytest.approx(slope[0], abs=0.004)
    wrong = [float((v.mean(0) - clean).std() / clean.std()) for v in (truth, ours)]
    assert wrong[1] == pytest.approx(wrong[0], abs=0.01)


@pytest.mark.parametrize(
    "name", ["crossbar", "crossbar_pcm", "crossbar_reram", "crossbar_gaussian10"]
)
@pytest.mark.parametrize("age", [0.0, DAY])
@pytest.mark.parametrize("weight", [0.0, 0.013, 0.0945, 0.16, 0.4, 1.0])
def test_moments_are_those_of_a_die(name: str, age: float, weight: float) -> None:
    """Of 40,000 devices that the simulator draws, a reading of each included."""
    design = crossbar.design(technology.load(name))
    target = conductance.to_conductance(np.full((400, 100), weight, np.float32), design)
    scale = np.ones((1, 100), np.float32)
    tensors = dict(zip((PLUS, MINUS, SCALE), (*target, scale), strict=True))
    die = conductance.die_conductances(tensors, "layer", design, Die(5, age))
    span = 1 - design.floor
    written, aged = ((g[0] - g[1]) / span for g in (die.written, die.aged))
    read = aged.astype(np.float64)
    if design.noise.read:
        sigma = design.noise.read_sigma(die.written, die.aged, age)
        read = read + (sigma * np.random.default_rng(0).standard_normal(sigma.shape)).sum(0) / span
    known, place = moments(design.noise, design.floor, age, True), round(weight * (POINTS - 1))
    error = 5 * read.std() / np.sqrt(read.size)
    assert known.spread[place] == pytest.approx(read.std(), rel=0.03)
    assert known.error[place] == pytest.approx(read.mean() - weight, abs=error)
    assert known.written[place] == pytest.approx(abs(written).mean(), abs=error)
    assert known.aged[place] == pytest.approx(abs(aged).mean(), abs=error)
    quiet = moments(design.noise, design.floor, age, False).spread[place]
    assert quiet == pytest.approx(aged.std(), rel=0.03)


@pytest.mark.parametrize("name", ["crossbar", "optical"])
def test_gradients_reach_weights_inputs_and_ranges(name: str) -> None:
    pair = Pair(name, linear())
    pair.twin.train()
    pair.twin.face(Die(3, DAY, True), True)
    weight, x = pair.weight.clone().requires_grad_(), signal(pair.layer).requires_grad_()
    y = pair.twin(x, weight, torch.tensor(127 * 0.02))
    y.square().mean().backward()
    assert weight.grad is not None
    assert x.grad is not None
    exact = 2 * y.detach() / y.numel()
    near = exact.T @ x.detach()
    same = torch.nn.functional.cosine_similarity(weight.grad.flatten(), near.flatten(), dim=0)
    assert float(same) > 0.98
    assert float(pair.twin.log_range.grad.abs().sum()) > 0


@pytest.mark.parametrize("name", ["crossbar", "optical"])
def test_learned_ranges_are_those_of_the_lowered_layer(name: str) -> None:
    pair = Pair(name, linear())
    with torch.no_grad():
        pair.twin.log_range += 0.3
    record = replace(pair.layer, output_range=pair.twin.ranges())
    learned = Pair(name, record)
    np.testing.assert_allclose(learned.twin.ranges(), pair.twin.ranges(), rtol=1e-6)
    x = signal(record)
    off = (learned.simulated(x, IDEAL) - pair.trained(x, IDEAL)).abs()
    assert float((off > 1e-3).float().mean()) < 1e-3
    assert float((learned.simulated(x, IDEAL) - Pair(name, linear()).simulated(x, IDEAL)).std()) > 0


@pytest.mark.parametrize("name", ["rom", "crossbar", "optical"])
def test_clipping_leaves_what_lies_inside_and_cuts_what_lies_out(name: str) -> None:
    pair = Pair(name, linear())
    weight = torch.randn(40, 100, generator=torch.Generator().manual_seed(0))
    weight[3, 7] = 50.0
    before = weight.clone()
    pair.twin.clip(weight, 2.5)
    assert float(weight[3, 7]) < 25
    inside = before.abs() < 1.0
    assert torch.equal(weight[inside], before[inside])


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 60), limit=st.integers(1, 20), batch=st.integers(1, 3))
def test_cutting_and_joining_are_inverse(length: int, limit: int, batch: int) -> None:
    cut = Cut(tiling.split(length, limit))
    x = torch.arange(1.0, batch * length + 1).reshape(batch, length)
    tiles = cut(x)
    assert tiles.shape == (batch, cut.count, cut.tall)
    assert torch.equal(cut.join(tiles), x)
    assert int((tiles != 0).sum()) == batch * length


@pytest.mark.parametrize("odd", [False, True])
def test_the_gradient_of_a_step_is_that_of_lsq(odd: bool) -> None:
    x, pull = torch.linspace(-3.97, 4.03, 41), torch.arange(41.0)
    step = torch.tensor(0.5, requires_grad=True)
    (on_grid(x, step, 3.0, odd) * pull).sum().backward()
    ratio = (x / 0.5).numpy()
    code = 2 * np.round((ratio - 1) / 2) + 1 if odd else np.round(ratio)
    code = np.clip(code, -3, 3)
    inside = np.abs(ratio) <= (4 if odd else 3)
    assert step.grad is not None
    slope = np.where(inside, code - ratio, code)
    np.testing.assert_allclose(step.grad, (slope * np.arange(41)).sum(), rtol=1e-4)


def test_rows_have_their_own_grid() -> None:
    drawn = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    x = drawn * torch.logspace(-3, 3, 5)[:, None]
    step = peak_step(x, 127.0)
    np.testing.assert_allclose(on_own_grid(x, 127.0), torch.round(x / step) * step, rtol=1e-6)


@pytest.mark.parametrize(
    "name", ["crossbar", "crossbar_pcm", "crossbar_pcm_joshi", "crossbar_reram", "optical"]
)
@pytest.mark.parametrize(("age", "read"), [(0.0, False), (DAY, False), (DAY, True)])
@pytest.mark.parametrize("seed", [0, 7])
def test_a_twin_of_a_die_is_that_die(name: str, age: float, read: bool, seed: int) -> None:
    """One seed names one die: the draws of writing, ageing and reading are the simulator's."""
    pair = Pair(name, linear(97, 31))
    x, die = signal(pair.layer), Die(seed, age, read)
    truth, ours = pair.simulated(x, die), pair.faced(x, die)
    off = (truth - ours).abs() / truth.std()
    assert float((off > 1e-4).float().mean()) < (5e-2 if read else 2e-3)  # bfloat16 read variance
    assert float(off.median()) < 1e-6
    other = pair.faced(x, Die(seed + 1, age, read))
    assert float((other - ours).std() / truth.std()) > 1e-3


def test_a_die_can_be_read_afresh() -> None:
    pair = Pair("crossbar_pcm", linear(97, 31))
    x, die = signal(pair.layer), Die(3, DAY, True)
    first, again, other = (pair.faced(x, die, readings) for readings in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    quiet = pair.faced(x, Die(3, DAY, False))
    reads = (first - other).std() / 2**0.5
    assert 0 < float(reads) < 2 * float((first - quiet).std())


@pytest.mark.parametrize("converters", [True, False])
def test_a_judgement_draws_the_devices_of_a_die_once(
    monkeypatch: pytest.MonkeyPatch, converters: bool
) -> None:
    pair, die = Pair("crossbar", linear()), Die(5, 86400.0, read_noise=False)
    drawn: list[Tensor] = []
    devices = type(pair.twin)._devices

    def counted(twin: Any, weight: Tensor, *more: Any) -> Any:
        drawn.append(weight)
        return devices(twin, weight, *more)

    monkeypatch.setattr(type(pair.twin), "_devices", counted)
    x, step = signal(pair.layer), torch.tensor(pair.layer.input_scale)
    first = pair.trained(x, die, converters)
    with torch.no_grad():
        again = pair.twin(on_grid(x, step, 127.0), pair.weight, step * 127)
        assert len(drawn) == 1
        pair.weight.mul_(0.5)[0, 0] = 0.3  # in place, as an optimiser does
        other = pair.twin(on_grid(x, step, 127.0), pair.weight, step * 127)
    assert len(drawn) == 2
    assert torch.equal(first, again)
    assert torch.equal(other, pair.trained(x, die, converters))
    assert len(drawn) == 3  # facing a die, even the same, begins anew
    assert not torch.equal(other, first)
