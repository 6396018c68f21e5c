"""Compiles a 1.16e9-parameter fp16 Llama to `rom` at 4 bits beside its floor, in one run.

The floor reads every weight, rounds it with plain numpy (absolute maximum per channel, divide,
round, clip, int8, pack) and writes it packed: one process, one thread. Peak memory includes mapped
pages of the input file that the system keeps; they are its cache, not ours.

    python -m benchmarks.bench_large [--folder DIR] [--layers N]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import process
from benchmarks.synthetic import Shape, generate


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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--floor", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    shape = Shape(layers=chosen.layers)
    if chosen.floor:
        floor(chosen.folder, shape)
        return
    with tempfile.TemporaryDirectory(prefix="pfmc-bench-") as temporary:
        folder = chosen.folder or Path(temporary)
        if not (folder / "model.onnx").is_file():
            generate(folder, shape)
        _compare(folder, shape)


def _compare(folder: Path, shape: Shape) -> None:
    base = [sys.executable, "-m", "benchmarks.bench_large", "--floor", "--folder", str(folder)]
    low = process.run([*base, "--layers", str(shape.layers)])
    out = folder / "large.pfm"
    command = process.pfmc(
        "compile", str(folder / "model.onnx"), "--target", "rom", "--recipe", "stream",
        "-o", str(out), "--force",
    )  # fmt: skip
    ours = process.run(command)
    print(f"{shape.parameters:,} parameters, float16, to rom at 4 bits, one thread")
    print(f"{'':28s}{'CPU s':>9s}{'peak MB':>10s}")
    print(f"{'floor: read, round, write':28s}{low.cpu_s:9.1f}{low.peak_bytes / 1e6:10.0f}")
    print(f"{'pfmc compile':28s}{ours.cpu_s:9.1f}{ours.peak_bytes / 1e6:10.0f}")
    print(f"ratio {ours.cpu_s / low.cpu_s:.2f} (goal <= 6), peak goal <= 1500 MB")


if __name__ == "__main__":
    main()
