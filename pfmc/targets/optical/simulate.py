"""The torch module of one optical layer: converters, passive tiles, homodyne noise, sums."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch

from pfmc import noise
from pfmc.targets.base import Die, StoredLinear
from pfmc.targets.optical import physics, tiling
from pfmc.technology import Technology

Array = np.ndarray[Any, Any]

_CHUNK: Final = 1 << 24
"""Partial sums held at the same time."""


def straight_through(exact: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """The value of `rounded` with the gradient of `exact`."""
    return exact + (rounded - exact).detach()


def written_transfer(stored: StoredLinear, technology: Technology, die: Die) -> Array:
    """T as written on a die, float32 ``[tiles, in, out]``.

    Each tile gets one Gaussian error matrix of squared relative size `physics.write_nmse`, drawn
    from `pfmc.noise.generator` at moment ``write``; the ideal die (seed None) has none.
    """
    transfer = np.asarray(stored.tensors["transfer"], dtype=np.float32)
    if die.seed is None:
        return transfer
    rows, cols = (np.asarray(stored.tiles[k], dtype=np.int64) for k in ("rows", "cols"))
    nmse = physics.write_nmse(technology, np.asarray(stored.tiles["planes"], dtype=np.float64))
    power = np.einsum("tio,tio->t", transfer, transfer, dtype=np.float64)
    sigma = np.sqrt(nmse * power / (rows * cols)).astype(np.float32)
    rng = noise.generator(die.seed, stored.name, "write")
    error = rng.standard_normal(transfer.shape, dtype=np.float32) * sigma[:, None, None]
    down, across = _inside(rows, transfer.shape[1]), _inside(cols, transfer.shape[2])
    inside = down[:, :, None] & across[:, None, :]
    written: Array = transfer + np.where(inside, error, np.float32(0.0))
    return written


def _inside(lengths: Array, size: int) -> Array:
    return np.asarray(np.arange(size)[None, :] < lengths[:, None])


def _tensor(array: Array) -> torch.Tensor:
    """A float32 tensor; arrays read from files are copied, since they cannot be written."""
    return torch.from_numpy(np.require(array, np.float32, ["C", "W"]))


class OpticalLinear(torch.nn.Module):
    """``x[..., in] -> y[..., out]`` as the glass and its electronics compute it.

    Order: input converter, product per tile, shot and receiver noise, output converter, rescaling
    by sigma_max x scale, sum over rows of tiles, bias. Rounding passes gradients straight through;
    clipping does not. Read noise is drawn per call from a generator that the die's seed starts.
    Written glass does not age: ``die.age_s`` has no effect.

    Args:
        stored: as read from an artifact; technology: its noise law and converters; die: which one.
    """

    transfer: torch.Tensor
    gain: torch.Tensor
    sigma: torch.Tensor
    half_range: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, stored: StoredLinear, technology: Technology, die: Die) -> None:
        super().__init__()
        self.grid = tiling.grid(stored.inputs, stored.outputs, technology)
        self.read_noise = die.read_noise
        self.input_scale = stored.input_scale
        self.input_peak = 2 ** (stored.input_bits - 1) - 1
        self.adc_peak = 2 ** (technology.integer("adc.bits") - 1) - 1
        self._load(stored, written_transfer(stored, technology, die))
        key = noise.generator(die.seed or 0, stored.name, "read").integers(0, 2**62)
        self.generator = torch.Generator().manual_seed(int(key))

    def _load(self, stored: StoredLinear, transfer: Array) -> None:
        g = self.grid
        blocks = _tensor(transfer).reshape(g.rows, g.columns, g.height, g.width)
        wide = blocks.permute(0, 2, 1, 3).reshape(g.rows, g.height, g.columns * g.width)
        self.register_buffer("transfer", wide.contiguous())
        sigma_max, scale, noise_sigma = (
            np.asarray(stored.tiles[k], np.float64) for k in ("sigma_max", "scale", "noise_sigma")
        )
        self.register_buffer("gain", self._per_output(sigma_max * scale))
        self.register_buffer("sigma", self._per_output(noise_sigma))
        ranges = _tensor(np.asarray(stored.tensors["adc_range"]))
        self.register_buffer("half_range", ranges.reshape(g.rows, 1, -1))
        self.register_buffer("bias", None if stored.bias is None else _tensor(stored.bias))

    def _per_output(self, per_tile: Array) -> torch.Tensor:
        """``[tiles]`` -> float32 ``[tile rows, 1, tile columns * width]``."""
        grid = _tensor(per_tile).reshape(self.grid.rows, 1, -1)
        return grid.repeat_interleave(self.grid.width, dim=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Runs the layer on ``x[..., in]``, float32."""
        flat = x.reshape(-1, x.shape[-1])
        step = max(1, _CHUNK // (self.grid.rows * self.grid.columns * self.grid.width))
        parts = [self._run(flat[k : k + step]) for k in range(0, max(len(flat), 1), step)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], self.grid.outputs)

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        field, full = self._convert_input(x)
        filled = torch.nn.functional.pad(field, (0, self.grid.rows * self.grid.height - x.shape[1]))
        blocks = filled.reshape(-1, self.grid.rows, self.grid.height).transpose(0, 1)
        readings = self._convert_output(self._detect(torch.bmm(blocks, self.transfer)))
        return (readings * self.gain).sum(dim=0)[:, : self.grid.outputs] * full

    def _convert_input(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Amplitudes in [-1, 1] ``[n, in]`` and what input amplitude 1 is ``[n or 1, 1]``."""
        if self.input_scale is None:
            full = x.detach().abs().amax(dim=1, keepdim=True).clamp(min=1e-12)
        else:
            full = x.new_full((1, 1), self.input_scale * self.input_peak)
        field = (x / full).clamp(-1.0, 1.0)
        return straight_through(field, (field * self.input_peak).round() / self.input_peak), full

    def _detect(self, amplitude: torch.Tensor) -> torch.Tensor:
        if not self.read_noise:
            return amplitude
        drawn = torch.randn(amplitude.shape, generator=self.generator, dtype=amplitude.dtype)
        return amplitude + drawn.to(amplitude.device) * self.sigma

    def _convert_output(self, amplitude: torch.Tensor) -> torch.Tensor:
        half = self.half_range
        step = half / self.adc_peak
        clipped = torch.maximum(torch.minimum(amplitude, half), -half)
        codes = (clipped / step.clamp(min=1e-30)).round()
        return straight_through(clipped, codes * step)
