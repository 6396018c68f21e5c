"""One measured figure, its goal and what it stands beside; tables and JSON of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        what: what was measured.
        value: the measurement, in `unit`.
        unit: ``CPU s``, ``MB`` (10^6 bytes), ``ms``, ``x`` (a ratio), ``1/s`` …
        goal: what it must not pass (or must reach, with `at_least`); None without one.
        at_least: whether more is better.
        beside: the floor or peer of the same run, in words.
    """

    what: str
    value: float
    unit: str
    goal: float | None = None
    at_least: bool = False
    beside: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None without one."""
        if self.goal is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def to_json(self) -> dict[str, Any]:
        """The figure as a JSON object."""
        return {**asdict(self), "met": self.met}


def table(figures: Iterable[Figure]) -> str:
    """The figures as text, the goal beside each."""
    return "\n".join(_lines(list(figures)))


def _lines(figures: list[Figure]) -> Iterator[str]:
    width = max((len(f.what) for f in figures), default=0)
    yield f"{'':{width}}  {'measured':>10} {'unit':5}  {'goal':>9} {'met':4} beside"
    for f in figures:
        goal = "" if f.goal is None else f"{'>=' if f.at_least else '<='} {f.goal:g}"
        met = {None: "", True: "yes", False: "NO"}[f.met]
        line = f"{f.what:{width}}  {f.value:>10.4g} {f.unit:5}  {goal:>9} {met:4} {f.beside}"
        yield line.rstrip()


def to_json(figures: Iterable[Figure]) -> str:
    """The figures as JSON."""
    rows = [f.to_json() for f in figures]
    return json.dumps({"schema_version": 1, "figures": rows}, indent=1)
