"""``pfmc inspect``: a model, a stage dump, an artifact, a layer or one tile."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from pfmc.cli.options import Json, Positive
from pfmc.cli.output import Progress, print_json
from pfmc.errors import InputError, UsageError
from pfmc.report.format import digits, prefixed
from pfmc.report.table import Table

if TYPE_CHECKING:
    from pfmc.inspect_model import View
    from pfmc.report.tree import Row


def inspect_(
    path: Path,
    *,
    layer: str | None = None,
    op: str | None = None,
    tile: str | None = None,
    depth: Positive | None = None,
    lint: bool = False,
    recipe: str | None = None,
    trust_root: Path | None = None,
    json: Json = False,
    csv: Annotated[bool, Parameter(name="--csv")] = False,
    dot: Annotated[bool, Parameter(name="--dot")] = False,
) -> int:
    """Look into a model, an artifact, a layer or one tile; weights are read only for a tile.

    Examples: pfmc inspect model.onnx
    and pfmc inspect out.pfm --tile 'model.layers.0.mlp.up_proj[0,1]'

    Parameters
    ----------
    path
        A model file, a stage dump or an artifact.
    layer
        Show the layers of an artifact that fit this glob.
    op
        Show the operations of this type.
    tile
        Show one tile of an artifact: LAYER[row,column].
    depth
        Levels of the tree; for --dot, of the modules drawn (2 by default).
    lint
        Say everything that is wrong with a model file or worth knowing; exit code 3 on errors.
    recipe
        With --lint: whose passes are tried, a name or a TOML file; stream by default.
    trust_root
        Folder within which external data may be reached through links.
    json
        Print JSON.
    csv
        Print CSV.
    dot
        Print a Graphviz digraph of the modules.
    """
    if sum(x is not None for x in (layer, op, tile)) + dot + lint > 1:
        raise UsageError("choose one of --layer, --op, --tile, --dot and --lint")
    if recipe is not None and not lint:
        raise UsageError("--recipe says whose passes --lint tries", where="--recipe")
    if lint:
        return _lint(path, trust_root, recipe or "stream", json)
    from pfmc.inspect_model import look

    view = look(path, trust_root)
    if dot:
        from pfmc.report import tree

        print(tree.dot(view.items, depth or 2), end="")
    elif tile is not None:
        _show_tile(view, tile, json)
    elif layer is not None:
        _show_layers(view, layer, json, csv)
    elif op is not None:
        _show_items(view, op, json, csv)
    else:
        _show_tree(view, depth, json, csv)
    return 0


def _lint(path: Path, trust_root: Path | None, recipe: str, json: bool) -> int:
    from pfmc.lint import lint

    progress = Progress(quiet=json)
    try:
        found = lint(path, trust_root=trust_root, recipe=recipe, progress=progress)
    finally:
        progress.done()
    if json:
        print_json(found.to_json())
    else:
        print(found.to_text(), end="")
    return InputError.exit_code if found.counts()["error"] else 0


def _show_layers(view: View, pattern: str, json: bool, csv: bool) -> None:
    from pfmc.inspect_model import select_layers

    found = select_layers(view, pattern)
    if json:
        print_json({"schema_version": 1, "rows": [vars(r) for r in found]})
        return
    told = {"tiles", "bits", "inputs", "outputs", "format"}  # columns of their own
    facts = sorted({k for r in found for k in (*r.counts, *r.diagnostics)} - told)
    routed = any(r.activity != 1.0 for r in found)  # the share of the tokens that use a layer
    rows = [
        (r.name, str(r.inputs), str(r.outputs), str(r.bits), r.format, r.choice, str(r.tiles),
         " ".join(r.sources),
         *([f"{r.activity:.3g}"] if routed else []),
         *(digits({**r.counts, **r.diagnostics}.get(f, 0.0)) for f in facts))
        for r in found
    ]  # fmt: skip
    headings = ("layer", "inputs", "outputs", "bits", "format", "rounded by", "tiles", "sources",
                *(["activity"] if routed else []), *facts)  # fmt: skip
    if csv:
        print(Table(headings, tuple(rows)).csv(), end="")
    elif len(rows) == 1:  # one layer reads better standing up
        Table(("what", "value"), tuple(zip(headings, rows[0], strict=True))).show()
    else:
        Table(headings, tuple(rows), view.title).show()


def _show_items(view: View, op: str, json: bool, csv: bool) -> None:
    from pfmc.inspect_model import select_items

    found = select_items(view, op)
    if json:
        print_json({"schema_version": 1, "rows": [asdict(i) for i in found]})
        return
    rows = [
        (i.name, i.op, i.scope, str(i.weights), " ".join(i.inputs), " ".join(i.outputs))
        for i in found
    ]
    headings = ("name", "op", "scope", "weights", "inputs", "outputs")
    table = Table(headings, tuple(rows), view.title)
    print(table.csv(), end="") if csv else table.show()


def _show_tile(view: View, text: str, json: bool) -> None:
    from pfmc.inspect_model import tile

    found = tile(view, text)
    if json:
        print_json({"schema_version": 1, **found})
        return
    rows: list[tuple[str, ...]] = [
        ("layer", found["layer"]), ("weight", found["weight"]),
        ("sources", " ".join(found["sources"])),
        ("share of the layer's products", digits(found["share_of_layer"])),
        ("tile table",), *((k, _cell(v)) for k, v in found["tile"].items()),
        ("codes",), *((k, _cell(v)) for k, v in found["codes"].items()),
        ("first codes",), *((f"row {i}", " ".join(map(str, r)))
                            for i, r in enumerate(found["first_codes"])),
    ]  # fmt: skip
    Table(("what", "value"), tuple(rows), text).show()


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _show_tree(view: View, depth: int | None, json: bool, csv: bool) -> None:
    from pfmc.report import tree

    lines = tree.rows(tree.grow(view.items, view.path.name), depth)
    if json:
        print_json({"schema_version": 1, "title": view.title, "rows": [asdict(r) for r in lines]})
        return
    if csv:
        cells = [(r.depth, r.label, r.count, r.weights, r.size, _operators(r)) for r in lines]
        plain = tuple(tuple(map(str, row)) for row in cells)
        columns = ("depth", "module", "count", "weights", "bytes", "operations")
        print(Table(columns, plain).csv(), end="")
        return
    headings = ("module", "operations", "weights", "bytes")
    Table(headings, tuple(_tree_row(r) for r in lines), view.title).show()


def _operators(row: Row, most: int | None = None) -> str:
    """``2×Add MatMul``, the most frequent first; at most so many kinds."""
    top = sorted(row.operators.items(), key=lambda kv: (-kv[1], kv[0]))
    shown = " ".join(f"{n}×{op}" if n > 1 else op for op, n in top[:most])
    return shown if most is None or len(top) <= most else f"{shown} +{len(top) - most} kinds"


def _tree_row(row: Row) -> tuple[str, ...]:
    return (
        "  " * row.depth + row.label, _operators(row, 6),
        prefixed(row.weights) if row.weights else "", prefixed(row.size) if row.size else "",
    )  # fmt: skip
