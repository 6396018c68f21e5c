"""``pfmc compare``: cost reports side by side."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from pfmc.cli.options import Json, Positive, Quiet
from pfmc.cli.output import Progress, print_json
from pfmc.errors import UsageError

if TYPE_CHECKING:
    from pfmc.compare import Comparison


def compare_(
    *paths: Path,
    targets: str | None = None,
    recipe: str | None = None,
    context: Positive | None = None,
    breakdown: bool = False,
    fail_on: tuple[str, ...] = (),
    json: Json = False,
    csv: Annotated[bool, Parameter(name="--csv")] = False,
    markdown: Annotated[bool, Parameter(name="--markdown")] = False,
    quiet: Quiet = False,
) -> int:
    """Compare the cost of artifacts, or of one model on several targets.

    Examples: pfmc compare a.pfm b.pfm --fail-on 'energy__token:+5%'
    and pfmc compare model.onnx --targets rom,crossbar,optical

    Parameters
    ----------
    paths
        Artifacts; or one model, with --targets.
    targets
        Comma-separated technologies to compile one model to.
    recipe
        Recipe for --targets; each target's own by default.
    context
        Positions of context for --targets.
    breakdown
        Show every term of every metric, and the published figures the cost models are held to.
    fail_on
        METRIC:+N% fails (exit code 4) if another artifact exceeds the first by more.
    json
        Print JSON with terms, constants and sources.
    csv
        Print CSV: report, metric, unit, low, typical, high.
    markdown
        Print a Markdown table.
    quiet
        No progress.
    """
    from pfmc.compare import Rule, compare, enforce

    if sum((json, csv, markdown)) > 1:
        raise UsageError("choose one of --json, --csv and --markdown")
    rules = [Rule.parse(text) for text in fail_on]
    if targets is not None:
        comparison = _compiled(paths, targets, recipe, context, quiet or json)
    else:
        comparison = compare(paths)
    _show(comparison, json, csv, markdown, breakdown)
    enforce(comparison, rules)
    return 0


def _compiled(
    paths: tuple[Path, ...], targets: str, recipe: str | None, context: int | None, quiet: bool
) -> Comparison:
    from pfmc.compare import compare
    from pfmc.compile import Options, compile_model

    if len(paths) != 1:
        raise UsageError("--targets compares one model", mend="give one model file")
    progress = Progress(quiet=quiet)
    with tempfile.TemporaryDirectory(prefix="pfmc-compare-") as folder:
        made = []
        for name in dict.fromkeys(t.strip() for t in targets.split(",") if t.strip()):
            progress(f"compiling to {name}")
            place = Path(folder) / f"{Path(name).stem}.pfm"
            options = Options(target=name, recipe=recipe, context=context)
            compile_model(paths[0], place, options=options, progress=progress)
            made.append(place)
        progress.done()
        return compare(made)


def _show(
    comparison: Comparison, json: bool, csv: bool, markdown: bool, breakdown: bool
) -> None:
    if json:
        print_json(comparison.json())
    elif csv:
        _print_csv(comparison)
    elif markdown:
        print(comparison.table(breakdown).markdown(), end="")
        if breakdown:
            print("\n" + comparison.validation().markdown(), end="")
    else:
        comparison.table(breakdown).show()
        if breakdown:
            print()
            comparison.validation().show()
        for note in comparison.notes():
            print(f"note: {note}", file=sys.stderr)


def _print_csv(comparison: Comparison) -> None:
    from pfmc.report.table import Table

    headings = ("report", "metric", "unit", "low", "typical", "high")
    rows = [tuple(str(row[h]) for h in headings) for row in comparison.rows()]
    print(Table(headings, tuple(rows)).csv(), end="")
