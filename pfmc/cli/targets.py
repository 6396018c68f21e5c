"""``pfmc targets``: the technologies on the shelf, and one with every constant and its source."""

from __future__ import annotations

from pfmc import library, technology
from pfmc.cli.options import Json
from pfmc.cli.output import print_json
from pfmc.quantity import Quantity
from pfmc.report.format import digits
from pfmc.report.table import Table
from pfmc.technology import Technology


def targets_(
    name: str | None = None, *, json: Json = False
) -> int:
    """List the technologies, or show one with its sources.

    Example: pfmc targets optical

    Parameters
    ----------
    name
        A technology's name or TOML file; all are listed without it.
    json
        Print JSON.
    """
    if name is None:
        return _list(json)
    tech = technology.load(name)
    if json:
        print_json(
            {"schema_version": 1, "name": tech.name, "kind": tech.kind, "title": tech.title,
             "constants": {k: _plain(q) for k, q in tech.constants.items()}}
        )  # fmt: skip
        return 0
    rows = [(k, _value(q), q.unit.text, q.grade, q.source) for k, q in tech.constants.items()]
    headings = ("constant", "value", "unit", "grade", "source")
    Table(headings, (*rows, *_laws(tech)), tech.title).show()
    return 0


def _list(json: bool) -> int:
    found = [technology.load(n) for n in library.entries("targets")]
    if json:
        rows = [{"name": t.name, "kind": t.kind, "title": t.title} for t in found]
        print_json({"schema_version": 1, "technologies": rows})
    else:
        Table(("name", "kind", "title"), tuple((t.name, t.kind, t.title) for t in found)).show()
    return 0


def _laws(tech: Technology) -> list[tuple[str, ...]]:
    return [
        (f"noise: {n.moment} {n.law} {k}", _value(q), q.unit.text, q.grade, q.source)
        for n in tech.noise
        for k, q in n.parameters.items()
    ]


def _value(q: Quantity) -> str:
    if len(q.values) > 1:
        return ", ".join(f"{v:g}" for v in q.values)
    return f"{q.value:g}" if q.low == q.high else f"{q.value:g} [{digits(q.low)}–{digits(q.high)}]"


def _plain(q: Quantity) -> dict[str, object]:
    return {
        "value": list(q.values) if len(q.values) > 1 else q.value, "range": [q.low, q.high],
        "unit": q.unit.text, "source": q.source, "grade": q.grade,
    }  # fmt: skip
