"""Times the front end: load, guard, canonicalise and raise, against onnxscript's optimiser.

    python -m benchmarks.bench_frontend [--nodes 5000 10000 50000] [--against 5000]

The graphs are Llamas of many layers of tiny width (`benchmarks.synthetic`). CPU seconds of this
process on one thread, imports not counted; every graph is made, loaded and raised afresh.
onnxscript's optimiser is quadratic and takes about 20 s at 5,000 nodes: it runs on the graph of
`--against` nodes only, beside ours on the same graph, and that ratio is printed (0 leaves it out).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.figure import Figure
from benchmarks.synthetic import Shape, generate
from pfmc.ingest.load import load
from pfmc.passes import pipeline, recipe
from pfmc.passes.base import Pass

_LAYER, _AROUND = 53, 19


@dataclass(frozen=True)
class Row:
    """One graph: its nodes, what was found in it, and CPU seconds of each step."""

    nodes: int
    linears: int
    attentions: int
    load_s: float
    raise_s: float
    onnxscript_s: float | None = None

    @property
    def total_s(self) -> float:
        """CPU seconds from the file to the canonical graph."""
        return self.load_s + self.raise_s


def make(folder: Path, nodes: int) -> Path:
    """A Llama of about so many nodes and of tiny width."""
    layers = max(1, round((nodes - _AROUND) / _LAYER))
    shape = Shape(layers=layers, hidden=32, heads=4, ffn=48, vocabulary=64)
    return generate(folder / str(nodes), shape)


def passes() -> tuple[Pass, ...]:
    """The passes of the recipe for models of any size."""
    return tuple(recipe.load("stream", ()).passes)


def measure(path: Path, against: bool = False) -> Row:
    """Loads and raises one graph; `against` lets onnxscript optimise it too."""
    start = time.process_time()
    model = load(path).model
    middle = time.process_time()
    nodes = len(model.graph)
    canonical = pipeline.canonicalise(model, passes()).model
    end = time.process_time()
    kinds = [n.op_type for n in canonical.graph]
    counts = kinds.count("FixedLinear"), kinds.count("Attention")
    theirs = onnxscript_seconds(path) if against else None
    return Row(nodes, *counts, middle - start, end - middle, theirs)


def onnxscript_seconds(path: Path) -> float:
    """CPU seconds of ``onnxscript.optimizer.optimize`` on the graph, loading not counted."""
    import onnx_ir as ir
    from onnxscript import optimizer

    model = ir.load(path)
    start = time.process_time()
    optimizer.optimize(model)
    return time.process_time() - start


def figures() -> Iterator[Figure]:
    """CPU time from the file to the canonical graph, beside onnxscript's, and how it grows."""
    with tempfile.TemporaryDirectory(prefix="pfmc-bench-") as folder:
        measure(make(Path(folder), 300))  # imports and caches
        small = make(Path(folder), 5000)
        rows = [measure(small) for _ in range(3)]
        best = min(rows, key=lambda r: r.total_s)
        theirs = onnxscript_seconds(small)
        large = measure(make(Path(folder), 50000))
    name = f"front end, {best.nodes} nodes: load, guard, canonicalise"
    beside = f"load {best.load_s:.2f}, passes {best.raise_s:.2f}"
    yield Figure(name, best.total_s, "CPU s", 1.5, beside=beside)
    yield Figure(f"{name}, to onnxscript's optimiser", best.total_s / theirs, "x", 1.0,
                 beside=f"{theirs:.1f} CPU s, its loading not counted")  # fmt: skip
    growth = (large.total_s / large.nodes) / (best.total_s / best.nodes)
    yield Figure(f"front end, a node of {large.nodes} to one of {best.nodes}", growth, "x", 1.5,
                 beside=f"{large.total_s:.1f} CPU s in all")  # fmt: skip


def main() -> None:
    """Parses the command line, measures and prints one JSON row a graph."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="*", default=[5000, 10000, 50000])
    parser.add_argument("--against", type=int, default=5000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(make(Path(folder), 300))  # imports and caches
        if options.against:
            row = measure(make(Path(folder), options.against), against=True)
            assert row.onnxscript_s is not None
            ratio = row.onnxscript_s / row.raise_s
            print(json.dumps({**asdict(row), "times_faster_than_onnxscript": round(ratio, 1)}))
        for nodes in options.nodes:
            row = measure(make(Path(folder), nodes))
            per_node = row.total_s / row.nodes * 1e6
            print(json.dumps({**asdict(row), "us_a_node": round(per_node, 1)}), flush=True)


if __name__ == "__main__":
    main()
