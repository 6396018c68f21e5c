"""Runs every benchmark and prints one table with the goal beside each figure.

    python -m benchmarks [--only NAME …] [--json] [--folder DIR]

One process at a time, one thread. `--folder` keeps the 2.3 GB model of the ``large`` bench.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.figure import Figure, table, to_json
from benchmarks.process import ONE_THREAD

Bench = Callable[[argparse.Namespace], Iterator[Figure]]


def _verbs(_: argparse.Namespace) -> Iterator[Figure]:
    from benchmarks import bench_verbs

    return bench_verbs.figures()


def _simulate(_: argparse.Namespace) -> Iterator[Figure]:
    from benchmarks import bench_simulate

    return bench_simulate.figures()


def _layers(_: argparse.Namespace) -> Iterator[Figure]:
    """Single crossbar layers and blocks, by `benchmarks.bench_crossbar`."""
    import torch

    from benchmarks import bench_crossbar as bench

    torch.set_num_threads(1)
    makers = {"plain torch": bench.plain}
    makers |= {name: bench.crossbar(die) for name, die in bench.DIES.items()}
    with torch.no_grad():
        modules = {name: bench.Block(make).requires_grad_(False) for name, make in makers.items()}
        x = torch.randn(512, 256)
        steps = {name: bench.step(m, x, train=False) for name, m in modules.items()}
        found = bench.measure(steps, runs=10)
    base = found.pop("plain torch")
    for name, seconds in found.items():
        beside = f"{seconds * 1e3:.1f} ms; plain torch {base * 1e3:.1f} ms"
        yield Figure(f"decoder block of crossbars, {name}", seconds / base, "x", beside=beside)


def _rounding(_: argparse.Namespace) -> Iterator[Figure]:
    """The clip search beside plain numpy rounding, by `benchmarks.bench_rounding`."""
    import numpy as np

    from benchmarks import bench_rounding as bench

    shape = bench.ROWS, bench.COLUMNS
    weight = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    half = (weight * 0.02).astype(np.float16)
    base = bench.cpu_seconds(bench.plain, half)
    for name, group in (("per channel", 0), ("groups of 256", 256)):
        ratio = bench.cpu_seconds(bench.searched(group), half) / base
        yield Figure(f"clip search, {name}", ratio, "x", beside=f"plain numpy {base:.3f} CPU s")


def _large(chosen: argparse.Namespace) -> Iterator[Figure]:
    from benchmarks import bench_large

    return bench_large.figures(chosen.folder)


def _frontend(_: argparse.Namespace) -> Iterator[Figure]:
    from benchmarks import bench_frontend

    return bench_frontend.figures()


def _checkpoint(_: argparse.Namespace) -> Iterator[Figure]:
    from benchmarks import bench_checkpoint

    return bench_checkpoint.figures()


def _distill(_: argparse.Namespace) -> Iterator[Figure]:
    from benchmarks import bench_distill

    return bench_distill.figures()


BENCHES: dict[str, Bench] = {
    "verbs": _verbs,
    "frontend": _frontend,
    "checkpoint": _checkpoint,
    "simulate": _simulate,
    "layers": _layers,
    "rounding": _rounding,
    "distill": _distill,
    "large": _large,
}


def main() -> None:
    """Parses the command line, runs, prints; exit code 4 if a goal is missed."""
    os.environ.update(ONE_THREAD)  # before a bench loads numpy or torch
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--folder", type=Path, help="keep the large model here and reuse it")
    chosen = parser.parse_args()
    figures: list[Figure] = []
    for name in chosen.only:
        print(f"{name} …", file=sys.stderr, flush=True)
        figures += BENCHES[name](chosen)
    print(to_json(figures) if chosen.json else table(figures))
    sys.exit(4 if any(f.met is False for f in figures) else 0)


if __name__ == "__main__":
    main()
