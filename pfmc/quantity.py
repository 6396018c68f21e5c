"""Numbers with their unit, their spread and their source: `Unit`, `Quantity`, `Estimate`.

Units live at the edges only: technology files state them, reports print them. Inside, numbers
are SI floats in unit-suffixed names. An `Estimate` is a low/typical/high triple that follows
interval arithmetic, refuses mixed dimensions, and remembers which constants went into it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

from pfmc.errors import UsageError, did_you_mean

Dims = tuple[int, int, int, int, int, int]
"""Exponents of metre, kilogram, second, ampere, kelvin and US dollar."""

NONE: Final[Dims] = (0, 0, 0, 0, 0, 0)

_PREFIX: Final = {
    "": 1.0, "z": 1e-21, "a": 1e-18, "f": 1e-15, "p": 1e-12, "n": 1e-9, "u": 1e-6, "m": 1e-3,
    "c": 1e-2, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15,
}  # fmt: skip
_BASE: Final[dict[str, tuple[float, Dims]]] = {
    "m": (1.0, (1, 0, 0, 0, 0, 0)),
    "g": (1e-3, (0, 1, 0, 0, 0, 0)),
    "s": (1.0, (0, 0, 1, 0, 0, 0)),
    "A": (1.0, (0, 0, 0, 1, 0, 0)),
    "K": (1.0, (0, 0, 0, 0, 1, 0)),
    "USD": (1.0, (0, 0, 0, 0, 0, 1)),
    "Hz": (1.0, (0, 0, -1, 0, 0, 0)),
    "J": (1.0, (2, 1, -2, 0, 0, 0)),
    "W": (1.0, (2, 1, -3, 0, 0, 0)),
    "C": (1.0, (0, 0, 1, 1, 0, 0)),
    "V": (1.0, (2, 1, -3, -1, 0, 0)),
    "F": (1.0, (-2, -1, 4, 2, 0, 0)),
    "ohm": (1.0, (2, 1, -3, -2, 0, 0)),
    "S": (1.0, (-2, -1, 3, 2, 0, 0)),
    "eV": (1.602176634e-19, (2, 1, -2, 0, 0, 0)),
    "l": (1e-3, (3, 0, 0, 0, 0, 0)),
}
_PLAIN: Final[dict[str, tuple[float, Dims]]] = {
    "1": (1.0, NONE), "%": (1e-2, NONE), "dB": (1.0, NONE), "rad": (1.0, NONE),
    "min": (60.0, (0, 0, 1, 0, 0, 0)), "h": (3600.0, (0, 0, 1, 0, 0, 0)),
    "day": (86400.0, (0, 0, 1, 0, 0, 0)), "year": (31557600.0, (0, 0, 1, 0, 0, 0)),
    "deg": (0.017453292519943295, NONE), "byte": (8.0, NONE), "B": (8.0, NONE),
}  # fmt: skip
_COUNTS: Final = frozenset(
    {
        "bit", "weight", "MAC", "op", "sample", "symbol", "token", "tok", "voxel", "pixel", "plane",
        "cell", "level", "layer", "mask", "wafer", "die", "user", "cycle", "param", "parameter",
        "conversion", "step", "photon", "electron", "transistor", "tile", "row", "column", "mode",
        "access", "word", "volume", "inference", "device", "event", "use",
    }
)  # fmt: skip
_FACTOR = re.compile(r"([A-Za-z%]+|1)\^?(-?\d+)?")


@dataclass(frozen=True)
class Unit:
    """A unit: its factor to SI and its dimensions. Counts and bits have no dimension."""

    text: str
    factor: float
    dims: Dims


def _atom(name: str, text: str) -> tuple[float, Dims]:
    if name in _PLAIN:
        return _PLAIN[name]
    if name in _BASE:
        return _BASE[name]
    if name in _COUNTS or name.rstrip("s") in _COUNTS:
        return 1.0, NONE
    if name[0] in _PREFIX and (rest := name[1:]):
        if rest in _BASE:
            factor, dims = _BASE[rest]
            return _PREFIX[name[0]] * factor, dims
        if rest in _COUNTS or rest in ("byte", "B"):
            return _PREFIX[name[0]] * _PLAIN.get(rest, (1.0, NONE))[0], NONE
    raise UsageError(
        f"unknown unit {name!r} in {text!r}", mend=did_you_mean(name, [*_BASE, *_PLAIN, *_COUNTS])
    )


@lru_cache(maxsize=512)
def unit(text: str) -> Unit:
    """Parses a unit such as ``pJ/sample``, ``um2``, ``1/cm2`` or ``W/mm2``.

    Raises:
        UsageError: a unit is unknown; the message says which and names the nearest.
    """
    factor, dims = 1.0, NONE
    for position, part in enumerate(text.replace(" ", "").split("/")):
        for atom in part.replace("*", ".").split("."):
            match = _FACTOR.fullmatch(atom)
            if not match:
                raise UsageError(f"cannot read the unit {text!r}", mend="write it like 'pJ/bit'")
            power = int(match[2] or 1) * (-1 if position else 1)
            base, base_dims = _atom(match[1], text)
            factor *= base**power
            dims = _add(dims, base_dims, power)
    return Unit(text, factor, dims)


def _add(left: Dims, right: Dims, times: int = 1) -> Dims:
    a = [x + times * y for x, y in zip(left, right, strict=True)]
    return (a[0], a[1], a[2], a[3], a[4], a[5])


@dataclass(frozen=True)
class Estimate:
    """Low, typical and high of a derived number in SI, with the constants it came from.

    Arithmetic is interval arithmetic on positive quantities (low <= typical <= high); adding
    different dimensions raises `ValueError`. `constants` names every technology constant used.
    """

    low: float
    typical: float
    high: float
    dims: Dims = NONE
    constants: frozenset[str] = field(default_factory=frozenset)

    @staticmethod
    def exact(value: float, text: str = "1") -> Estimate:
        """An exactly known number in unit `text`."""
        parsed = unit(text)
        v = value * parsed.factor
        return Estimate(v, v, v, parsed.dims)

    def __add__(self, other: Estimate | float) -> Estimate:
        o = _lift(other)
        if o.dims != self.dims and (o.high or o.low) and (self.high or self.low):
            raise ValueError(f"adding different dimensions: {self.dims} and {o.dims}")
        dims = self.dims if (self.high or self.low) else o.dims
        return Estimate(
            self.low + o.low, self.typical + o.typical, self.high + o.high,
            dims, self.constants | o.constants,
        )  # fmt: skip

    __radd__ = __add__

    def __sub__(self, other: Estimate | float) -> Estimate:
        o = _lift(other)
        return self + Estimate(-o.high, -o.typical, -o.low, o.dims, o.constants)

    def __mul__(self, other: Estimate | float) -> Estimate:
        o = _lift(other)
        ends = [a * b for a in (self.low, self.high) for b in (o.low, o.high)]
        return Estimate(
            min(ends), self.typical * o.typical, max(ends),
            _add(self.dims, o.dims), self.constants | o.constants,
        )  # fmt: skip

    __rmul__ = __mul__

    def __truediv__(self, other: Estimate | float) -> Estimate:
        return self * _lift(other).inverse()

    def __rtruediv__(self, other: float) -> Estimate:
        return _lift(other) * self.inverse()

    def inverse(self) -> Estimate:
        """``1 / self``; raises ZeroDivisionError if the interval touches zero."""
        negated = _add(NONE, self.dims, -1)
        return Estimate(1 / self.high, 1 / self.typical, 1 / self.low, negated, self.constants)

    def power(self, exponent: int) -> Estimate:
        """``self ** exponent`` for an integer exponent of a positive quantity."""
        ends = sorted((self.low**exponent, self.high**exponent))
        return Estimate(
            ends[0], self.typical**exponent, ends[1],
            _add(NONE, self.dims, exponent), self.constants,
        )  # fmt: skip

    def at_least(self, other: Estimate | float) -> Estimate:
        """The larger of the two, end by end."""
        o = _lift(other)
        return Estimate(
            max(self.low, o.low), max(self.typical, o.typical), max(self.high, o.high),
            self.dims, self.constants | o.constants,
        )  # fmt: skip

    def to(self, text: str) -> tuple[float, float, float]:
        """Low, typical, high in unit `text`.

        Raises:
            ValueError: the unit has other dimensions.
        """
        parsed = unit(text)
        if parsed.dims != self.dims and (self.high or self.low):
            raise ValueError(f"{text!r} does not measure dimensions {self.dims}")
        f = parsed.factor
        return self.low / f, self.typical / f, self.high / f


def _lift(value: Estimate | float) -> Estimate:
    return value if isinstance(value, Estimate) else Estimate(value, value, value)


GRADES: Final = (
    "published", "measured", "derived", "secondary", "news", "abstract", "assumed", "design",
    "recall", "full", "figure",
)  # fmt: skip


@dataclass(frozen=True)
class Quantity:
    """A constant as a technology file states it: value, range, unit, source and grade.

    `values` has one entry for a scalar, several for a coefficient list. Grades are those of
    ``targets/README.md``; ``design`` marks a free choice of the designer, whose range is itself.
    """

    name: str
    values: tuple[float, ...]
    low: float
    high: float
    unit: Unit
    source: str
    grade: str

    @property
    def value(self) -> float:
        """The typical value in the stated unit; for a scalar."""
        return self.values[0]

    @property
    def si(self) -> float:
        """The typical value in SI; for a scalar."""
        return self.values[0] * self.unit.factor

    @property
    def estimate(self) -> Estimate:
        """Low/typical/high in SI, carrying the constant's name."""
        f = self.unit.factor
        return Estimate(
            self.low * f, self.value * f, self.high * f, self.unit.dims, frozenset({self.name})
        )


_KEYS: Final = frozenset({"value", "range", "unit", "source", "grade", "note"})


def read_quantity(name: str, table: Mapping[str, object]) -> Quantity:
    """Reads one constant of a technology file.

    Raises:
        UsageError: a key is unknown or missing, the range does not hold the value, the unit or
            the grade is unknown, or the source is empty.
    """
    for key in table:
        if key not in _KEYS:
            raise UsageError(f"unknown key {key!r}", where=name, mend=did_you_mean(key, _KEYS))
    for key in ("value", "unit", "source", "grade"):
        if not table.get(key) and table.get(key) != 0:
            raise UsageError(f"the constant has no {key}", where=name, mend=f"state its {key}")
    values = _numbers(name, table["value"])
    if table["grade"] not in GRADES:
        raise UsageError(
            f"unknown grade {table['grade']!r}", where=name,
            mend=did_you_mean(str(table["grade"]), GRADES),
        )  # fmt: skip
    low, high = _range(name, table, values)
    return Quantity(
        name, values, low, high, unit(str(table["unit"])), str(table["source"]), str(table["grade"])
    )


def _numbers(name: str, value: object) -> tuple[float, ...]:
    items: list[Any] = value if isinstance(value, list) else [value]
    if not items or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in items):
        raise UsageError("the value is not a number or a list of numbers", where=name)
    return tuple(float(v) for v in items)


def _range(
    name: str, table: Mapping[str, object], values: tuple[float, ...]
) -> tuple[float, float]:
    if "range" not in table:
        if table["grade"] == "design" or len(values) > 1:
            return values[0], values[0]
        raise UsageError("the constant has no range", where=name, mend="state range = [low, high]")
    ends = _numbers(name, table["range"])
    if len(ends) != 2 or not ends[0] <= values[0] <= ends[1]:
        raise UsageError(f"the range {list(ends)} does not hold the value {values[0]}", where=name)
    return ends[0], ends[1]
