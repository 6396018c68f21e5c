"""``pfmc passes``: recipes and passes, and what each pass does to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from pfmc import library
from pfmc.cli.options import Json, NotNegative
from pfmc.cli.output import print_json
from pfmc.report.table import Table


def passes_(
    recipe: str | None = None,
    *,
    explain: Path | None = None,
    lines: NotNegative = 8,
    set_: Annotated[tuple[str, ...], Parameter(name="--set")] = (),
    json: Json = False,
) -> int:
    """List the recipes and passes, show a recipe, or explain what each pass does to a model.

    Example: pfmc passes rom --explain model.onnx

    Parameters
    ----------
    recipe
        A recipe's name or TOML file; all are listed without it.
    explain
        A model to run the recipe's passes on, showing what each changed and declined.
    lines
        Lines of the graph to show for each pass.
    set_
        Change an option of the recipe: pass.option=value.
    json
        Print JSON.
    """
    if explain is not None:
        return _explain(recipe or "rom", explain, lines, set_, json)
    if recipe is not None:
        return _show(recipe, set_, json)
    return _list(json)


def _list(json: bool) -> int:
    from pfmc import passes
    from pfmc.passes import recipe as recipes

    found = [recipes.load(n) for n in library.entries("passes")]
    docs = {n: (passes.get(n).__doc__ or "").strip().splitlines()[0] for n in passes.PASSES}
    if json:
        titles = {r.name: r.title for r in found}
        print_json({"schema_version": 1, "recipes": titles, "passes": docs})
        return 0
    Table(("recipe", "title"), tuple((r.name, r.title) for r in found)).show()
    Table(("pass", "what it does"), tuple(docs.items())).show()
    return 0


def _show(name: str, settings: tuple[str, ...], json: bool) -> int:
    from pfmc.passes import recipe as recipes

    body = recipes.load(name, settings).canonical()
    if json:
        print_json({"schema_version": 1, **body})
        return 0
    rows: list[tuple[str, ...]] = [(body["title"],)]
    for entry in body["pass"]:
        options = {k: v for k, v in entry.items() if k != "name"}
        rows.append((entry["name"], _options(options)))
    for section in ("calibration", "quantise", "verify", "workload"):
        rows.append((f"[{section}]", _options(body[section])))
    Table(("pass or section", "options"), tuple(rows), name).show()
    return 0


def _options(held: dict[str, object]) -> str:
    return ", ".join(f"{k} = {v}" for k, v in held.items())


def _explain(
    name: str, model: Path, lines: int, settings: tuple[str, ...], json: bool
) -> int:
    from pfmc import ingest
    from pfmc.passes import pipeline
    from pfmc.passes import recipe as recipes

    plan = recipes.load(name, settings)
    told = pipeline.explain(ingest.load(model).model, plan.passes)
    if json:
        print_json({"schema_version": 1, "steps": [t.step.report() for t in told]})
    else:
        for step in told:
            print(step.to_text(lines), end="")
    return 0
