"""Rounds one layer by the search asked for, and keeps the best of what was tried on its outputs.

Error of a layer: ``tr(E^T C E) / tr(W^T C W)`` with ``E = W - Ŵ`` and C the second moment of its
inputs, or with C's diagonal where only input powers are known: the share of the output's power
that is wrong on the calibration data. Where the inputs come from layers that are rounded
already, ``E`` is what remains of ``X W - X̃ Ŵ`` (`Seen.target`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pfmc import compensation, rounding
from pfmc.formats import Format
from pfmc.hardware import QuantisedMatrix
from pfmc.rounding import Codes, Floats

Search = Literal["plain", "clip", "compensate", "learned"]
Doubles = npt.NDArray[np.float64]

_COLUMNS = 1024  # worked on at a time
ASYMMETRY_DAMPING = 0.02
"""Added to the diagonal of the second moment of rounded inputs, as a share of its mean; beside it
inputs per position seen: few positions say little about many inputs."""


@dataclass(frozen=True)
class Seen:
    """What calibration knows of a layer's inputs.

    Attributes:
        power: mean x² per input, or None.
        moment: mean x xᵀ, or None; of the rounded inputs where they are known.
        cross: mean of x̃ xᵀ, rounded inputs by float inputs, or None.
        samples: positions that the means are of; 0 for very many.
    """

    power: Doubles | None = None
    moment: Doubles | None = None
    cross: Doubles | None = None
    samples: int = 0

    @property
    def tells(self) -> bool:
        """Whether some input was seen to be other than zero; else every rounding looks perfect."""
        power = self.power if self.moment is None else np.diagonal(self.moment)
        return power is not None and bool((power > 0).any())

    @property
    def damping(self) -> float:
        """λ of `target`, as a share of the mean power of the rounded inputs."""
        if self.moment is None or not self.samples:
            return ASYMMETRY_DAMPING
        return ASYMMETRY_DAMPING + len(self.moment) / self.samples

    def target(self, weight: npt.NDArray[Any], spare: bool = False) -> npt.NDArray[Any]:
        """The matrix that gives the float outputs from rounded inputs best; `weight` if unknown.

        A `spare` float32 weight is overwritten by it.

        ``W + (C̃ + λI)^-1 (D - C̃) W`` with ``D = X̃^T X``: the least-squares answer to
        ``|X W - X̃ Z|² + λ|W - Z|²`` (the correction of GPTAQ arXiv:2504.02692 and Qronos
        arXiv:2505.11695, taken before rounding).
        """
        if self.cross is None or self.moment is None:
            return weight
        damped = self.moment.copy()
        power = np.diagonal(damped)
        np.fill_diagonal(damped, power + self.damping * power.mean())
        try:
            shift = np.linalg.solve(damped, self.cross - self.moment)
        except np.linalg.LinAlgError:
            return weight
        if not np.isfinite(shift).all():
            return weight
        moved = weight if spare else np.empty(weight.shape, np.float32)
        for start in range(0, weight.shape[1], _COLUMNS):  # one copy in memory, no wider ones
            part = weight[:, start : start + _COLUMNS].astype(np.float64)
            moved[:, start : start + _COLUMNS] = part + shift @ part
        return moved


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is to be rounded; group 0 is per channel."""

    form: Format
    group: int
    search: Search


@dataclass(frozen=True)
class _Tried:
    name: str
    codes: Codes
    scale: Floats
    error: float


def round_layer(
    weight: npt.NDArray[Any],
    form: Format,
    group: int,
    search: Search,
    seen: Seen | None = None,
    progress: Callable[[str], None] | None = None,
    spare: bool = False,
) -> QuantisedMatrix:
    """Rounds ``weight[in, out]``; never worse on `seen` than plain rounding.

    ``learned`` starts from what is found here (`pfmc.distill.learned`), so it is ``compensate``.

    Args:
        weight: floating point.
        form: number format.
        group: inputs that share a scale; 0 for all. A format with blocks of its own overrides it.
        search: the strongest search to try.
        seen: calibration; without it, or of inputs that were all zero, clipping is judged on the
            weights alone.
        progress: takes a line if something asked for cannot be done.
        spare: whether `weight`, float32, may be overwritten: large ones then need no copy.

    Returns:
        codes, scales, the name of the search that won, and the errors of all that were tried.

    Raises:
        InputError: the matrix holds NaN or infinity.
    """
    seen = seen if seen is not None and seen.tells else Seen()
    judge = _Judge(weight, seen)
    goal = judge.goal = seen.target(weight, spare)
    form = form.bound(goal)
    group = form.block or group
    tried: list[_Tried] = []
    if search == "plain" or judge.knows:
        tried.append(_rounded(goal, form, group, "plain", seen, judge))
    if search != "plain":
        tried.append(_rounded(goal, form, group, "clip", seen, judge))
    found = {f"{t.name}_error_relative": t.error for t in tried if judge.knows}
    if search in ("compensate", "learned"):
        if tried[0].error > tried[-1].error:
            del tried[0]
        more = _compensated(goal, form, group, seen, judge, tried[-1], progress)
        found |= {f"{t.name}_error_relative": t.error for t in more}
        tried += more
    best = min(tried, key=lambda t: t.error)  # the first, so plain, on equality
    tried.clear()
    if judge.knows:
        found["code_error_relative"] = best.error
    return QuantisedMatrix(
        best.codes, form.bits, best.scale, group or int(weight.shape[0]), found, form.name,
        best.name, form.unit,
    )  # fmt: skip


def _rounded(
    goal: npt.NDArray[Any], form: Format, group: int, name: str, seen: Seen, judge: _Judge
) -> _Tried:
    power = seen.power
    if seen.moment is not None:
        power = np.diagonal(seen.moment).copy()
    codes, scale = rounding.quantise(
        goal, form.bits, group, search=name != "plain", input_power=power, form=form
    )
    return _Tried(name, codes, scale, judge.error(codes, scale, group))


def _compensated(
    goal: npt.NDArray[Any], form: Format, group: int, seen: Seen, judge: _Judge,
    clip: _Tried, progress: Callable[[str], None] | None,
) -> list[_Tried]:  # fmt: skip
    if seen.moment is None:
        if progress:
            progress("no second moments, clip search kept")
        return []
    done = compensation.compensate(
        goal, form.bits, group, moment=seen.moment, form=form, start=(clip.codes, clip.scale),
    )  # fmt: skip
    if done.failed:
        if progress:
            progress("moments not definite, clip search kept")
        return []
    error = judge.error(done.codes, done.scale, group)
    return [_Tried("compensate", done.codes, done.scale, error)]


class _Judge:
    """Errors relative to the layer's output power, by what is known of its inputs."""

    def __init__(self, weight: npt.NDArray[Any], seen: Seen) -> None:
        self.goal = weight
        self.moment, self.power = seen.moment, seen.power
        self.knows = seen.moment is not None or seen.power is not None
        self.output = self._form(np.asarray(weight)) if self.knows else 1.0

    def _form(self, values: npt.NDArray[Any]) -> float:
        """``tr(V^T C V)``."""
        total = 0.0
        for start in range(0, values.shape[1], _COLUMNS):
            part = values[:, start : start + _COLUMNS].astype(np.float64)
            if self.moment is not None:
                total += float((part * (self.moment @ part)).sum())
            elif self.power is not None:
                total += float(self.power @ (part * part).sum(axis=1))
            else:
                total += float((part * part).sum())
        return total

    def error(self, codes: Codes, scale: Floats, group: int) -> float:
        """Of a rounding; without calibration the sum of squares."""
        total = 0.0
        for start in range(0, codes.shape[1], _COLUMNS):
            part = slice(start, start + _COLUMNS)
            held = rounding.dequantise(codes[:, part], scale[:, part], group)
            total += self._form(self.goal[:, part] - held.astype(np.float64))
        return total / self.output if self.output > 0 else total
