"""Rounds weight matrices to symmetric integer codes, with a search for the best clipping.

Plain rounding takes ``scale = max|w| / top`` with ``top = 2**(bits-1) - 1``. The search tries
``scale = ratio * max|w| / top`` and clips what does not fit: llm-compressor's ``mse`` observer
(maxshrink, norm 2.4). The norm is 2.5 here, because ``|e|**2.5 = e * e * sqrt(|e|)`` is correctly
rounded on every IEEE machine, so the same weights give the same codes everywhere; the best norm is
flat between 2 and 3. With input powers the norm is 2 and each input's error is weighted by its
mean square: the expected squared error of the output, were the inputs uncorrelated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pfmc import formats
from pfmc.errors import InputError, UsageError
from pfmc.formats import Format

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int8]

LOWEST_RATIO = 0.3
"""The strongest clipping tried, as a share of max|w|; 2 bits need this much."""
MARGIN = 1e-3
"""A clipping must better plain rounding by this share: more than float32 sums err."""
EXACT_ELEMENTS = 1 << 19
"""Matrices up to this size are searched on all their rows, finely; larger ones on a sample."""

_CHUNK = 1 << 16  # elements worked on at a time: a few such float32 arrays fit the L2 cache
_SMALLEST = np.float32(np.finfo(np.float32).tiny)


def top_of(bits: int) -> int:
    """The largest code of width `bits`: ``2**(bits-1) - 1``."""
    if not 2 <= bits <= 8:
        raise UsageError(f"{bits} bits a weight", mend="weight codes have 2 to 8 bits")
    return int(2 ** (bits - 1) - 1)


def groups_of(inputs: int, group: int) -> Iterator[slice]:
    """The rows of each scale group; the last may be shorter."""
    length = group or inputs
    return (slice(start, min(start + length, inputs)) for start in range(0, inputs, length))


def quantise(
    weight: npt.NDArray[Any],
    bits: int,
    group: int = 0,
    *,
    search: bool = True,
    input_power: npt.NDArray[np.float64] | None = None,
    form: Format | None = None,
) -> tuple[Codes, Floats]:
    """Rounds a matrix to codes; per group and output never worse than plain rounding.

    "Worse" is meant twice: in the sum that the search minimises and in the mean square error.
    Ties round to even. The result does not depend on the number of threads.

    Args:
        weight: floating point ``[in, out]``, any layout.
        bits: width of a code, 2 to 8.
        group: inputs that share a scale; 0 for all.
        search: whether clippings are tried; False is plain rounding.
        input_power: mean x² per input ``[in]``, which weights the errors.
        form: the codes' format, ``int`` of `bits` if absent; see `pfmc.formats`.

    Returns:
        codes int8 ``[in, out]`` of the format and scales float32 ``[groups, out]``, all positive
        (where every weight is zero 1, or the least that a format without a zero, or whose scales
        do not hold 1, can store).

    Raises:
        InputError: the matrix holds NaN or infinity; names the index.
        UsageError: `bits` is out of range.
    """
    form = (form or formats.of("int", bits)).bound(weight)
    inputs, outputs = weight.shape
    codes = np.empty((inputs, outputs), np.int8)
    slices = list(groups_of(inputs, group))
    scale = np.empty((len(slices), outputs), np.float32)
    for index, rows in enumerate(slices):
        power = None if input_power is None else _relative(input_power[rows])
        work = _Group(weight[rows], form, power, weight.size <= EXACT_ELEMENTS, rows.start)
        scale[index] = work.round(codes[rows], search)
    return codes, scale


def dequantise(codes: Codes, scale: Floats, group: int = 0) -> Floats:
    """``codes * scale``, float32 ``[in, out]``."""
    out = np.empty(codes.shape, np.float32)
    for index, rows in enumerate(groups_of(codes.shape[0], group)):
        np.multiply(codes[rows], scale[index], out=out[rows])
    return out


def _relative(power: npt.NDArray[np.float64]) -> Floats:
    """Input powers relative to their mean, none below 1e-6, so that no weight is free."""
    mean = float(power.mean()) if power.size else 0.0
    if not mean > 0.0 or not np.isfinite(mean):
        return np.ones(power.shape, np.float32)
    return np.maximum(power / mean, 1e-6).astype(np.float32)


@dataclass
class _Sums:
    """Errors per output, in units of the plain step: what is minimised, and the squares."""

    objective: Floats
    square: Floats

    def add(self, error: Floats, power: Floats | None) -> None:
        """Adds the errors ``[rows, out]``; `error` is destroyed."""
        square = error * error
        self.square += square.sum(axis=0)
        if power is None:
            np.sqrt(np.abs(error, out=error), out=error)
            square *= error
        else:
            square *= power[:, None]
        self.objective += square.sum(axis=0)


@dataclass
class _Group:
    """The rows of one scale group ``[rows, out]``."""

    weight: npt.NDArray[Any]
    form: Format
    power: Floats | None
    exact: bool
    first_row: int
    step: Floats = field(init=False)

    def round(self, codes: Codes, search: bool) -> Floats:
        """Fills `codes`; returns the scale per output."""
        peak = self._peak()
        self.step = np.maximum(self.form.plain(peak), _SMALLEST)
        if self.form.name != "midrise" and self.form.scales != "e4m3":
            self.step = np.where(peak > 0, self.step, np.float32(1.0))
        if not search:
            self._fill(codes, self.step)
            return self.step
        scale = np.maximum(self.form.lattice(self.step * self._search()), _SMALLEST)
        plain, chosen = self._fill_and_compare(codes, scale)
        worse = (chosen.objective > plain.objective * np.float32(1 - MARGIN)) | (
            chosen.square > plain.square * np.float32(1 - MARGIN)
        )
        return self._fall_back(codes, scale, worse)

    def _chunks(self) -> Iterator[tuple[slice, Floats]]:
        rows = max(1, _CHUNK // max(1, self.weight.shape[1]))
        for start in range(0, self.weight.shape[0], rows):
            part = slice(start, start + rows)
            yield part, self.weight[part].astype(np.float32)

    def _peak(self) -> Floats:
        peak = np.zeros(self.weight.shape[1], np.float32)
        for part, values in self._chunks():
            np.abs(values, out=values)
            np.maximum(peak, values.max(axis=0), out=peak)  # hands on NaN
            if not np.isfinite(peak).all():
                self._refuse(part, values)
        return peak

    def _refuse(self, part: slice, values: Floats) -> None:
        row, column = (int(i) for i in np.argwhere(~np.isfinite(values))[0])
        index = [self.first_row + part.start + row, column]
        raise InputError(
            f"a weight holds {self.weight[part.start + row, column]}",
            where=f"index {index} of the matrix [in, out]",
            mend="mend the checkpoint: no hardware can hold this number",
        )

    def _fill(self, codes: Codes, scale: Floats) -> None:
        for part, values in self._chunks():
            codes[part] = self._codes(values, scale)

    def _codes(self, values: Floats, scale: Floats) -> Floats:
        return np.asarray(self.form.codes(np.divide(values, scale)), np.float32)

    def _fill_and_compare(self, codes: Codes, scale: Floats) -> tuple[_Sums, _Sums]:
        outputs = self.weight.shape[1]
        plain, chosen = (_Sums(*np.zeros((2, outputs), np.float32)) for _ in range(2))
        ratio = scale / self.step
        for part, values in self._chunks():
            power = None if self.power is None else self.power[part]
            found = self._codes(values, scale)
            codes[part] = found
            values /= self.step
            found *= ratio
            chosen.add(np.subtract(values, found, out=found), power)
            np.copyto(found, values)
            self.form.codes(found)
            plain.add(np.subtract(values, found, out=values), power)
        return plain, chosen

    def _fall_back(self, codes: Codes, scale: Floats, worse: npt.NDArray[np.bool_]) -> Floats:
        """Plain rounding for the outputs that are `worse`."""
        scale = np.where(worse, self.step, scale)
        columns = np.flatnonzero(worse)
        if columns.size:
            for start in range(0, self.weight.shape[0], 256):
                rows = slice(start, start + 256)
                values = self.weight[rows][:, columns].astype(np.float32)
                codes[rows, columns] = self._codes(values, self.step[columns])
        return scale

    # -- the search -----------------------------------------------------------------------------

    def _search(self) -> Floats:
        """The best ratio per output, judged on every n-th row and on the largest weight."""
        count = self.weight.shape[0]
        stride = 1 if self.exact else max(1, count // min(256, max(64, count // 8)))
        sample = self.weight[::stride]
        power = None if self.power is None else self.power[::stride, None]
        best = np.ones(self.weight.shape[1], np.float32)
        width = max(16, _CHUNK // max(1, len(sample)))
        for start in range(0, len(best), width):
            columns = slice(start, start + width)
            values = np.abs(sample[:, columns].astype(np.float32))
            values /= self.step[columns]
            trial = _Trial(values, self.form, power, (count - 1) / len(sample) * (stride > 1))
            best[columns] = trial.best(0.0125 if self.exact else 0.05)
        return best


@dataclass(frozen=True)
class _Trial:
    """Tries ratios on magnitudes ``values[rows, out]`` in units of the plain step.

    Attributes:
        share: rows that a sampled row stands for; 0 if all rows are there and none is sampled.
    """

    values: Floats
    form: Format
    power: Floats | None
    share: float

    def best(self, step: float) -> Floats:
        """The ratio of least error per output: a scan of step `step`, then two finer looks."""
        found = np.ones(self.values.shape[1], np.float32)
        least = self._objective(found)
        if self.form.scales == "power":
            for power in (2.0, 0.5):
                self._consider(np.full_like(found, power), found, least)
            return found
        for index in range(1, round((1 - LOWEST_RATIO) / step) + 1):
            self._consider(np.full_like(found, 1 - index * step), found, least)
        for finer in (step / 2, step / 4):
            centre = found.copy()
            for ratio in (centre + np.float32(finer), centre - np.float32(finer)):
                self._consider(np.clip(ratio, LOWEST_RATIO, 1.0), found, least)
        return found

    def _consider(self, ratio: Floats, found: Floats, least: Floats) -> None:
        """Takes `ratio` into `found` and `least` where it is better."""
        error = self._objective(ratio)
        better = error < least
        found[better] = ratio[better]
        least[better] = error[better]

    def _objective(self, ratio: Floats) -> Floats:
        error = self.values / ratio
        self.form.snap(error)
        error *= ratio
        np.subtract(self.values, error, out=error)
        sums = _Sums(*np.zeros((2, error.shape[1]), np.float32))
        sums.add(error, None if self.power is None else self.power[:, 0])
        if not self.share:
            return sums.objective
        outlier: Floats = np.float32(self.form.top) * (np.float32(1) - ratio)  # the largest weight
        square = outlier * outlier
        if self.power is None:
            square *= np.sqrt(outlier)
        objective: Floats = sums.objective * np.float32(self.share)
        objective += square
        return objective


# -- input ranges ----------------------------------------------------------------------------------


def best_range(quantiles: Mapping[float, float], peak: float, top: float) -> float:
    """The range ±r of an input converter with the least mean square error.

    Inside, a step of ``r / top`` errs by ``step² / 12`` (or by x² where x is below half a step);
    outside, clipping errs by ``(|x| - r)²``. |x| is taken to lie midway between its quantiles.

    Args:
        quantiles: probability -> |x|.
        peak: largest |x|.
        top: largest code, ``2**(bits-1) - 1``.
    """
    if not peak > 0:
        return 0.0
    known = sorted({**quantiles, 0.0: 0.0, 1.0: peak}.items())
    chance, value = np.array(known, np.float64).T
    mass = np.diff(chance)
    middle = np.minimum((value[1:] + value[:-1]) / 2, peak)
    ranges = peak * np.linspace(1.0, 0.05, 96)[:, None]
    step = ranges / top
    inside = np.where(middle < step / 2, middle**2, step**2 / 12)
    outside = np.maximum(middle - ranges, 0.0) ** 2
    error = (mass * np.where(middle > ranges, outside, inside)).sum(axis=1)
    return float(ranges[int(np.argmin(error)), 0])


def quantile(quantiles: Mapping[float, float], peak: float, chance: float) -> float:
    """|x| below which a share `chance` lies, between the known quantiles by a straight line."""
    known = sorted({**quantiles, 0.0: 0.0, 1.0: peak}.items())
    place, value = np.array(known, np.float64).T
    return float(np.interp(chance, place, value))


def share_above(quantiles: Mapping[float, float], peak: float, reach: float) -> float:
    """The share of |x| above `reach`, between the known quantiles by a straight line."""
    known = sorted({**quantiles, 0.0: 0.0, 1.0: peak}.items())
    place, value = np.array(known, np.float64).T
    return float(1.0 - np.interp(reach, np.maximum.accumulate(value), place)) if reach else 0.0


# -- two codes a byte ------------------------------------------------------------------------------


def pack_int4(codes: Codes) -> npt.NDArray[np.uint8]:
    """Codes within ±8 as two a byte, low nibble first, in C order: the ONNX layout of int4.

    Args:
        codes: int8 of any shape; an odd last code is padded with zero.

    Returns:
        uint8 ``[ceil(codes.size / 2)]``.
    """
    flat = np.ascontiguousarray(codes).reshape(-1)
    if flat.size % 2:
        flat = np.append(flat, np.int8(0))
    pairs = flat.view("<u2")
    packed = pairs >> 4
    packed &= 0xF0
    packed |= pairs & 0x0F
    return packed.astype(np.uint8)


def unpack_int4(packed: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> Codes:
    """The codes of `pack_int4`, int8 of `shape`."""
    pairs = np.ascontiguousarray(packed).reshape(-1).view(np.int8)
    codes = np.empty((pairs.size, 2), np.int8)
    np.left_shift(pairs, 4, out=codes[:, 0])
    codes[:, 0] >>= 4
    np.right_shift(pairs, 4, out=codes[:, 1])
    return codes.reshape(-1)[: int(np.prod(shape))].reshape(shape)
