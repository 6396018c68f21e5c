"""Writes docs/zoo.md: what becomes of every file of the shared zoo, and of further exports.

    python -m benchmarks.table_zoo [FOLDER ...] > docs/zoo.md

Each row: nodes before and after, fixed linears, attentions, what stays in pieces, the largest
difference to ONNX Runtime on the untouched file (BASIC optimisation; over the largest number of
the output), CPU seconds from the file to the canonical graph, and whether it compiles to the rom
target with the recipe `stream`, or why not.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from pfmc.compile import compile_model
from pfmc.errors import PfmcError
from pfmc.ingest.load import load
from pfmc.ir import vocabulary
from pfmc.passes import pipeline, recipe
from tests.passes import sources

ZOO = Path(__file__).resolve().parents[2] / "shared" / "zoo"
HEAD = (
    "| file | nodes | linears | attentions | in pieces | difference | CPU s | rom |\n"
    "|---|---|---|---|---|---|---|---|"
)


def files(folders: list[Path]) -> list[Path]:
    """The ONNX files of `folders`, and of those folders in them that hold one model."""
    patterns = ("*.onnx", "*/model.onnx")
    return [f for d in folders for pattern in patterns for f in sorted(d.glob(pattern))]


def row(path: Path) -> str:
    """The table's row of one file."""
    name = path.parent.name if path.stem == "model" else path.stem
    start = time.process_time()
    try:
        loaded = load(path)
        before = len(loaded.model.graph)
        model = pipeline.canonicalise(loaded.model, recipe.load("stream", ()).passes).model
    except PfmcError as error:
        return f"| {name} | | | | | | | refused: {error.what} |"
    seconds = time.process_time() - start
    attentions = sum(vocabulary.is_op(n, "Attention") for n in model.graph)
    worst = sources.difference(model, path)
    pieces, verdict = _compiled(path)
    linears = len(vocabulary.fixed_linears(model))
    return (
        f"| {name} | {before} → {len(model.graph)} | {linears} | {attentions} | {pieces} "
        f"| {worst:.1e} | {seconds:.2f} | {verdict} |"
    )


def _compiled(path: Path) -> tuple[str, str]:
    """The pieces by operator, and whether the file compiles."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = compile_model(
                path, Path(folder) / "x.pfm", target="rom", recipe="stream"
            ).report
        except PfmcError as error:
            return "", f"refused: {error.what}"
    counts = Counter(str(p["operator"]) for p in report["pieces"])
    return " ".join(f"{n} {op}" for op, n in sorted(counts.items())), "compiles"


def main() -> None:
    """Prints the page."""
    folders = [ZOO, *(Path(a) for a in sys.argv[1:])]
    print(f"# Models as exporters write them\n\n{(__doc__ or '').split(chr(10) * 2)[2]}\n{HEAD}")
    for path in files(folders):
        print(row(path), flush=True)


if __name__ == "__main__":
    main()
