"""A crossbar layer as a torch module: all tiles in one batched product, converters and noise in it.

The order is that of `pfmc.noise.ORDER`: conductances are written and aged once per die when the
module is built; then, at each call, input converter (clip, round), product of every tile, read
noise on every column current, output converter (clip, round), and the digital sum of the tiles.
Currents are kept in steps of their own output converter, so that the converter is a clip and a
round, and one factor per tile column turns its code into a weighted output.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from pfmc import noise
from pfmc.targets.base import Die, StoredLinear
from pfmc.targets.crossbar import conductance, tiling
from pfmc.targets.crossbar.technology import Design

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Folded:
    """A die's layer as arrays, tiles of one column of tiles padded to the same height.

    ``T`` row tiles, ``R`` rows of the tallest: `weight` float32 ``[T, R, out]`` in steps of the
    output converter per input code; `variance` of one reading ``[T, R, out]`` in steps² per code²
    or None; `offset` added variance in steps², ``[T, 1, out]``; `factor` ``[T, 1, out]``: output
    per step.
    """

    weight: npt.NDArray[np.float32]
    variance: npt.NDArray[np.float32] | None
    offset: npt.NDArray[np.float32] | None
    factor: npt.NDArray[np.float32]


def _per_column(values: npt.NDArray[Any], grid: tiling.Grid) -> Doubles:
    """Spreads one number a tile over its columns: ``[tiles]`` -> ``[T, out]``."""
    table = np.asarray(values, np.float64).reshape(grid.down, grid.across)
    return np.repeat(table, np.diff(grid.column_edges), axis=1)


def _compensation(conductances: conductance.DieConductances, grid: tiling.Grid) -> Doubles:
    """mean |w written| / mean |w aged| of every tile, ``[T, out]``: global drift compensation,
    from a readout of unit inputs right after writing and one now (Ambrogio, Nature 2018)."""
    means = []
    for state in (conductances.written, conductances.aged):
        magnitude = np.abs(state[0] - state[1])
        down = np.add.reduceat(magnitude, grid.row_edges[:-1], axis=0)
        means.append(np.add.reduceat(down, grid.column_edges[:-1], axis=1, dtype=np.float64))
    ratio = np.divide(means[0], means[1], out=np.ones_like(means[0]), where=means[1] > 0)
    return _per_column(ratio, grid)


def _pad(matrix: npt.NDArray[np.float32], grid: tiling.Grid) -> npt.NDArray[np.float32]:
    heights = np.diff(grid.row_edges)
    tall = int(heights.max())
    if (heights == tall).all():
        return matrix.reshape(grid.down, tall, matrix.shape[1])
    out = np.zeros((grid.down, tall, matrix.shape[1]), np.float32)
    for t, (a, b) in enumerate(pairwise(grid.row_edges.tolist())):
        out[t, : b - a] = matrix[a:b]
    return out


def _fold(stored: StoredLinear, design: Design, die: Die) -> _Folded:
    grid = tiling.from_table(stored.tiles, stored.inputs, stored.outputs)
    drawn = conductance.die_conductances(stored.tensors, stored.name, design, die)
    full = _per_column(stored.tiles["adc_range"], grid)
    steps = 2 ** (design.output_bits - 1) - 1
    heights = np.diff(grid.row_edges)
    inverse = np.repeat((steps / full).astype(np.float32), heights, axis=0)
    inverse /= np.float32(1.0 - design.floor)
    weight = (drawn.aged[0] - drawn.aged[1]) * inverse
    variance = offset = None
    if die.read_noise and design.noise.read:
        sigma = design.noise.read_sigma(drawn.written, drawn.aged, die.age_s)
        variance = _pad((sigma[0] ** 2 + sigma[1] ** 2) * inverse**2, grid)
    if die.read_noise and design.noise.output:
        constant = np.full((grid.down, 1, stored.outputs), design.noise.output_sigma() * steps)
        offset = np.square(constant).astype(np.float32)
    assert stored.input_scale is not None
    factor = stored.tensors[conductance.SCALE] * (full / steps * stored.input_scale)
    if design.compensate and die.seed is not None and die.age_s > 0:
        factor = factor * _compensation(drawn, grid)
    return _Folded(_pad(weight, grid), variance, offset, factor[:, None, :].astype(np.float32))


def _fast_half() -> bool:
    """Whether this processor multiplies bfloat16 natively; the read variance needs no more."""
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(check is not None and check())


class CrossbarLinear(torch.nn.Module):
    """``x[..., in] -> y[..., out]`` of one layer of one die.

    Gradients flow straight through both roundings and stop where a converter clips; the weights
    are the die's and have no gradient. Read noise is drawn from the module's own generator, seeded
    by the die and the layer: a fresh module repeats the same readings in the same order.
    """

    weight: torch.Tensor
    variance: torch.Tensor | None
    offset: torch.Tensor | None
    factor: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, stored: StoredLinear, design: Design, die: Die) -> None:
        super().__init__()
        folded = _fold(stored, design, die)
        assert stored.input_scale is not None
        self.inputs, self.outputs = stored.inputs, stored.outputs
        self.input_scale = float(stored.input_scale)
        self.largest_input = 2 ** (stored.input_bits - 1) - 1
        self.largest_output = 2 ** (design.output_bits - 1) - 1
        self.tall = folded.weight.shape[1]
        self.taller = self.inputs - folded.weight.shape[0] * (self.tall - 1)
        half = torch.bfloat16 if _fast_half() else torch.float32
        self.register_buffer("weight", torch.from_numpy(folded.weight))
        self.register_buffer("variance", _tensor(folded.variance, half))
        self.register_buffer("offset", _tensor(folded.offset, torch.float32))
        self.register_buffer("factor", torch.from_numpy(folded.factor))
        self.register_buffer("bias", _tensor(stored.bias, torch.float32))
        self._seed = int(noise.generator(die.seed or 0, stored.name, "read").integers(2**63))
        self._generators: dict[torch.device, torch.Generator] = {}

    def generator(self, device: torch.device) -> torch.Generator:
        """The layer's source of read noise on `device`."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output, bias included; float32."""
        flat = x.reshape(-1, self.inputs).to(torch.float32)
        y = cast(torch.Tensor, _Tiles.apply(flat, self))  # type: ignore[no-untyped-call]
        return y.reshape(*x.shape[:-1], self.outputs)

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """The input converters: ``[B, in]`` -> codes ``[T, B, R]``, padded by zero rows."""
        codes = (x / self.input_scale).clamp_(-self.largest_input, self.largest_input).round_()
        return self.tiled(codes)

    def tiled(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, in]`` -> ``[T, B, R]``: the rows of each tile."""
        count = self.weight.shape[0]
        if self.taller == count:
            return x.view(-1, count, self.tall).transpose(0, 1)
        out = x.new_zeros(count, x.shape[0], self.tall)
        cut = self.taller * self.tall
        out[: self.taller] = x[:, :cut].view(-1, self.taller, self.tall).transpose(0, 1)
        rest = x[:, cut:].view(-1, count - self.taller, self.tall - 1)
        out[self.taller :, :, : self.tall - 1] = rest.transpose(0, 1)
        return out

    def untiled(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `tiled`."""
        count, batch = self.weight.shape[0], x.shape[1]
        if self.taller == count:
            return x.transpose(0, 1).reshape(batch, self.inputs)
        first = x[: self.taller].transpose(0, 1).reshape(batch, -1)
        rest = x[self.taller :, :, : self.tall - 1].transpose(0, 1).reshape(batch, -1)
        return torch.cat([first, rest], dim=1)

    def currents(self, codes: torch.Tensor) -> torch.Tensor:
        """Column currents with read noise in output steps: ``[T, B, R]`` -> ``[T, B, out]``."""
        currents = torch.bmm(codes, self.weight)
        sigma = self._sigma(codes)
        if sigma is None:
            return currents
        draw = torch.empty_like(currents).normal_(generator=self.generator(currents.device))
        return currents.addcmul_(draw, sigma)

    def _sigma(self, codes: torch.Tensor) -> torch.Tensor | None:
        if self.variance is None:
            return None if self.offset is None else self.offset.sqrt()
        squares = codes.to(self.variance.dtype).square_()
        power = torch.bmm(squares, self.variance).float()
        return (power if self.offset is None else power.add_(self.offset)).sqrt_()


def _tensor(array: npt.NDArray[np.float32] | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if array is None else torch.from_numpy(np.array(array, np.float32)).to(dtype)


class _Tiles(torch.autograd.Function):
    """Converters, products and sum, with straight-through rounding."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: CrossbarLinear) -> torch.Tensor:
        currents = layer.currents(layer.codes(x))
        if ctx.needs_input_grad[0]:
            ctx.layer = layer
            ctx.save_for_backward(
                x.abs() <= layer.input_scale * layer.largest_input,
                currents.abs() <= layer.largest_output,
            )
        samples = currents.clamp_(-layer.largest_output, layer.largest_output).round_()
        y = samples.mul_(layer.factor).sum(0)
        return y if layer.bias is None else y.add_(layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor, None]:
        unclipped, linear = ctx.saved_tensors
        layer: CrossbarLinear = ctx.layer
        samples = (gradients[0] * layer.factor).mul_(linear)
        codes = torch.bmm(samples, layer.weight.transpose(1, 2))
        return layer.untiled(codes).div_(layer.input_scale).mul_(unclipped), None
