"""The cost report: metrics as low/typical/high, each a sum of terms that name their constants."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from pfmc.quantity import Estimate
from pfmc.technology import Technology

METRICS: Final[dict[str, tuple[str, str, str]]] = {
    # key: (unit shown, better is, what it is)
    "energy__token": ("J", "lower", "energy of one token, or of one position of an encoder"),
    "energy__inference": ("J", "lower", "energy of one inference over the whole context"),
    "energy__mac": ("J", "lower", "energy of a token divided by its weight-stationary products"),
    "latency__token": ("s", "lower", "time from one token to the next, for one user"),
    "latency__inference": ("s", "lower", "time of one inference over the whole context"),
    "throughput__user": ("1/s", "higher", "tokens per second for one user"),
    "throughput__aggregate": ("1/s", "higher", "tokens per second over all users, pipeline full"),
    "users__pipeline": ("1", "higher", "sequences in flight when the pipeline is full"),
    "power__total": ("W", "lower", "power with the pipeline full"),
    "area__total": ("m2", "lower", "area of all dies"),
    "dies": ("1", "lower", "number of dies or volumes"),
    "volume__optics": ("m3", "lower", "volume of the written glass"),
    "depth__optics": ("m", "lower", "longest light path through one volume"),
    "memory__weights": ("bit", "lower", "storage of the fixed weights"),
    "memory__kv_user": ("bit", "lower", "KV memory of one user at the stated context"),
    "time__write": ("s", "lower", "time to write the weights into matter"),
    "cost__unit": ("USD", "lower", "manufacturing cost of one unit"),
    "cost__nre": ("USD", "lower", "one-time cost of this model: masks, weight-dependent part"),
}
"""Every metric a report may hold."""


@dataclass(frozen=True)
class Term:
    """One addend of a metric: its name (a path), value in SI, and the formula it came from."""

    name: str
    value: Estimate
    formula: str


@dataclass(frozen=True)
class Metric:
    """A metric of a cost report.

    `terms` add up to `value` exactly where the metric is a sum; a metric made of others by
    division has no terms and states its `formula`.
    """

    key: str
    value: Estimate
    terms: tuple[Term, ...] = ()
    formula: str = ""

    @property
    def unit(self) -> str:
        """The SI unit the metric is kept in."""
        return METRICS[self.key][0]


@dataclass(frozen=True)
class Validation:
    """A published figure beside the same figure from our model; misses are shown, not tuned away.

    `ratio` = ours / published; `read` says how far the source was read (abstract, secondary …).
    """

    name: str
    published: float
    ours: float
    unit: str
    source: str
    read: str
    note: str = ""

    @property
    def ratio(self) -> float:
        """Ours divided by the published figure."""
        return self.ours / self.published


@dataclass(frozen=True)
class Source:
    """Where a constant came from, as the report prints it; low/typical/high in `unit`."""

    low: float
    typical: float
    high: float
    unit: str
    source: str
    grade: str


@dataclass(frozen=True)
class CostReport:
    """What a lowered model costs on a technology under a workload.

    Attributes:
        target, technology, workload: e.g. ``rom``, ``rom``, ``decode, context 256``.
        metrics: key of `METRICS` -> metric.
        sources: every constant used, by name.
        validation: published figures and ours.
        notes: what the report does not cover, in plain sentences.
    """

    target: str
    technology: str
    workload: str
    metrics: Mapping[str, Metric]
    sources: Mapping[str, Source]
    validation: tuple[Validation, ...] = ()
    notes: tuple[str, ...] = ()

    def __getitem__(self, key: str) -> Estimate:
        return self.metrics[key].value


def total(key: str, terms: Iterable[Term]) -> Metric:
    """A metric that is the sum of its terms; zero terms are dropped.

    Raises:
        ValueError: the terms have different dimensions, or not those of the metric's unit.
        KeyError: `key` is not a metric.
    """
    kept = tuple(t for t in terms if t.value.high or t.value.low)
    value = sum((t.value for t in kept), start=Estimate(0.0, 0.0, 0.0))
    metric = Metric(key, value, kept)
    value.to(metric.unit)
    return metric


def ratio(key: str, value: Estimate, formula: str) -> Metric:
    """A metric made of others by multiplication or division; `formula` says how."""
    metric = Metric(key, value, (), formula)
    value.to(metric.unit)
    return metric


def sources(metrics: Iterable[Metric], technology: Technology) -> dict[str, Source]:
    """Where every constant of `metrics` came from, noise laws' parameters among them, by name.

    Raises:
        UsageError: the technology does not state one of them.
    """
    laws = {q.name: q for law in technology.noise for q in law.parameters.values()}
    names = sorted({n for m in metrics for n in m.value.constants})
    found = ((n, laws.get(n) or technology.quantity(n)) for n in names)
    return {
        n: Source(q.low, q.value, q.high, q.unit.text, q.source, q.grade) for n, q in found
    }


def to_json(report: CostReport) -> dict[str, object]:
    """The report as plain JSON values; numbers in the unit each entry names."""
    return {
        "schema_version": 1,
        "target": report.target,
        "technology": report.technology,
        "workload": report.workload,
        "metrics": {k: _metric_json(m) for k, m in sorted(report.metrics.items())},
        "sources": {k: vars(s) | {} for k, s in sorted(report.sources.items())},
        "validation": [vars(v) | {"ratio": v.ratio} for v in report.validation],
        "notes": list(report.notes),
    }


def _triple(value: Estimate) -> dict[str, float]:
    return {"low": value.low, "typical": value.typical, "high": value.high}


def _metric_json(metric: Metric) -> dict[str, object]:
    body: dict[str, object] = {"unit": metric.unit, **_triple(metric.value)}
    if metric.formula:
        body["formula"] = metric.formula
    if metric.terms:
        body["terms"] = [
            {
                "name": t.name,
                **_triple(t.value),
                "formula": t.formula,
                "constants": sorted(t.value.constants),
            }
            for t in metric.terms
        ]
    return body
