"""Sets cost reports side by side, with a saturated GPU beside them, and fails on a threshold."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pfmc.artifact import read_manifest
from pfmc.cost import METRICS
from pfmc.errors import CorruptError, UsageError, VerificationError, did_you_mean
from pfmc.report.format import digits, quantity, triple
from pfmc.report.table import Table

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """Cost reports side by side.

    Attributes:
        names: one a report; `baseline` is the name of the GPU's, the last.
        reports: as in ``report/report.json``.
    """

    names: tuple[str, ...]
    reports: tuple[Report, ...]
    baseline: str

    def table(self, breakdown: bool = False) -> Table:
        """Metrics by report: typical and range; with `breakdown` every term below its metric."""
        rows: list[tuple[str, ...]] = []
        for key in METRICS:
            held = [r["metrics"].get(key) for r in self.reports]
            if any(held):
                rows.append((key, *(triple(m) if m else "–" for m in held)))
                if breakdown:
                    rows += _terms(held)
        return Table(("metric", *self.names), tuple(rows), self._title())

    def _title(self) -> str:
        workloads = list(dict.fromkeys(str(r["workload"]) for r in self.reports))
        return "typical  [low – high]; " + " / ".join(workloads)

    def rows(self) -> list[dict[str, object]]:
        """Long form: report, metric, unit, low, typical, high."""
        return [
            {"report": name, "metric": key, **{k: m[k] for k in ("unit", "low", "typical", "high")}}
            for name, report in zip(self.names, self.reports, strict=True)
            for key, m in report["metrics"].items()
        ]

    def validation(self) -> Table:
        """Published figures beside ours with their ratio: misses are shown, not tuned away."""
        rows = [
            (
                name, v["name"], f"{digits(v['published'])} {v['unit']}", digits(v["ours"]),
                f"{v['ratio']:.2f}", v["read"], v["source"], v["note"],
            )
            for name, report in zip(self.names, self.reports, strict=True)
            for v in report["validation"]
        ]  # fmt: skip
        headings = ("report", "figure", "published", "ours", "ratio", "read", "source", "note")
        return Table(headings, tuple(rows), "validation of the cost models")

    def json(self) -> dict[str, object]:
        """Everything, with terms, sources and notes."""
        return {
            "schema_version": 1,
            "reports": dict(zip(self.names, self.reports, strict=True)),
            "baseline": self.baseline,
        }

    def notes(self) -> list[str]:
        """What the reports do not cover, each sentence once, with the reports it belongs to."""
        by_note: dict[str, list[str]] = {}
        for name, report in zip(self.names, self.reports, strict=True):
            for note in report["notes"]:
                by_note.setdefault(note, []).append(name)
        return [f"{', '.join(names)}: {note}" for note, names in by_note.items()]


def _terms(held: Sequence[Mapping[str, Any] | None]) -> list[tuple[str, ...]]:
    by_name: dict[str, list[str]] = {}
    for column, metric in enumerate(held):
        for term in (metric or {}).get("terms", []):
            cells = by_name.setdefault(term["name"], ["–"] * len(held))
            cells[column] = quantity(float(term["typical"]), str((metric or {})["unit"]))
    return [(f"    {name}", *cells) for name, cells in by_name.items()]


def compare(paths: Sequence[Path]) -> Comparison:
    """Compares finished artifacts; the GPU baseline is that of the first.

    Raises:
        UsageError: a path is not an artifact.
        CorruptError: a report cannot be read.
    """
    if not paths:
        raise UsageError("nothing to compare", mend="give one or more artifacts")
    reports = [_report(p) for p in paths]
    names = _distinct([p.name.removesuffix(".pfm") for p in paths])
    gpu = reports[0]["baseline"]
    return Comparison((*names, gpu["target"]), (*reports, gpu), gpu["target"])


def _report(path: Path) -> dict[str, Any]:
    if path.is_file():
        raise UsageError(
            "this is a file, not an artifact", where=str(path),
            mend="to compare one model on several targets add --targets rom,crossbar,optical",
        )  # fmt: skip
    read_manifest(path)
    try:
        body: dict[str, Any] = json.loads((path / "report" / "report.json").read_bytes())
        return {**body["cost"], "baseline": body["baseline"]}
    except (OSError, ValueError, KeyError) as error:
        raise CorruptError("the report cannot be read", where=str(path)) from error


def _distinct(names: list[str]) -> list[str]:
    return [n if names.count(n) == 1 else f"{n} ({i + 1})" for i, n in enumerate(names)]


_RULE = re.compile(r"([a-z_]+):([+-])([0-9.]+)%")


@dataclass(frozen=True)
class Rule:
    """``energy__token:+5%``: the metric may grow by at most 5 % (``-``: shrink by at most)."""

    metric: str
    change: float

    @staticmethod
    def parse(text: str) -> Rule:
        """Reads a rule.

        Raises:
            UsageError: it is not of the form, or the metric is unknown.
        """
        match = _RULE.fullmatch(text.strip())
        if not match:
            raise UsageError(f"cannot read the rule {text!r}", mend="e.g. energy__token:+5%")
        if match[1] not in METRICS:
            raise UsageError(f"unknown metric {match[1]!r}", mend=did_you_mean(match[1], METRICS))
        return Rule(match[1], float(match[2] + match[3]) / 100)

    def violations(self, comparison: Comparison) -> list[str]:
        """Which reports differ from the first by more than the rule allows."""
        first, *others = zip(comparison.names, comparison.reports, strict=True)
        found = []
        for name, report in others:
            if name == comparison.baseline:
                continue
            old, new = (r["metrics"].get(self.metric) for r in (first[1], report))
            if not old or not new:
                found.append(f"{self.metric} is not in both {first[0]} and {name}")
                continue
            change = new["typical"] / old["typical"] - 1
            if change > self.change if self.change >= 0 else change < self.change:
                found.append(f"{self.metric} of {name} is {digits(100 * change)} % off {first[0]}")
        return found


def enforce(comparison: Comparison, rules: Sequence[Rule]) -> None:
    """Fails if a rule is broken.

    Raises:
        VerificationError: names every violation.
    """
    found = [v for rule in rules for v in rule.violations(comparison)]
    if found:
        raise VerificationError("thresholds failed: " + "; ".join(found))
