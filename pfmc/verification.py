"""What a verification measured: rows with their thresholds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One measured number.

    Attributes:
        name: what was measured; value, unit: the number.
        limit: its threshold, or None where it only informs; relation: ``<=`` or ``>=``.
        low, high: 95 % interval over windows, or None.
    """

    name: str
    value: float
    limit: float | None = None
    relation: str = "<="
    unit: str = ""
    low: float | None = None
    high: float | None = None

    @property
    def passed(self) -> bool | None:
        """Whether the threshold holds; None without one; NaN fails."""
        if self.limit is None:
            return None
        return self.value <= self.limit if self.relation == "<=" else self.value >= self.limit


@dataclass(frozen=True)
class Verification:
    """Everything that was measured."""

    title: str
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether no threshold failed."""
        return all(r.passed is not False for r in self.rows)

    def json(self) -> dict[str, object]:
        """As plain JSON values."""
        return {
            "schema_version": 1,
            "title": self.title,
            "passed": self.passed,
            "rows": [vars(r) | {"passed": r.passed} for r in self.rows],
        }
