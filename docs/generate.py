"""Writes the pages and parts of docs/ that are made from the code: `python docs/generate.py`.

``--check`` writes nothing and exits with 1 if a page is stale. Whole pages: cli.md, recipes.md,
technologies.md. Parts of other pages stand between ``<!-- begin:NAME -->`` and
``<!-- end:NAME -->``.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

DOCS: Final = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from benchmarks import measured  # noqa: E402
from pfmc import cli, errors, library, noise, passes, technology  # noqa: E402
from pfmc.cost import METRICS, Validation  # noqa: E402
from pfmc.passes import recipe as recipes  # noqa: E402
from pfmc.passes.base import Pass  # noqa: E402
from pfmc.quantity import Estimate, Quantity  # noqa: E402
from pfmc.targets.crossbar import validation as crossbar  # noqa: E402
from pfmc.targets.fabric.cost import MOVES, OPERATIONS, UNTIMED  # noqa: E402
from pfmc.targets.optical import validation as optical  # noqa: E402
from pfmc.targets.rom import cost as rom_cost  # noqa: E402
from pfmc.targets.rom import validation as rom  # noqa: E402
from pfmc.technology import Technology  # noqa: E402

GENERATED: Final = "<!-- Written by docs/generate.py; change the code, not this page. -->\n"

EVIDENCE: Final = {
    "HC1": "independent",
    "HNLPU array area": "independent",
    "HNLPU": "same inputs",
    "HERMES 1-phase, rate": "calibrated",
    "HERMES 4-phase, rate": "calibrated",
    "HERMES": "independent",
    "ISAAC, energy": "same inputs",
    "PUMA": "same inputs",
    "ISAAC, 8-bit converter": "independent",
    "NeuRRAM": "independent",
    "weights per mm3, this technology": "comparison",
    "weights per mm3, 64 x 64 prototype": "same inputs",
    "photons of incoherent fan-out": "own measurement",
    "converters per MAC": "same inputs",
    "local oscillator per MAC": "same inputs",
    "signal light per MAC": "same inputs",
    "energy per MAC": "comparison",
}
"""Start of a validation row's name -> what its agreement is worth (words: docs/report.md)."""


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _prose(docstring: str | None) -> str:
    """A docstring as Markdown: double backticks become single ones."""
    return inspect.cleandoc(docstring or "").replace("``", "`")


def _summary(docstring: str | None) -> str:
    """Everything of a docstring before its first section."""
    body = re.split(r"\n\s*(?:Attributes|Args|Raises|Returns|Parameters):?\n", _prose(docstring))[0]
    return " ".join(body.split())


def _attributes(docstring: str | None, names: Iterable[str]) -> dict[str, str]:
    """What the ``Attributes`` section of a docstring says of each name."""
    section = _prose(docstring).partition("Attributes:\n")[2]
    plain = " ".join(textwrap.dedent(section).split())
    found = "|".join(re.escape(n) for n in sorted(names, key=len, reverse=True))
    parts = re.split(rf"(?:^|(?<=[.;] ))({found}): ", plain)
    return {n: t.strip().rstrip(";") for n, t in zip(parts[1::2], parts[2::2], strict=True)}


# -- the command line ----------------------------------------------------------------------------

_CLI_HEAD: Final = """# The command line

Data goes to stdout; progress, messages and notes go to stderr. `--json` prints one JSON value with
a `schema_version`. Progress shows on a terminal only. There is no network access and no telemetry.

An error prints what is wrong, where, and how to mend it, and exits with the code of its kind.
"""

_OTHER_CODES: Final = {
    0: "all went well",
    1: "a bug of pfmc; the message names a file with the traceback, or the reproducer. "
    "`pfmc doctor` also exits with 1 if something needed is missing",
    74: "also: out of memory, or any other failure of the operating system",
    130: "interrupted (Ctrl-C); the same `compile` resumes",
    143: "terminated (SIGTERM); the same `compile` resumes",
}


def cli_page() -> str:
    """docs/cli.md."""
    kinds = [errors.PfmcError, *errors.PfmcError.__subclasses__()]
    codes: dict[int, list[str]] = {}
    for kind in kinds[1:]:
        codes.setdefault(kind.exit_code, []).append(f"{_summary(kind.__doc__)} (`{kind.__name__}`)")
    for code, text in _OTHER_CODES.items():
        codes.setdefault(code, []).append(text)
    rows = [(f"`{code}`", " · ".join(said)) for code, said in sorted(codes.items())]
    verbs = [(f"[`{v}`](#pfmc-{v})", t) for v, t in cli.VERBS.items()]
    parts = [GENERATED, _CLI_HEAD, "## Exit codes\n", table(("code", "meaning"), rows),
             "## Verbs\n", table(("verb", "what it does"), verbs)]  # fmt: skip
    return "\n".join(parts + [_verb(v) for v in cli.VERBS])


def _verb(verb: str) -> str:
    app = cli._app(verb)[verb]
    said = inspect.cleandoc(app.help or "").partition("\nParameters\n")[0].rstrip()
    rows, shown = [], []
    for argument in app.assemble_argument_collection(parse_docstring=True):
        names = [n for n in argument.names if not n.startswith(("--no-", "--empty-"))]
        if argument.index is not None:
            shown.append(argument.names[0].lstrip("-").upper())
            names = [shown[-1]]
        rows.append((
            ", ".join(f"`{n}`" for n in names), _type(argument.hint) + _limits(argument),
            _default(argument.field_info.default, argument.required), argument.parameter.help or "",
        ))  # fmt: skip
    usage = " ".join(["pfmc", verb, *shown, "[OPTIONS]"])
    body = re.sub(r"(?m)^(Examples?:|and) (pfmc .*)$", r"\1 `\2`", said)
    return (f"## pfmc {verb}\n\n```\n{usage}\n```\n\n{body}\n\n"
            + table(("option", "value", "default", "meaning"), rows))  # fmt: skip


def _limits(argument: Any) -> str:
    """The bounds that an option's validators hold, in brackets."""
    held = argument.parameter.validator or ()
    words = {"gte": "at least", "gt": "above", "lte": "at most", "lt": "below"}
    said = [
        f"{word} {getattr(v, key):g}"
        for v in (held if isinstance(held, tuple) else (held,)) for key, word in words.items()
        if getattr(v, key, None) is not None
    ]  # fmt: skip
    return f" ({', '.join(said)})" if said else ""


def _type(hint: object) -> str:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{a}`" for a in arguments)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_type(a) for a in arguments if a is not type(None))
    if typing.get_origin(hint) is typing.Annotated:
        bounds = [s for m in getattr(hint, "__metadata__", ()) for s in _bounds(m)]
        return _type(arguments[0]) + (f" ({', '.join(bounds)})" if bounds else "")
    if typing.get_origin(hint) is tuple:
        return f"{_type(arguments[0])}, repeatable"
    names = {"str": "text", "int": "whole number", "float": "number", "bool": "flag",
             "Path": "path", "PosixPath": "path"}  # fmt: skip
    name = getattr(hint, "__name__", str(hint))
    return names.get(name, name)


def _bounds(constraint: object) -> list[str]:
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    inner = getattr(constraint, "metadata", [constraint])
    return [
        f"{word} {getattr(m, key)}"
        for m in inner for key, word in words.items() if getattr(m, key, None) is not None
    ]  # fmt: skip


def _default(value: object, required: bool = False) -> str:
    if required or value is inspect.Parameter.empty:
        return "required" if required else ""
    empty = value is None or value is False or value == () or "Undefined" in str(value)
    return "" if empty else f"`{value}`"


# -- recipes --------------------------------------------------------------------------------------

_RECIPES_HEAD: Final = """# Recipes and passes

A recipe (`passes/*.toml`, or a TOML file of yours) says which passes bring a model to canonical
form, how it is calibrated, how weights and inputs are quantised, and what `pfmc verify` asks of the
result.
`pfmc compile` takes the recipe named like the target's kind, `rom8` for a kind that has none;
`--recipe NAME|FILE.toml` takes another; `--set OWNER.KEY=VALUE` changes one value, where the owner
is a pass or a section. `pfmc passes RECIPE --explain model.onnx` shows what each pass changed in
your model, and what it declined and why.

Calibration on text that the model writes itself, and verification on such text, see one
distribution: the model's own. Give `--text` (or `--input`) to both where you have real data, before
you believe a perplexity ratio.
"""


def recipes_page() -> str:
    """docs/recipes.md."""
    held = {name: recipes.load(name) for name in library.entries(recipes.SHELF)}
    shelf = [(f"`{n}`", r.title) for n, r in held.items()]
    parts = [GENERATED, _RECIPES_HEAD, "## The shelf\n", table(("recipe", "title"), shelf)]
    parts += ["What they set; an empty cell asks nothing:\n", _matrix(held)]
    parts += ["## Order of the passes\n", *_orders(held)]
    parts += ["## Sections of a recipe\n", *(_section(k, s) for k, s in _sections().items())]
    parts += ["## Passes\n", *(_pass(n) for n in passes.PASSES if n != "quantise")]
    return "\n".join(parts)


def _sections() -> dict[str, Any]:
    return {**recipes._SECTIONS, "quantise.layers": recipes.LayerRule}


def _matrix(held: Mapping[str, recipes.Recipe]) -> str:
    bodies = {n: r.canonical() for n, r in held.items()}
    rows = []
    for section in recipes._SECTIONS:
        for key in next(iter(bodies.values()))[section]:
            cells = [_value(b[section][key]) for b in bodies.values()]
            rows.append((f"`{section}.{key}`", *cells))
    return table(("key", *(f"`{n}`" for n in bodies)), rows)


def _value(value: object) -> str:
    if value is None or value == {}:
        return ""
    if isinstance(value, dict) and not all(isinstance(v, dict) for v in value.values()):
        return ", ".join(f"{k} = {v}" for k, v in value.items())
    if isinstance(value, dict):
        return "; ".join(f"{k}: " + ", ".join(f"{a} = {b}" for a, b in v.items() if b is not None)
                         for k, v in value.items())  # fmt: skip
    return str(value)


def _orders(held: Mapping[str, recipes.Recipe]) -> Iterable[str]:
    by_order: dict[str, list[str]] = {}
    for name, recipe in held.items():
        order = " → ".join(f"`{p.name}`" for p in recipe.passes)
        by_order.setdefault(order, []).append(f"`{name}`")
    for order, names in by_order.items():
        yield f"{', '.join(names)}: {order}. Then calibration, then quantising.\n"


def _section(key: str, model: Any) -> str:
    fields = model.model_fields
    said = _attributes(model.__doc__, fields)
    if model is recipes.LayerRule:
        said = _attributes(recipes.Quantising.__doc__, recipes.Quantising.model_fields)
    rows = [
        (f"`{n}`", _field_type(f), _default(f.default), said.get(n, ""))
        for n, f in fields.items()
    ]  # fmt: skip
    title = f"### [{key}]\n" if key != "quantise.layers" else "### A rule of [quantise.layers]\n"
    return f"{title}\n{_summary(model.__doc__)}\n\n" + table(
        ("key", "value", "default", "meaning"), rows
    )


def _field_type(field: Any) -> str:
    bounds = [b for m in field.metadata for b in _bounds(m)]
    if typing.get_origin(field.annotation) is dict:
        return "table of rules"
    return _type(field.annotation) + (f" ({', '.join(bounds)})" if bounds else "")


def _pass(name: str) -> str:
    kind: type[Pass] = passes.get(name)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    said = _attributes(kind.__doc__, fields)
    body = re.split(r"\n\s*Attributes:\n", _prose(kind.__doc__))[0]
    text = f"### {name}\n\n{body}\n"
    if fields:
        hints = typing.get_type_hints(kind)
        rows = [
            (
                f"`{n}`", _type(hints[n]), _default(f.default, f.default is dataclasses.MISSING),
                said.get(n, ""),
            )
            for n, f in fields.items()
        ]
        text += "\n" + table(("option", "value", "default", "meaning"), rows)
    return text


# -- technologies ---------------------------------------------------------------------------------

_TECHNOLOGIES_HEAD: Final = """# Technologies

Every physical number of pfmc stands in `targets/*.toml`, with unit, range, source and grade. What a
grade means, and how to make a technology of your own, stands in
[targets/README.md](../targets/README.md). A value without a range is a design choice. Only what a
file states itself is listed under it; what it takes in by `uses` stands under that file.
"""


def technologies_page() -> str:
    """docs/technologies.md."""
    found = {n: technology.load(n) for n in library.entries("targets")}
    shelf = [(f"[`{n}`](#{n})", t.kind, t.title) for n, t in found.items()]
    grades = _grades(found)
    parts = [GENERATED, _TECHNOLOGIES_HEAD, table(("technology", "kind", "title"), shelf),
             "How the constants are graded, by file:\n", grades]  # fmt: skip
    return "\n".join(parts + [_technology(n, t) for n, t in found.items()])


def _own(name: str) -> tuple[dict[str, Any], set[str]]:
    """The TOML of a technology, and the names of the constants that it states itself."""
    body = tomllib.loads(library.find("targets", name).read_text(encoding="utf-8"))
    stated: set[str] = set()

    def walk(prefix: str, held: object) -> None:
        if isinstance(held, dict) and "value" in held:
            stated.add(prefix)
        elif isinstance(held, dict):
            for key, inner in held.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)

    walk("", {k: v for k, v in body.items() if k != "noise"})
    return body, stated


def _grades(found: Mapping[str, Technology]) -> str:
    order = ("published", "full", "figure", "abstract", "measured", "derived", "secondary", "news",
             "assumed", "recall", "design")  # fmt: skip
    rows = []
    for name, tech in found.items():
        stated = _own(name)[1]
        held = [tech.constants[k].grade for k in sorted(stated)]
        held += [q.grade for law in tech.noise for q in law.parameters.values()]
        rows.append((f"`{name}`", *(str(held.count(g) or "") for g in order)))
    return table(("technology", *order), rows)


def _technology(name: str, tech: Technology) -> str:
    body, stated = _own(name)
    text = f"## {name}\n\n{tech.title}. Kind `{tech.kind}`."
    if body.get("uses"):
        text += " Takes in " + ", ".join(f"[`{u}`](#{u})" for u in body["uses"]) + "."
    if tech.settings:
        text += " Settings: " + ", ".join(f"`{k} = {v}`" for k, v in tech.settings.items()) + "."
    rows = [(f"`{k}`", *_constant(q)) for k, q in tech.constants.items() if k in stated]
    headings = ("constant", "value", "range", "unit", "grade", "source")
    text += "\n\n" + table(headings, rows)
    for law in tech.noise if "noise" in body else ():
        kind = noise.LAWS[law.law]
        text += f"\nNoise at moment `{law.moment}`, law `{law.law}`: `{kind.formula}`"
        text += (f" ({kind.paper}).\n\n" if kind.paper else ".\n\n")
        text += table(("parameter", *headings[1:]),
                      [(f"`{k}`", *_constant(q)) for k, q in law.parameters.items()])  # fmt: skip
    return text


def _constant(q: Quantity) -> tuple[str, ...]:
    values = ", ".join(f"{v:g}" for v in q.values)
    spread = f"{q.low:g} – {q.high:g}" if len(q.values) == 1 and q.grade != "design" else ""
    return values, spread, q.unit.text, q.grade, q.source


# -- parts of other pages -------------------------------------------------------------------------


def evidence(row: Validation) -> str:
    """What the agreement of a validation row is worth; a row that nobody judged is an error."""
    fitting = [start for start in EVIDENCE if row.name.startswith(start)]
    if not fitting:
        raise KeyError(f"docs/generate.py: EVIDENCE does not judge the row {row.name!r}")
    return EVIDENCE[max(fitting, key=len)]


def validation(rows: Iterable[Validation]) -> str:
    """Published figures, ours and the ratio, misses included."""
    cells = [
        (r.name, f"{_digits(r.published)} {_unit(r)}", f"{_digits(r.ours)} {_unit(r)}",
         f"**{_digits(r.ratio)}**", evidence(r), r.read, r.source, r.note)
        for r in rows
    ]  # fmt: skip
    return table(
        ("figure", "published", "ours", "ratio", "evidence", "source was read", "source", "note"),
        cells,
    )


def _unit(row: Validation) -> str:
    return "" if row.unit == "1" else row.unit


def _digits(value: float) -> str:
    if 1e4 <= abs(value) < 1e7:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"


def _optical_rows() -> Iterable[Validation]:
    nothing = Estimate(0.0, 0.0, 0.0)
    rows = optical.rows(technology.load("optical"), nothing, nothing)
    return [r for r in rows if not r.note.startswith("a comparison")]  # those need a model


def metrics_part() -> str:
    """The table of `pfmc.cost.METRICS`."""
    rows = [(f"`{k}`", u, better, what) for k, (u, better, what) in METRICS.items()]
    return table(("metric", "SI unit", "better is", "what it is"), rows)


def laws_part() -> str:
    """The noise laws of `pfmc.noise`."""
    rows = [
        (f"`{n}`", ", ".join(k.moments), f"`{k.formula}`",
         ", ".join(f"`{p}`" + (" (may be left out)" if p in k.optional else "")
                   for p in k.parameters), k.paper)
        for n, k in noise.LAWS.items()
    ]  # fmt: skip
    return table(("law", "moments", "formula", "parameters", "source"), rows)


def fabric_part() -> str:
    """Work keys of the fabric and what each is priced by."""
    rows = [
        (f"`{k}`", f"`fabric.energy_{u}`", "" if u == "control" else f"`fabric.area_{u}`")
        for k, u in OPERATIONS.items()
    ]
    for key, (energy, bits) in MOVES.items():
        hop = " × `fabric.hop`" if key == "moved_values" else ""
        rows.append((f"`{key}`", f"`{energy}` × `{bits}`{hop}", ""))
    return table(("work", "energy of one", "area of one unit"), rows) + (
        f"\nKinds that add no time: {', '.join(f'`{k}`' for k in sorted(UNTIMED))}.\n"
    )


def nodes_part() -> str:
    """The fabric's constants on every node side by side."""
    names = [n for n in library.entries("targets") if n.startswith("fabric_")]
    found = [technology.load(n) for n in names]
    rows = []
    for key, q in found[0].constants.items():
        cells = [f"{t.quantity(key).value:g}" for t in found]
        rows.append((f"`{key}`", q.unit.text, *cells, q.grade))
    return table(("constant", "unit", *(f"`{n}`" for n in names), "grade (first)"), rows)


def layers_part(kind: str) -> str:
    """Which technologies are of `kind`."""
    found = (technology.load(n) for n in library.entries("targets"))
    rows = [(f"`{t.name}`", t.title) for t in found if t.kind == kind]
    return table(("technology", "title"), rows)


PAGES: Final = {
    "cli.md": cli_page,
    "recipes.md": recipes_page,
    "technologies.md": technologies_page,
}
"""Whole pages."""

PARTS: Final = {
    "report.md": {"metrics": metrics_part},
    "rom.md": {
        "technologies": lambda: layers_part("rom"),
        "validation": lambda: validation(rom.rows()),
        "notes": lambda: "".join(f"- {n}\n" for n in rom_cost.NOTES),
    },
    "crossbar.md": {
        "technologies": lambda: layers_part("crossbar"),
        "laws": laws_part,
        "validation": lambda: validation(crossbar.rows(technology.load("crossbar"))),
    },
    "optical.md": {
        "technologies": lambda: layers_part("optical"),
        "validation": lambda: validation(_optical_rows()),
    },
    "fabric.md": {"work": fabric_part, "nodes": nodes_part},
    "distill.md": {
        "figures": lambda: measured.distilled(table),
        "encoders": lambda: measured.encoders(table),
        "ablation": lambda: measured.ablation(table),
    },
    "calibrate.md": {
        "figures": lambda: measured.corrected(table),
        "drift": lambda: measured.drift(table),
    },
}
"""Parts of pages that are written by hand."""


def fill(text: str, name: str, body: str) -> str:
    """`text` with part `name` replaced."""
    pattern = re.compile(rf"(<!-- begin:{name} -->\n).*?(<!-- end:{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"the page has no part {name!r}")
    return pattern.sub(lambda m: m[1] + body.rstrip("\n") + "\n" + m[2], text)


def pages() -> dict[str, str]:
    """Every page as it should be, by file name."""
    found = {name: make() for name, make in PAGES.items()}
    for name, parts in PARTS.items():
        text = (DOCS / name).read_text(encoding="utf-8")
        for part, make in parts.items():
            text = fill(text, part, make())
        found[name] = text
    return found


def stale() -> list[str]:
    """Names of the pages that are not as they should be."""
    return [
        name for name, text in pages().items()
        if not (DOCS / name).is_file() or (DOCS / name).read_text(encoding="utf-8") != text
    ]  # fmt: skip


def main() -> int:
    """Writes the pages, or checks them."""
    parser = argparse.ArgumentParser(description="Writes the generated pages of docs/.")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a page is stale")
    if parser.parse_args().check:
        found = stale()
        for name in found:
            print(f"docs/{name} is stale: run python docs/generate.py", file=sys.stderr)
        return 1 if found else 0
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
