"""Shapes seen at probe lengths, and how a count grows with positions and context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ShapeProbe:
    """The shape of one value in one trial run.

    Attributes:
        shape: its dimensions; dtype: ``float32``, ``int64``, ``bool`` …
        positions: positions the run computed (S); context: positions attended to (past + S).
    """

    shape: tuple[int, ...]
    dtype: str
    positions: int
    context: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def floating(self) -> bool:
        """Whether the elements are real numbers, not integers or flags."""
        return "float" in self.dtype


@dataclass(frozen=True)
class Growth:
    """A count per position: ``fixed + per_context * context``."""

    fixed: float
    per_context: float = 0.0

    def times(self, factor: float) -> Growth:
        """The count multiplied."""
        return Growth(self.fixed * factor, self.per_context * factor)

    def plus(self, other: Growth) -> Growth:
        """The sum of two counts."""
        return Growth(self.fixed + other.fixed, self.per_context + other.per_context)


def growth(points: Sequence[tuple[float, int, int]]) -> Growth:
    """How a count grows, from ``(count, positions S, context T)`` at one or two trial runs.

    A count that does not change between the runs is work done once, charged to every position (a
    decoder computes one position a run). One that grows as S is per position, as S·T (S² for an
    encoder) per position and context, as T per context. Any other growth is fitted by
    ``S (a + b T)`` with a, b >= 0, or else charged at its largest count per position. With one run
    (a model of fixed size) everything is ``count / S``.
    """
    (e1, s1, t1), (e2, s2, t2) = points[0], points[-1]
    if (s1, t1) == (s2, t2):
        return Growth(e1 / s1)
    if e1 == e2:
        return Growth(e1 if s1 != s2 else e1 / s1)
    if e1 * s2 == e2 * s1:
        return Growth(e1 / s1)
    if e1 * s2 * t2 == e2 * s1 * t1:
        return Growth(0.0, e1 / (s1 * t1))
    if e1 * t2 == e2 * t1:
        return Growth(0.0, e1 / t1)
    slope = (e2 / s2 - e1 / s1) / (t2 - t1)
    offset = e1 / s1 - slope * t1
    if slope >= 0 and offset >= 0:
        return Growth(offset, slope)
    return Growth(max(e1 / s1, e2 / s2))
