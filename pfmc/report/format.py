"""Prints numbers as a person reads them: three digits, an SI prefix, the unit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

_PREFIXES: Final = {
    -21: "z", -18: "a", -15: "f", -12: "p", -9: "n", -6: "µ", -3: "m", 0: "",
    3: "k", 6: "M", 9: "G", 12: "T", 15: "P", 18: "E",
}  # fmt: skip
_AREAS: Final = ((1.0, "m²"), (1e-4, "cm²"), (1e-6, "mm²"), (1e-12, "µm²"))
_VOLUMES: Final = ((1.0, "m³"), (1e-3, "l"), (1e-6, "cm³"), (1e-9, "mm³"), (1e-18, "µm³"))
_TIMES: Final = ((31557600.0, "years"), (86400.0, "days"), (3600.0, "h"), (60.0, "min"))


def digits(value: float) -> str:
    """Three significant digits without an exponent, e.g. ``0.123``, ``12.3``, ``123``."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


def quantity(value: float, unit: str) -> str:
    """A number of SI unit `unit` with the prefix that suits it: ``1.2e-9, "J"`` is ``1.20 nJ``."""
    steps = {"m2": _AREAS, "m3": _VOLUMES}.get(unit)
    if steps:
        return _stepped(value, steps)
    if unit == "s" and value >= 120:
        return _stepped(value, _TIMES)
    if unit == "USD":
        return f"${digits(value)}" if value < 1e4 else f"${prefixed(value)}"
    if unit == "1":
        return prefixed(value) if abs(value) >= 1e4 else digits(value)
    if unit.startswith("1/"):
        return f"{prefixed(value)}/{unit[2:]}"
    return f"{prefixed(value, ' ')}{unit}"


def prefixed(value: float, space: str = "") -> str:
    """A number with an SI prefix and no unit: ``1.2e6`` is ``1.20M``."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}{space}"
    exponent = 3 * math.floor(math.log10(abs(value)) / 3 + 1e-12)
    exponent = min(max(exponent, -21), 18)
    return f"{digits(value / 10**exponent)}{space}{_PREFIXES[exponent]}"


def _stepped(value: float, steps: tuple[tuple[float, str], ...]) -> str:
    for size, name in steps:
        if abs(value) >= size:
            return f"{digits(value / size)} {name}"
    size, name = steps[-1]
    return f"{digits(value / size)} {name}"


def triple(metric: Mapping[str, float | str]) -> str:
    """``typical [low – high]`` of a metric of ``report.json``; a shared unit stands once."""
    unit = str(metric["unit"])
    low, typical, high = (quantity(float(metric[k]), unit) for k in ("low", "typical", "high"))
    if low == high:
        return typical
    shared = " " + typical.partition(" ")[2]
    if " " in typical and low.endswith(shared) and high.endswith(shared):
        low, high = low.removesuffix(shared), high.removesuffix(shared)
    return f"{typical} [{low} – {high}]"
