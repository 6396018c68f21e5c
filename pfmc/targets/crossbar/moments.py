"""Mean and spread of what a pair of devices holds, as functions of its weight.

Training draws millions of devices at every step and needs of each pair one number: its error. That
takes a hundred operations a weight by the laws, and two look-ups and one normal number by their
moments. Simulation and judging run the laws (`conductance.die_conductances`, `train.CrossbarTwin`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from pfmc.noise import NoiseModel, generator

Floats = npt.NDArray[np.float32]

POINTS = 4097
"""Weights from 0 to 1 at which moments are told: 8-bit codes lie at most 1/8192 beside one."""
_RUN = 257
"""Weights at which the laws are run; straight lines in between."""
_PAIRS = 4096
"""Pairs that the laws are run on for each weight."""


@dataclass(frozen=True)
class Moments:
    """Of the pair (g_plus - g_minus) / (g_max - g_min) for |w| / s of 0 … 1, float32 ``[POINTS]``.

    Attributes:
        error: mean of the aged pair, less |w| / s; its sign is the weight's.
        spread: standard deviation of the aged pair, one reading included if asked for.
        written, aged: mean magnitude as written and as aged, for drift compensation.
    """

    error: Floats
    spread: Floats
    written: Floats
    aged: Floats


@lru_cache(maxsize=16)
def moments(laws: NoiseModel, floor: float, age_s: float, reading: bool) -> Moments:
    """Runs the laws on pairs of many weights.

    The normal numbers of each law are stratified (quantiles in random order), the same for every
    weight, so that all four are smooth; two laws may correlate by about 1 / 64.

    Args:
        laws: of the technology. floor: g_min / g_max. age_s: seconds since writing.
        reading: whether `spread` holds one reading, too.

    Raises:
        UsageError: the age or a conductance lies outside what a law holds for.
    """
    rng, count, span = generator(0, "moments", "pair"), len(laws.write) + len(laws.age), 1.0 - floor
    quantiles = ndtri((np.arange(_PAIRS) + 0.5) / _PAIRS)
    normal = (quantiles / quantiles.std()).astype(np.float32)
    draws = [[normal[rng.permutation(_PAIRS)] for _ in range(count)] for _ in range(2)]

    def device(target: float, drawn: list[Floats]) -> tuple[Floats, Floats]:
        aimed, writes = np.full(_PAIRS, target, np.float32), len(laws.write)
        return laws.lived(aimed, drawn[:writes], drawn[writes:], age_s)

    idle = device(floor, draws[1])
    weights = np.linspace(0.0, 1.0, _RUN)
    found = []
    for weight in weights:
        held = device(floor + span * weight, draws[0])
        written, aged = ((a - b) / span for a, b in zip(held, idle, strict=True))
        variance = aged.var()
        for state in (held, idle) if reading else ():
            variance += np.square(laws.read_sigma(*state, age_s)).mean() / span**2
        error, spread = aged.mean() - weight, np.sqrt(variance)
        found.append((error, spread, abs(written).mean(), abs(aged).mean()))
    fine = np.linspace(0.0, 1.0, POINTS)
    lines = (np.interp(fine, weights, f).astype(np.float32) for f in zip(*found, strict=True))
    return Moments(*lines)
