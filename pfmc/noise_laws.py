"""The laws of device noise, written with operators so that they run on numpy and on torch.

A law acts on the normalised quantity x = g / g_max of one device and never draws: the standard
normal numbers ``z`` are handed to it. `pfmc.noise` builds laws from technology files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np

from pfmc.errors import UsageError

Array = Any
"""A numpy array or a torch tensor of floats; results are of the same kind."""

_SMALLEST: Final = 1e-7
"""Logarithms and inverse powers of x are taken of max(x, this), as aihwkit does."""
_SLACK: Final = 1e-5
"""How far x may leave a law's range by rounding."""


def _ln(x: Array) -> Array:
    floored = x.clip(min=_SMALLEST)
    return floored.log() if hasattr(floored, "log") else np.log(floored)


def _horner(coefficients: Sequence[float], x: Array) -> Array:
    total = x * 0.0 + coefficients[-1]
    for c in coefficients[-2::-1]:
        total = total * x + c
    return total


def _within(law: str, valid: tuple[float, float], x: Array) -> None:
    low, high = x.min().item(), x.max().item()
    if not (valid[0] - _SLACK <= low and high <= valid[1] + _SLACK):
        raise UsageError(
            f"the noise law {law} is fitted for {valid[0]:g} <= x <= {valid[1]:g}, "
            f"but x reaches from {low:.6g} to {high:.6g}",
            mend="map weights into the device's conductance range, or use a law fitted for it",
        )


def _aged(law: str, age_s: float, limit_s: float) -> None:
    if not 0.0 <= age_s <= limit_s:
        raise UsageError(
            f"the noise law {law} holds for ages from 0 to {limit_s:g} s, not {age_s:g} s",
            mend="choose an age within the range, or a technology measured for longer",
        )


@dataclass(frozen=True)
class Curve:
    """A fitted function of x: ``clamp(slope * ln x + offset, low, high)`` below `split`, and the
    polynomial ``sum_k polynomial[k] x^k`` at and above it (no polynomial: no split)."""

    slope: float
    offset: float
    low: float
    high: float
    split: float = math.inf
    polynomial: tuple[float, ...] = ()

    def __call__(self, x: Array, log: Array = None) -> Array:
        """The curve at x; `log`: ln x if it is known."""
        known = _ln(x) if log is None else log
        below = (known * self.slope + self.offset).clip(self.low, self.high)
        if not self.polynomial:
            return below
        return below + (_horner(self.polynomial, x) - below) * (x >= self.split)


class WriteLaw(Protocol):
    """How a device misses its target when it is written."""

    def sigma(self, x: Array) -> Array:
        """Standard deviation of the written x around its target, in units of full scale."""
        ...

    def apply(self, x: Array, z: Array) -> Array:
        """The written x of target `x` for standard normal `z`; never negative."""
        ...


class AgeLaw(Protocol):
    """What time does to a written device."""

    def apply(self, target: Array, written: Array, z: Array, age_s: float) -> Array:
        """x at `age_s` seconds after writing; `z` is the device's own and stays for its life."""
        ...


class ReadLaw(Protocol):
    """How one reading of a device differs from the next."""

    def sigma(self, written: Array, aged: Array, age_s: float) -> Array:
        """Standard deviation of one reading around `aged`, in units of full scale."""
        ...


@dataclass(frozen=True)
class Polynomial:
    """Spread of normalised conductance: sigma(x) = sum_k coefficients[k] x^k / full_scale.

    As a write law the written value is ``max(x + sigma(x) z, 0)``; as a read law sigma is taken
    at the aged x and does not depend on the age.
    """

    coefficients: tuple[float, ...]
    full_scale: float
    low: float = 0.0
    high: float = 1.0

    def spread(self, x: Array) -> Array:
        """sigma(x) without the range check."""
        return _horner([c / self.full_scale for c in self.coefficients], x).clip(min=0.0)

    def apply(self, x: Array, z: Array) -> Array:
        """The written value; refuses targets outside the fitted range."""
        _within("polynomial", (self.low, self.high), x)
        return (x + self.spread(x) * z).clip(min=0.0)

    def sigma(self, x: Array, aged: Array | None = None, age_s: float = 0.0) -> Array:
        """sigma of writing x, or of reading the aged x (clipped into the fitted range)."""
        if aged is not None:
            return self.spread(aged.clip(self.low, self.high))
        _within("polynomial", (self.low, self.high), x)
        return self.spread(x)


@dataclass(frozen=True)
class Gaussian:
    """Noise on the weight itself: every weight misses its target by `relative` of a full weight.

    A weight is the difference of two devices (g_plus - g_minus), so each device gets relative /
    sqrt(2) of full scale. The written value may be negative: this is the model of papers that add
    noise to weights (AFM, arXiv:2505.09663), not of a device. With g_min = 0 a full weight is the
    largest |w| of the column of a tile.
    """

    relative: float

    def sigma(self, x: Array) -> Array:
        """The same for every x."""
        return x * 0.0 + self.relative / math.sqrt(2.0)

    def apply(self, x: Array, z: Array) -> Array:
        """The written value; not clipped."""
        return x + z * (self.relative / math.sqrt(2.0))


@dataclass(frozen=True)
class PowerDrift:
    """Structural relaxation: x(t) = x_written * ((t + t0) / t0)^-nu, nu = |mean(x) + spread(x) z|.

    `mean` and `spread` are curves of the *target* x; t counts from `t0` seconds after writing.
    """

    t0_s: float
    mean: Curve
    spread: Curve
    valid_age_s: float

    def exponent(self, target: Array, z: Array) -> Array:
        """nu of each device."""
        log = _ln(target)
        return abs(self.mean(target, log) + self.spread(target, log) * z)

    def apply(self, target: Array, written: Array, z: Array, age_s: float) -> Array:
        """The drifted value."""
        _aged("power_drift", age_s, self.valid_age_s)
        if age_s == 0.0:
            return written
        decades = math.log((age_s + self.t0_s) / self.t0_s)
        exponent = self.exponent(target, z) * -decades
        return written * (exponent.exp() if hasattr(exponent, "exp") else np.exp(exponent))


@dataclass(frozen=True)
class Relaxation:
    """Spread that grows after writing, known at a few ages only; between them nothing is claimed.

    Row k of `coefficients` (in units of `full_scale`) gives the total spread sigma_k(x) at
    ``ages_s[k]``; row 0 is the spread right after writing, already applied by the write law.
    Added at ages_s[k]: sqrt(max(sigma_k^2 - sigma_0^2, 0)) z. Up to ages_s[0] nothing changes.
    """

    ages_s: tuple[float, ...]
    coefficients: tuple[tuple[float, ...], ...]
    full_scale: float

    def added(self, target: Array, age_s: float) -> Array:
        """Spread added since writing, in units of full scale; refuses an age not measured."""
        if age_s not in self.ages_s:
            known = ", ".join(f"{a:g} s" for a in self.ages_s)
            raise UsageError(
                f"the noise law relaxation was measured at {known}, not at {age_s:g} s",
                mend=f"choose an age of: {known} (or 0)",
            )
        start, now = (
            _horner([c / self.full_scale for c in self.coefficients[k]], target)
            for k in (0, self.ages_s.index(age_s))
        )
        return (now * now - start * start).clip(min=0.0) ** 0.5

    def apply(self, target: Array, written: Array, z: Array, age_s: float) -> Array:
        """The relaxed value; never negative."""
        if 0.0 <= age_s <= self.ages_s[0]:
            return written
        return (written + self.added(target, age_s) * z).clip(min=0.0)


def _flicker(t_s: float, read_s: float) -> float:
    """sqrt(ln((t + t_read) / (2 t_read))): 1/f noise gathered from t_read to t; none before."""
    return math.sqrt(max(0.0, math.log((t_s + read_s) / (2.0 * read_s))))


@dataclass(frozen=True)
class FlickerRead:
    """1/f read noise: sigma = x_aged * Q(x) sqrt(ln((t + t0 + t_read) / (2 t_read))),
    Q(x) = min(coefficient / x^exponent, cap), x as written."""

    coefficient: float
    exponent: float
    cap: float
    t0_s: float
    read_s: float
    valid_age_s: float

    def sigma(self, written: Array, aged: Array, age_s: float) -> Array:
        """Standard deviation of a reading."""
        _aged("flicker_read", age_s, self.valid_age_s)
        q = (written.clip(min=_SMALLEST) ** -self.exponent * self.coefficient).clip(max=self.cap)
        return aged * q * _flicker(age_s + self.t0_s, self.read_s)


@dataclass(frozen=True)
class FlickerReadLog:
    """As `FlickerRead` with Q(x) a `Curve`."""

    curve: Curve
    t0_s: float
    read_s: float
    valid_age_s: float

    def sigma(self, written: Array, aged: Array, age_s: float) -> Array:
        """Standard deviation of a reading."""
        _aged("flicker_read_log", age_s, self.valid_age_s)
        return aged * self.curve(written).clip(min=0.0) * _flicker(age_s + self.t0_s, self.read_s)


@dataclass(frozen=True)
class Additive:
    """Output-referred read noise: sigma of an output = relative * full scale of that output."""

    relative: float

    def output_sigma(self) -> float:
        """Standard deviation in units of the output's full scale."""
        return self.relative


@dataclass(frozen=True)
class HomodyneShot:
    """Shot noise of balanced homodyne detection with a strong local oscillator.

    The quadrature of a field of N detected photons has amplitude sqrt(N) and standard deviation
    1/2, so an output of full scale `photons` has sigma = 1 / (2 sqrt(efficiency * photons)).
    """

    photons: float
    efficiency: float

    def output_sigma(self) -> float:
        """Standard deviation in units of the output's full scale amplitude."""
        return 0.5 / math.sqrt(self.efficiency * self.photons)


Law = (
    Polynomial
    | Gaussian
    | PowerDrift
    | Relaxation
    | FlickerRead
    | FlickerReadLog
    | Additive
    | HomodyneShot
)
