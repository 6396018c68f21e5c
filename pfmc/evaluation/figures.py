"""Numbers with their intervals: over documents (paired, mean of the dies) and over dies.

Intervals are 95 %, Student's t over the mean; that of a rank correlation is a seeded bootstrap over
pairs (Efron and Tibshirani 1993, chapter 13). A document is what is taken to be independent: a
window of text, a sentence, a pair of sentences, an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pfmc.distill.measure import RESAMPLES, mean_estimate

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        name, unit: what it is; value: mean over dies and documents.
        low, high: 95 % interval over documents; None where there are too few.
        dies: the value of each die, in order; die_low, die_high: 95 % interval over dies.
        better: ``lower``, ``higher`` or "".
    """

    name: str
    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None
    dies: tuple[float, ...] = ()
    die_low: float | None = None
    die_high: float | None = None
    better: str = ""

    @property
    def worst(self) -> float:
        """The worst die's value."""
        values = self.dies or (self.value,)
        return min(values) if self.better == "higher" else max(values)

    @property
    def die_sd(self) -> float | None:
        """Standard deviation over dies; None from a single die."""
        return float(np.std(self.dies, ddof=1)) if len(self.dies) > 1 else None

    def json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**vars(self), "dies": list(self.dies), "worst": self.worst, "die_sd": self.die_sd}


def _ends(values: Array, through: Callable[[float], float]) -> tuple[float | None, float | None]:
    found = mean_estimate(values)
    if not math.isfinite(found.low):
        return None, None
    return through(found.low), through(found.high)


def mean_figure(
    name: str, per_die: Sequence[Array], unit: str = "", better: str = "",
    through: Callable[[float], float] = float,
) -> Figure:  # fmt: skip
    """The mean of ``[documents]`` arrays, one a die; `through` (say exp) maps means to figures."""
    table = np.stack([np.asarray(a, np.float64) for a in per_die])
    low, high = _ends(table.mean(axis=0), through)
    die_low, die_high = _ends(table.mean(axis=1), through)
    dies = tuple(through(float(m)) for m in table.mean(axis=1))
    value = through(float(table.mean()))
    return Figure(name, value, unit, low, high, dies, die_low, die_high, better)


def rank_figure(name: str, per_die: Sequence[Array], scores: Array) -> Figure:
    """Spearman's rho of similarities ``[pairs]``, one array a die, with people's `scores`."""
    values = tuple(spearman(a, scores) for a in per_die)
    drawn = _bootstrap(lambda rows: np.mean([spearman(a[rows], scores[rows]) for a in per_die]),
                       len(scores))  # fmt: skip
    die_low, die_high = _ends(np.array(values), float)
    return Figure(name, float(np.mean(values)), "", *drawn, values, die_low, die_high, "higher")


def difference_figure(name: str, per_die: Sequence[Array], truth: Array, scores: Array) -> Figure:
    """rho of each die's similarities minus rho of the float model's, on the same pairs."""

    def difference(rows: Array) -> float:
        ours = np.mean([spearman(a[rows], scores[rows]) for a in per_die])
        return float(ours - spearman(truth[rows], scores[rows]))

    whole = np.arange(len(scores))
    dies = tuple(spearman(a, scores) - spearman(truth, scores) for a in per_die)
    low, high = _bootstrap(difference, len(scores))
    return Figure(name, difference(whole), "", low, high, dies, better="higher")


def spearman(similar: Array, scores: Array) -> float:
    """Spearman's rank correlation; NaN where one side is constant."""
    from scipy.stats import rankdata

    a, b = rankdata(similar), rankdata(scores)
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(float((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm else math.nan


def _bootstrap(measure: Callable[[Array], Any], count: int) -> tuple[float | None, float | None]:
    if count < 4:
        return None, None
    rng = np.random.default_rng(0)
    drawn = [measure(rng.integers(0, count, count)) for _ in range(RESAMPLES // 5)]
    if np.isnan(drawn).all():
        return None, None
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return float(low), float(high)
