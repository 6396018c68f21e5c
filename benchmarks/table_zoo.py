"""Writes docs/zoo.md: what becomes of every file of the shared zoo, and of further exports.

    python -m benchmarks.table_zoo [--exports] [FOLDER ...] > docs/zoo.md

Each row: nodes before and after, fixed linears, attentions, real-number work that stays in pieces
in the digital fabric, the largest difference to ONNX Runtime on the untouched file (BASIC
optimisation; over the largest number of the output) and CPU seconds from the file to the canonical
graph, all with the passes of the recipe `stream`. Then for each target, with that target's own
recipe (`passes/rom.toml`, `crossbar.toml`, `optical.toml`): CPU seconds of the whole compile, or
why it is refused. The files after the zoo's own are exported afresh by the installed torch and
transformers (`tests/passes/exports.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pfmc.compile import compile_model
from pfmc.errors import PfmcError
from pfmc.ingest.load import load
from pfmc.ir import vocabulary
from pfmc.passes import pipeline, recipe
from tests.passes import sources

ZOO = Path(__file__).resolve().parents[2] / "shared" / "zoo"
TARGETS = ("rom", "crossbar", "optical")
HEADINGS = ("file", "nodes", "linears", "attentions", "in pieces", "difference", "CPU s", *TARGETS)


@dataclass(frozen=True)
class Row:
    """What became of one file; `cells` as in `HEADINGS`.

    Attributes:
        refused: of the file itself or of a compile, in words; empty if there was none.
    """

    cells: tuple[str, ...]
    refused: str = ""

    def __str__(self) -> str:
        return f"| {' | '.join(self.cells)} |"


def files(folders: list[Path]) -> list[Path]:
    """The ONNX files of `folders`, and of those folders in them that hold one model."""
    patterns = ("*.onnx", "*/model.onnx")
    return [f for d in folders for pattern in patterns for f in sorted(d.glob(pattern))]


def title(path: Path) -> str:
    """What the table calls a file."""
    return path.parent.name if path.stem == "model" else path.stem


def row(path: Path, targets: tuple[str, ...] = TARGETS) -> Row:
    """The table's row of one file."""
    start = time.process_time()
    try:
        source = load(path).model
        before = len(source.graph)
        model = pipeline.canonicalise(source, recipe.load("stream", ()).passes).model
    except PfmcError as error:
        blanks = ("",) * (len(HEADINGS) - 1 - len(targets))
        why = f"refused: {error.what}"
        return Row((title(path), *blanks, *(why,) * len(targets)), why)
    seconds = time.process_time() - start
    attentions = sum(vocabulary.is_op(n, "Attention") for n in model.graph)
    worst = sources.difference(model, path)
    pieces, verdicts = _compiled(path, targets)
    cells = (
        title(path), f"{before} → {len(model.graph)}", f"{len(vocabulary.fixed_linears(model))}",
        f"{attentions}", pieces, f"{worst:.1e}", f"{seconds:.2f}", *verdicts,
    )  # fmt: skip
    return Row(cells, next((v for v in verdicts if not v[0].isdecimal()), ""))


def _compiled(path: Path, targets: tuple[str, ...]) -> tuple[str, list[str]]:
    """The pieces by operator, and for each target CPU seconds or the reason of the refusal."""
    counts: Counter[str] = Counter()
    verdicts = []
    for target in targets:
        start = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            try:
                report = compile_model(path, Path(folder) / "x.pfm", target=target).report
            except PfmcError as error:
                verdicts.append(f"refused: {error.what}")
                continue
            except Exception as error:  # a bug of ours stands in the table
                verdicts.append(f"FAILS: {type(error).__name__}")
                print(f"{title(path)}, {target}: {error}", file=sys.stderr)
                continue
        verdicts.append(f"{time.process_time() - start:.2f}")
        counts = Counter(str(p["operator"]) for p in report["pieces"])
    return " ".join(f"{n} {op}" for op, n in sorted(counts.items())), verdicts


def summary(rows: list[Row]) -> str:
    """How many compile, how far off the worst is, and which are refused."""
    refused = [r for r in rows if r.refused]
    lines = [f"{len(rows)} files; {len(rows) - len(refused)} compile to all targets."]
    lines += [f"{r.cells[0]}: {r.refused}." for r in refused]
    return " ".join(lines)


def _exported(folder: Path) -> Iterator[Path]:
    """Every export that the tests make, made afresh; what cannot be exported is told on stderr."""
    from tests.passes import exports
    from tests.passes.test_zoo import EXPORTED

    for name in sorted(EXPORTED):
        try:
            with contextlib.redirect_stdout(sys.stderr):  # the exporter talks
                path = exports.export(*name.split("__"), folder)
        except Exception as error:  # torch's exporter raises what it likes
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        yield path


def main() -> None:
    """Prints the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--exports", action="store_true", help="also what the tests export")
    chosen = parser.parse_args()
    print(f"# Models as exporters write them\n\n{(__doc__ or '').split(chr(10) * 2)[2]}\n")
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
    rows = []
    with tempfile.TemporaryDirectory(prefix="pfmc-zoo-") as folder:
        afresh = _exported(Path(folder)) if chosen.exports else ()
        for path in itertools.chain(files([ZOO, *chosen.folders]), afresh):
            rows.append(row(path))
            print(rows[-1], flush=True)
    print(f"\n{summary(rows)}")


if __name__ == "__main__":
    main()
