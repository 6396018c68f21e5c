"""A crossbar layer while it is trained: fresh devices at every step, converters that learn.

What `simulate.CrossbarLinear` does for one die with fixed conductances is done here for weights
that change and for a die drawn anew, by the same laws (`pfmc.noise_laws` run on torch). All tiles
are one batched product; without output converters the tiles fall together into one plain product.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from pfmc import noise
from pfmc.hardware import FixedLinear, TiledLinear
from pfmc.targets.base import Die
from pfmc.targets.crossbar import tiling
from pfmc.targets.crossbar.moments import POINTS, moments
from pfmc.targets.crossbar.technology import Design
from pfmc.targets.grids import assign, on_integers, pooled_normal, whole

_KEPT = 1 << 22
"""Weights of a layer up to which the devices of a judged die are kept."""
_GOLDEN = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio: its multiples spread checksums over all seeds (Knuth, TAOCP 6.4)."""


class Cut:
    """Cuts the last axis of a tensor into the rows of tiles, the shorter filled up with zeros."""

    def __init__(self, edges: npt.NDArray[np.int32]) -> None:
        heights = np.diff(edges)
        self.count, self.tall = len(heights), int(heights.max())
        self.taller = int((heights == self.tall).sum())

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., T, R]``."""
        if self.taller == self.count:
            return x.reshape(*x.shape[:-1], self.count, self.tall)
        cut = self.taller * self.tall
        short = x[..., cut:].reshape(*x.shape[:-1], self.count - self.taller, self.tall - 1)
        tall = x[..., :cut].reshape(*x.shape[:-1], self.taller, self.tall)
        return torch.cat([tall, functional.pad(short, (0, 1))], dim=-2)

    def join(self, x: Tensor) -> Tensor:
        """The inverse: ``[..., T, R]`` to ``[..., in]``."""
        if self.taller == self.count:
            return x.flatten(-2)
        first = x[..., : self.taller, :].flatten(-2)
        return torch.cat([first, x[..., self.taller :, : self.tall - 1].flatten(-2)], dim=-1)


class CrossbarTwin(nn.Module):
    """See `pfmc.targets.base.Twin`.

    Args:
        linear: its shape and name. design: the technology's numbers. tiled: the lowered layer,
        whose converter ranges are the first.
    """

    column: Tensor

    def __init__(self, linear: FixedLinear, design: Design, tiled: TiledLinear) -> None:
        super().__init__()
        self.name, self.design = linear.name, design
        self.grid = tiling.grid(linear.inputs, linear.outputs, design.rows, design.columns)
        self.cut = Cut(self.grid.row_edges)
        self.samples = float(2 ** (design.output_bits - 1) - 1)
        self.codes = float(2 ** (linear.input_bits - 1) - 1)
        widths = np.diff(self.grid.column_edges)
        column = torch.from_numpy(np.repeat(np.arange(self.grid.across), widths))
        self.register_buffer("column", column, persistent=False)
        self.log_range = nn.Parameter(torch.zeros(self.grid.down, self.grid.across))
        self.set_ranges(tiled)
        self._known: dict[tuple[int, str], list[Tensor]] = {}
        self.keeps = True  # errors of one die from call to call; not where memory is short
        self._missed: tuple[Tensor, Tensor] | None = None
        self._drawn: tuple[Tensor, Any] | None = None
        self._base: tuple[int | None, int] | None = None
        self.face(Die(seed=None, read_noise=False))

    # -- what the trainer calls -----------------------------------------------------------------

    def face(self, die: Die, converters: bool = True, readings: int | None = None) -> None:
        """See `Twin.face`; facing the same die again while training, the twin knows its errors."""
        if (die, converters, readings) != getattr(self, "_faced", None) or not self.training:
            self._missed = None
        self._drawn = None
        self._faced = (die, converters, readings)
        self.die, self.converters, self.readings = die, converters, readings
        self._reads: torch.Generator | None = None

    @torch.no_grad()
    def clip(self, weight: Tensor, sigmas: float) -> None:
        """See `Twin.clip`; the deviation is over the rows of a tile, taken around zero."""
        tiles = self.cut(weight)
        power = tiles.square().sum(dim=-1) / tiles.new_tensor(np.diff(self.grid.row_edges))
        limit = (sigmas * power.sqrt()).unsqueeze(-1)
        weight.copy_(self.cut.join(torch.maximum(torch.minimum(tiles, limit), -limit)))

    def ranges(self) -> npt.NDArray[np.float32]:
        """The range of each tile in input codes times full conductances, float32 ``[tiles]``."""
        made: npt.NDArray[np.float32] = whole(self.log_range).exp().reshape(-1).numpy()
        return made

    def set_ranges(self, tiled: TiledLinear) -> None:
        """See `Twin.set_ranges`."""
        given = torch.from_numpy(np.array(tiled.tiles["adc_range"], np.float32))
        assign(self.log_range, given.log())

    # -- the layer ------------------------------------------------------------------------------

    def forward(self, x: Tensor, weight: Tensor, full: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        if self.converters:
            return self._converted(x, weight, full)
        if self.die.seed is None:
            return functional.linear(x, weight)
        if self.training:
            error = self._errors(weight, joined=True)[0]
        else:
            error = self._kept(weight, lambda: self._errors(weight, joined=True)[0])
        return functional.linear(x, weight + error)

    @torch.no_grad()
    def _errors(self, weight: Tensor, joined: bool) -> tuple[Tensor, Tensor]:
        """What the die makes of the weights, less the weights, reading included.

        Drawn once a die while training: the weights of its steps hardly differ.

        Returns:
            In weights ``[out, in]`` if `joined`, else normalised ``[out, T, R]``; and the drift
            compensation of each column ``[out, T]``.
        """
        if self._missed is None:
            unit = self._scale(weight)
            held, scale, _ = self._devices(weight, unit, self.die.read_noise)
            if joined:
                error = self.cut.join(held * scale.unsqueeze(-1)) - weight
            else:
                error = held - self.cut(weight) / unit.unsqueeze(-1)
            made = error, scale / unit
            if not (self.training and self.keeps and self.readings is None):
                return made
            self._missed = made
        return self._missed

    def _converted(self, x: Tensor, weight: Tensor, full: Tensor) -> Tensor:
        """All tiles in one batched product, their samples converted and summed.

        While training, read noise is drawn on the weights here too.
        """
        variance: Tensor | None = None
        with torch.no_grad():
            unit = self._scale(weight)
            if self.training and self.readings is None and self.die.seed is not None:
                error, drift = self._errors(weight, joined=False)
                scale = unit * drift
            else:
                error, scale, variance = self._kept(weight, lambda: self._judged(weight, unit))
        unit_step = full / (self.codes * self.samples)
        step = self.log_range.exp()[:, self.column].unsqueeze(1) * unit_step
        tiles = (self.cut(weight) / unit.unsqueeze(-1) + error).permute(1, 2, 0)  # [T, R, out]
        rows = self.cut(x.reshape(-1, x.shape[-1])).transpose(0, 1)  # [T, B, R]
        currents = torch.bmm(rows, tiles / step)
        if self.die.read_noise:
            currents = currents + self._reading(rows, variance, step.detach())
        samples = on_integers(currents, self.samples)
        y = (samples * (step * scale.T.unsqueeze(1))).sum(dim=0)
        return y.reshape(*x.shape[:-1], -1)

    def _judged(self, weight: Tensor, unit: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Errors of the normalised weights, scale and variance of a reading of one die."""
        held, scale, variance = self._devices(weight, unit, False)
        return held - self.cut(weight) / unit.unsqueeze(-1), scale, variance

    def _kept(self, weight: Tensor, make: Callable[[], Any]) -> Any:
        """What `make` makes of a die, as long as it is faced and the weights stay the same.

        A judgement asks for it many times. Large layers are made anew: their products take longer.
        """
        if self._drawn is not None and torch.equal(self._drawn[0], weight):
            return self._drawn[1]
        made = make()
        if self.keeps and weight.numel() <= _KEPT:
            self._drawn = weight.clone(), made
        return made

    def _scale(self, weight: Tensor) -> Tensor:
        """The weight of a full conductance of each column, ``[out, T]``; 1 where all are zero."""
        peak = self.cut(weight).abs().amax(dim=-1)
        return torch.where(peak > 0, peak, torch.ones_like(peak))

    def _devices(
        self, weight: Tensor, scale: Tensor, reading: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The die's normalised weights, their scale, and the variance of a reading.

        Args:
            weight: ``[out, in]``; scale: of its columns ``[out, T]``; reading: read it once.

        Returns:
            held ``[out, T, R]``: (g_plus - g_minus) / (g_max - g_min) as aged, and as read once if
            `reading`; scale ``[out, T]``: what 1 of it weighs, drift compensation included;
            variance of one reading ``[out, T, R]``, or None.
        """
        ideal = self.cut(weight) / scale.unsqueeze(-1)
        if self.die.seed is None and not self.die.read_noise:
            return ideal, scale, None
        if self.training and self.readings is None and self.die.seed is not None:
            return self._quickly(ideal, scale)
        low = self.design.floor
        target = torch.stack([ideal, -ideal]).clamp_(0, 1).mul_(1 - low).add_(low)
        written, aged = self._written(target)
        if self.design.compensate and self.die.seed is not None and self.die.age_s > 0:
            scale = scale * self._compensation(written[0] - written[1], aged[0] - aged[1])
        laws = self.design.noise
        variance = None
        if self.die.read_noise and laws.read:
            sigma = laws.read_sigma(written, aged, self.die.age_s)
            if reading:
                aged = aged + sigma * self._normal(sigma, "read")
            else:
                variance = sigma.square().sum(dim=0).div_((1 - low) ** 2)
        return (aged[0] - aged[1]).div_(1 - low), scale, variance

    def _quickly(self, ideal: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, None]:
        """`_devices` as read once, by the moments of the laws: one normal number a weight."""
        age_s = self.die.age_s
        known = moments(self.design.noise, self.design.floor, age_s, self.die.read_noise)
        place = ideal.abs().clamp_(max=1).mul_(POINTS - 1).add_(0.5).to(torch.int32).view(-1)

        def of(table: npt.NDArray[np.float32]) -> Tensor:
            told = torch.from_numpy(table).to(ideal.device)
            return told.index_select(0, place).view(ideal.shape)

        if self.design.compensate and age_s > 0:
            scale = scale * self._compensation(of(known.written), of(known.aged))
        held = of(known.error).mul_(ideal.sign()).add_(ideal)
        return held.addcmul_(of(known.spread), self._normal(ideal, "pair")), scale, None

    def _written(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Devices ``[2, out, T, R]`` as written and as aged; see `noise.NoiseModel.device`."""
        laws, age_s = self.design.noise, self.die.age_s
        if self.die.seed is None:
            return target, target
        writes = self._draws(target, "write", len(laws.write))
        ages = self._draws(target, "age", len(laws.age) if age_s != 0.0 else 0)
        made: tuple[Tensor, Tensor] = laws.lived(target, writes, ages, age_s)
        return made

    def _draws(self, like: Tensor, moment: str, count: int) -> list[Tensor]:
        """The normal numbers of `count` laws of one moment, each shaped like `like`."""
        if self.readings is None:
            return [self._normal(like, f"{moment} {k}") for k in range(count)]
        key = (self.die.seed or 0, moment)
        if len(self._known.get(key, ())) < count:
            self._known = {k: v for k, v in self._known.items() if k[0] == key[0]}
            self._known[key] = self._simulated(like, moment, count)
        return [z.to(like.device) for z in self._known.get(key, [])[:count]]

    def _simulated(self, like: Tensor, moment: str, count: int) -> list[Tensor]:
        """What `noise.NoiseModel.device` draws for the die, laid out as tiles."""
        drawn = noise.generator(self.die.seed or 0, self.name, moment)
        shape = (2, int(self.grid.row_edges[-1]), like.shape[1])
        each = [drawn.standard_normal(shape, dtype=np.float32) for _ in range(count)]
        return [self.cut(torch.from_numpy(z).transpose(1, 2)).contiguous() for z in each]

    def _normal(self, like: Tensor, moment: str) -> Tensor:
        seed = self._seed(moment)
        if self.training and self.readings is None:
            return pooled_normal(like, seed)
        generator = torch.Generator(like.device).manual_seed(seed)
        return torch.empty_like(like).normal_(generator=generator)

    def _seed(self, moment: str) -> int:
        if self.readings is not None:
            return int(noise.generator(self.readings, self.name, moment).integers(2**63))
        if self._base is None or self._base[0] != self.die.seed:
            drawn = noise.generator(self.die.seed or 0, self.name, "twin")
            self._base = self.die.seed, int(drawn.integers(2**63))
        return (self._base[1] + zlib.crc32(moment.encode()) * _GOLDEN) % 2**63

    def _compensation(self, written: Tensor, aged: Tensor) -> Tensor:
        """mean |w written| / mean |w aged| of each tile, spread over its columns ``[out, T]``.

        Args:
            written, aged: differences of pairs ``[out, T, R]``, which are not kept.
        """
        sums = []
        for pair in (written, aged):
            by_column = self._padless(pair.abs_()).sum(dim=-1)
            total = by_column.new_zeros(self.grid.across, self.grid.down)
            sums.append(total.index_add_(0, self.column, by_column))
        ratio = torch.where(sums[1] > 0, sums[0] / sums[1], torch.ones_like(sums[0]))
        return ratio[self.column]

    def _padless(self, tiles: Tensor) -> Tensor:
        """`tiles` with what fills up the shorter ones set to zero."""
        if self.cut.taller < self.cut.count:
            tiles[..., self.cut.taller :, -1] = 0
        return tiles

    @torch.no_grad()
    def _reading(self, rows: Tensor, variance: Tensor | None, step: Tensor) -> Tensor | float:
        """One draw of read noise for every current, in steps ``[T, B, out]``; 0 without any."""
        power: Tensor | None = None
        if variance is not None:
            wide = self._padless(variance).permute(1, 2, 0) / step.square()
            power = torch.bmm(rows.square(), wide)
        if self.design.noise.output:
            constant = (self.samples * self.design.noise.output_sigma()) ** 2
            shape = (*rows.shape[:2], len(self.column))
            power = rows.new_full(shape, constant) if power is None else power.add_(constant)
        if power is None:
            return 0.0
        if self._reads is None:
            self._reads = torch.Generator(rows.device).manual_seed(self._seed("read"))
        return torch.empty_like(power).normal_(generator=self._reads).mul_(power.sqrt_())
