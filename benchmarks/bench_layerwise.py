"""Rounds a 1.16e9-parameter fp16 Llama layer by layer on calibration data: peak memory, CPU time.

Every layer is rounded by `compensate` on what the layers rounded before it give, so both streams of
the model run. The goal is three times the largest layer in float32 and 500 MB; mapped pages of the
input file count. All 20 layers peak at 1,209 MB in 1,312 CPU s (one layer: 1,164 MB in 143).

    python -m benchmarks.bench_layerwise [--folder DIR] [--layers N]
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks import process
from benchmarks.figure import Figure
from benchmarks.synthetic import Shape, generate, main, placed

SEQUENCES, LENGTH = 4, 32
SETTINGS = (
    "quantise.prefix=rounded", f"calibration.sequences={SEQUENCES}", f"calibration.length={LENGTH}",
)  # fmt: skip


def figures(folder: Path | None = None, layers: int = Shape.layers) -> Iterator[Figure]:
    """Peak memory and CPU time of the compile.

    Args:
        folder: where the model lies or is generated, and is kept; a temporary one by default.
        layers: decoder layers; 20 give 1.16e9 parameters.
    """
    shape = Shape(layers=layers)
    with placed(folder, "model.onnx", generate, shape) as place:
        yield from _measured(place, shape)


def _measured(folder: Path, shape: Shape) -> Iterator[Figure]:
    ids = np.random.default_rng(0).integers(0, shape.vocabulary, (SEQUENCES, LENGTH))
    np.savez(folder / "ids.npz", input_ids=ids)
    out = folder / "layerwise.pfm"
    settings = [word for s in SETTINGS for word in ("--set", s)]
    done = process.run(process.pfmc(
        "compile", str(folder / "model.onnx"), "--target", "rom", "-o", str(out), "--force",
        "--input", str(folder / "ids.npz"), *settings,
    ))  # fmt: skip
    shutil.rmtree(out)
    largest = max(4 * np.prod(dims) for _, dims in shape.weights() if len(dims) == 2) / 1e6
    name = f"layer by layer, {shape.parameters / 1e9:.2f}e9 parameters, fp16 to rom at 4 bits"
    beside = f"largest layer {largest:.0f} MB in float32"
    yield Figure(f"{name}, peak", done.peak_bytes / 1e6, "MB", 3 * largest + 500, beside=beside)
    yield Figure(name, done.cpu_s, "CPU s")


if __name__ == "__main__":
    main(figures)
