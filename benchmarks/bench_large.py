"""Compiles a 1.16e9-parameter fp16 Llama to `rom` at 4 bits beside its floor, in one run.

The floor reads every weight, rounds it with plain numpy (absolute maximum per channel, divide,
round, clip, int8, pack) and writes it packed: one process, one thread. Peak memory is the largest
resident set of the process, mapped pages of the input file included.

    python -m benchmarks.bench_large [--folder DIR] [--layers N]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks import process
from benchmarks.bench_checkpoint import CANONICAL
from benchmarks.figure import Figure, table
from benchmarks.synthetic import Shape, generate, placed


def floor(folder: Path, shape: Shape) -> None:
    """Reads, rounds and writes every matrix of the model in `folder` once."""
    from pfmc.rounding import pack_int4

    offset = 0
    with (folder / "floor.bin").open("wb") as out, (folder / "model.data").open("rb") as data:
        for _, dims in shape.weights():
            count = int(np.prod(dims))
            data.seek(offset)
            half = np.fromfile(data, np.float16, count).reshape(dims)
            offset += 2 * count
            if len(dims) == 2:
                wide = half.astype(np.float32)
                scale = np.abs(wide).max(axis=0) / 7
                codes = np.clip(np.rint(wide / scale), -7, 7).astype(np.int8)
                out.write(scale.tobytes())
                out.write(pack_int4(codes).tobytes())


def figures(folder: Path | None = None, layers: int = Shape.layers) -> Iterator[Figure]:
    """CPU time and peak memory of the compile, and their ratio to the floor's.

    Args:
        folder: where the model lies or is generated, and is kept; a temporary one by default.
        layers: decoder layers; 20 give 1.16e9 parameters.
    """
    shape = Shape(layers=layers)
    with placed(folder, "model.onnx", generate, shape) as place:
        yield from _compared(place, shape)


def _compared(folder: Path, shape: Shape) -> Iterator[Figure]:
    base = [sys.executable, "-m", "benchmarks.bench_large", "--floor", "--folder", str(folder)]
    base += ["--layers", str(shape.layers)]
    low = min((process.run(base) for _ in range(2)), key=lambda c: c.cpu_s)
    (folder / "floor.bin").unlink()
    canonical = min(
        (process.run([sys.executable, "-c", CANONICAL, str(folder / "model.onnx")])
         for _ in range(2)), key=lambda c: c.cpu_s,
    )  # fmt: skip
    size = sum(p.stat().st_size for p in folder.glob("model.*")) / 1e9
    front = f"ONNX file of {size:.1f} GB loaded and canonical, imports included"
    yield Figure(front, canonical.cpu_s, "CPU s", 1.5)
    yield Figure(f"{front}, peak", canonical.peak_bytes / 1e6, "MB", 250.0)
    out = folder / "large.pfm"
    command = process.pfmc(
        "compile", str(folder / "model.onnx"), "--target", "rom", "--recipe", "stream",
        "-o", str(out), "--force",
    )  # fmt: skip
    ours = process.run(command)
    phases = json.loads((out / "provenance" / "timing.json").read_bytes())["cpu_s"]
    shutil.rmtree(out)
    name = f"pfmc compile, {shape.parameters / 1e9:.2f}e9 parameters, fp16 to rom at 4 bits"
    floor_s = f"floor: {low.cpu_s:.1f} CPU s to read, round, write"
    spent = ", ".join(f"{k} {v:.1f}" for k, v in phases.items() if v >= 0.1)
    yield Figure(name, ours.cpu_s, "CPU s", beside=spent)
    yield Figure(f"{name}, to floor", ours.cpu_s / low.cpu_s, "x", 6.0, beside=floor_s)
    yield Figure(
        f"{name}, peak", ours.peak_bytes / 1e6, "MB", 1500.0,
        beside=f"floor: {low.peak_bytes / 1e6:.0f} MB",
    )  # fmt: skip


def main() -> None:
    """Parses the command line, measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--floor", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.floor:
        floor(chosen.folder, Shape(layers=chosen.layers))
    else:
        print(table(figures(chosen.folder, chosen.layers)))


if __name__ == "__main__":
    main()
