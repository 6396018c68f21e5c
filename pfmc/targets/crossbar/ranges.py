"""The range of a tile's output converters, from calibration statistics or from the worst case.

Everything is in units of (one input code) * (one full conductance), so that a column whose pair
is at g_max and whose input is at code c gives c.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]

_MULTIPLES = np.geomspace(0.5, 8.0, 25)
"""Candidate ranges as multiples of the largest column deviation of the tile."""


@dataclass(frozen=True)
class Range:
    """The range (largest code stands for it), the mean share of samples that clip, and the mean
    square error of a sample in weighted units, over the mean square of the samples."""

    value: float
    clip_fraction: float
    error: float


def _tail(a: Doubles) -> Doubles:
    """P(z > a) of a standard normal z, for a >= 0 (Abramowitz and Stegun 7.1.26, 1.5e-7)."""
    t = 1.0 / (1.0 + 0.3275911 * a / math.sqrt(2.0))
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (
        -1.453152027 + t * 1.061405429))))  # fmt: skip
    tail: Doubles = 0.5 * poly * np.exp(-0.5 * a * a)
    return tail


def _excess(a: Doubles) -> Doubles:
    """E[(|z| - a)^2; |z| > a] of a standard normal z: what clipping at a loses."""
    density = np.exp(-0.5 * a * a) / math.sqrt(2.0 * math.pi)
    lost: Doubles = np.maximum(2.0 * ((1.0 + a * a) * _tail(a) - a * density), 0.0)
    return lost


def worst(row_sums: Doubles, largest_code: int) -> float:
    """The range no input can leave: largest sum of |w / s| over a column times the largest code."""
    return float(row_sums.max(initial=0.0)) * largest_code


def best(deviation: Doubles, weight: Doubles, steps: int, headroom: float, limit: float) -> Range:
    """The range of least mean square error of Gaussian column currents, times `headroom`.

    With range r and step = r / steps, a column of deviation s has the mean square error
    step²/12 + s² E[(|z| - r/s)²; |z| > r/s]; columns count by the square of their weight scale.

    Args:
        deviation: standard deviation of each column, ``[columns]``.
        weight: the columns' weight scales, ``[columns]``.
        steps: largest code of a sample.
        headroom: factor on the best range.
        limit: the worst case; no range is larger.
    """
    used = (deviation > 0) & (weight > 0)
    if not used.any():
        return Range(max(limit, 1.0), 0.0, 0.0)
    s, w = deviation[used], np.square(weight[used])
    candidates = s.max() * _MULTIPLES
    costs = (w * _error(s, candidates[:, None], steps)).sum(axis=1)
    return given(deviation, weight, steps, min(float(candidates[costs.argmin()]) * headroom, limit))


def given(deviation: Doubles, weight: Doubles, steps: int, value: float) -> Range:
    """The range `value`, and what it loses; arguments as of `best`."""
    used = (deviation > 0) & (weight > 0)
    if not used.any():
        return Range(value, 0.0, 0.0)
    s, w = deviation[used], np.square(weight[used])
    clipped = 2.0 * _tail(value / s)
    noise = float((w * _error(s, np.array(value), steps)).sum() / (w * s * s).sum())
    return Range(value, float(clipped.mean()), noise)


def _error(s: Doubles, value: Doubles, steps: int) -> Doubles:
    result: Doubles = np.square(value / steps) / 12.0 + np.square(s) * _excess(value / s)
    return result
