"""An optical layer while it is trained: tiles scaled to be passive, fresh writing errors, light's
noise, converters that learn.

What `simulate.OpticalLinear` does for one written die is done here for weights that change. The
largest singular value of a tile is followed by power iteration, one turn a call (Miyato et al.,
ICLR 2018, arXiv:1802.05957), and taken exactly outside training. Without output converters the
tiles fall together into one plain product.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from pfmc import noise
from pfmc.hardware import FixedLinear, TiledLinear
from pfmc.targets.base import Die
from pfmc.targets.grids import assign, on_grid, whole
from pfmc.targets.optical import physics, tiling
from pfmc.technology import Technology


class OpticalTwin(nn.Module):
    """See `pfmc.targets.base.Twin`.

    Args:
        linear: its shape and name. technology: noise and converters. tiled: the lowered layer,
        whose converter ranges are the first.
    """

    write_nmse: Tensor
    noise_sigma: Tensor
    inside: Tensor
    probe: Tensor
    turns: Tensor

    def __init__(self, linear: FixedLinear, technology: Technology, tiled: TiledLinear) -> None:
        super().__init__()
        self.name = linear.name
        self.grid = g = tiling.grid(linear.inputs, linear.outputs, technology)
        self.margin = technology.number("matrix.margin")
        self.samples = float(2 ** (technology.integer("adc.bits") - 1) - 1)
        planes = np.asarray(tiled.tiles["planes"], np.float64)
        self._hold("write_nmse", physics.write_nmse(technology, planes).reshape(g.rows, g.columns))
        sigma = np.asarray(tiled.tiles["noise_sigma"], np.float64).reshape(g.rows, g.columns)
        self._hold("noise_sigma", np.repeat(sigma, g.width, axis=1)[:, None])
        ones = g.split(np.ones((g.inputs, g.outputs), np.float32))
        shape = (g.rows, g.columns, g.height, g.width)
        self._hold("inside", ones.reshape(shape).transpose(0, 1, 3, 2))
        start = torch.Generator().manual_seed(0)
        probe = torch.randn(g.rows, g.columns, g.width, 1, generator=start)
        self.register_buffer("probe", probe)
        self.register_buffer("turns", torch.tensor(20))
        self.log_range = nn.Parameter(torch.zeros(g.rows, 1, g.columns * g.width))
        self.set_ranges(tiled)
        self.face(Die(seed=None, read_noise=False))

    def _hold(self, name: str, array: npt.NDArray[np.floating]) -> None:
        tensor = torch.from_numpy(np.ascontiguousarray(array, np.float32))
        self.register_buffer(name, tensor, persistent=False)

    # -- what the trainer calls -----------------------------------------------------------------

    def face(self, die: Die, converters: bool = True, readings: int | None = None) -> None:
        """See `Twin.face`; glass does not age."""
        self.die, self.converters, self.readings = die, converters, readings
        self._reads: torch.Generator | None = None

    @torch.no_grad()
    def clip(self, weight: Tensor, sigmas: float) -> None:
        """See `Twin.clip`; the deviation is over all inputs of an output, around zero."""
        limit = sigmas * weight.square().mean(dim=1, keepdim=True).sqrt()
        weight.copy_(torch.maximum(torch.minimum(weight, limit), -limit))

    def ranges(self) -> npt.NDArray[np.float32]:
        """The half range of each converter in amplitudes of a driven input ``[tiles, width]``."""
        g = self.grid
        ranges = whole(self.log_range).exp().reshape(g.tiles, g.width)
        made: npt.NDArray[np.float32] = ranges.numpy()
        return made

    def set_ranges(self, tiled: TiledLinear) -> None:
        """See `Twin.set_ranges`."""
        given = torch.from_numpy(np.array(tiled.tensors["adc_range"], np.float32))
        assign(self.log_range, given.clamp(min=1e-30).log())

    # -- the layer ------------------------------------------------------------------------------

    def forward(self, x: Tensor, weight: Tensor, full: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        if self.converters:
            return self._converted(x, weight, full)
        if self.die.seed is None:
            return functional.linear(x, weight)
        with torch.no_grad():
            error = self._join(self._error(self._split(weight)))
        return functional.linear(x, weight + error)

    def _converted(self, x: Tensor, weight: Tensor, full: Tensor) -> Tensor:
        g, tiles = self.grid, self._split(weight)
        with torch.no_grad():
            gain = self._largest(tiles) / self.margin  # [rows, columns, 1, 1]
            gain = torch.where(gain > 0, gain, torch.ones_like(gain))
            error = self._error(tiles) if self.die.seed is not None else None
        held = (tiles if error is None else tiles + error) / gain
        wide = held.permute(0, 3, 1, 2).reshape(g.rows, g.height, g.columns * g.width)
        full = full.reshape(-1, 1)
        filled = functional.pad(
            x.reshape(-1, x.shape[-1]) / full, (0, g.rows * g.height - g.inputs)
        )
        amplitude = torch.bmm(filled.reshape(-1, g.rows, g.height).transpose(0, 1), wide)
        if self.die.read_noise:
            amplitude = amplitude + self._reading(amplitude)
        half = self.log_range.exp()
        readings = on_grid(amplitude, half / self.samples, self.samples)
        spread = gain.reshape(g.rows, 1, g.columns).repeat_interleave(g.width, dim=2)
        y = (readings * spread).sum(dim=0)[:, : g.outputs] * full
        return y.reshape(*x.shape[:-1], g.outputs)

    def _split(self, weight: Tensor) -> Tensor:
        """``[out, in]`` to tiles ``[rows, columns, width, height]``, filled up with zeros."""
        g = self.grid
        down, across = g.rows * g.height - g.inputs, g.columns * g.width - g.outputs
        padded = functional.pad(weight, (0, down, 0, across))
        return padded.reshape(g.columns, g.width, g.rows, g.height).permute(2, 0, 1, 3)

    def _join(self, tiles: Tensor) -> Tensor:
        g = self.grid
        whole = tiles.permute(1, 2, 0, 3).reshape(g.columns * g.width, g.rows * g.height)
        return whole[: g.outputs, : g.inputs]

    def _error(self, tiles: Tensor) -> Tensor:
        """What writing misses: Gaussian, of squared relative size `physics.write_nmse` a tile."""
        power = (tiles * tiles).sum(dim=(2, 3)) / self.inside.sum(dim=(2, 3))
        sigma = (self.write_nmse * power).sqrt()
        error: Tensor = self._written(tiles).mul_(sigma[:, :, None, None]).mul_(self.inside)
        return error

    def _written(self, tiles: Tensor) -> Tensor:
        """Normal numbers of the die, shaped like `tiles`."""
        if self.readings is None:
            generator = torch.Generator(tiles.device).manual_seed(self._seed("write"))
            own: Tensor = torch.empty(tiles.shape, device=tiles.device)
            return own.normal_(generator=generator)
        rng, g = noise.generator(self.die.seed or 0, self.name, "write"), self.grid
        z = rng.standard_normal((g.rows, g.columns, g.height, g.width), dtype=np.float32)
        drawn: Tensor = torch.from_numpy(z).to(tiles.device).transpose(2, 3).contiguous()
        return drawn

    def _largest(self, tiles: Tensor) -> Tensor:
        """Largest singular value of each tile, ``[rows, columns, 1, 1]``."""
        if not self.training:
            exact: Tensor = torch.linalg.matrix_norm(tiles, ord=2)[:, :, None, None]
            return exact
        other = self.probe
        for _ in range(int(self.turns)):
            other = functional.normalize(tiles.transpose(2, 3) @ self.probe, dim=2)
            self.probe = functional.normalize(tiles @ other, dim=2)
        self.turns.fill_(1)
        largest: Tensor = (self.probe.transpose(2, 3) @ tiles @ other).abs()
        return largest

    def _reading(self, amplitude: Tensor) -> Tensor:
        if self._reads is None:
            self._reads = torch.Generator(amplitude.device).manual_seed(self._seed("read"))
        drawn = torch.empty_like(amplitude).normal_(generator=self._reads)
        return drawn.mul_(self.noise_sigma)

    def _seed(self, moment: str) -> int:
        if self.readings is not None:
            return int(noise.generator(self.readings, self.name, moment).integers(0, 2**62))
        drawn = noise.generator(self.die.seed or 0, self.name, f"twin {moment}")
        return int(drawn.integers(2**63))
