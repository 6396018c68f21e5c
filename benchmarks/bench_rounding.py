"""Cost of the clip search beside plain numpy rounding, in CPU seconds on one thread."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from pfmc import rounding

ROWS, COLUMNS, BITS, REPEATS = 2048, 5632, 4, 5


def plain(weight: npt.NDArray[np.float16]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Absolute maximum, divide, round, clip, int8, pack: what one would write in numpy."""
    wide = weight.astype(np.float32)
    scale = np.abs(wide).max(axis=0) / 7
    codes = np.clip(np.rint(wide / scale), -7, 7).astype(np.int8)
    return rounding.pack_int4(codes), scale


def searched(group: int) -> Callable[[npt.NDArray[np.float16]], object]:
    def run(weight: npt.NDArray[np.float16]) -> object:
        codes, scale = rounding.quantise(weight, BITS, group)
        return rounding.pack_int4(codes), scale

    return run


def cpu_seconds(run: Callable[..., object], weight: npt.NDArray[np.float16]) -> float:
    """The least of several runs."""
    taken = []
    for _ in range(REPEATS):
        start = time.process_time()
        run(weight)
        taken.append(time.process_time() - start)
    return min(taken)


def main() -> None:
    weight = np.random.default_rng(0).standard_normal((ROWS, COLUMNS), dtype=np.float32)
    half = (weight * 0.02).astype(np.float16)
    base = cpu_seconds(plain, half)
    print(f"{ROWS} x {COLUMNS} float16 to {BITS} bits, CPU s on one thread")
    print(f"plain numpy                 {base:.3f}")
    for name, group in (("clip search, per channel", 0), ("clip search, groups of 256", 256)):
        taken = cpu_seconds(searched(group), half)
        print(f"{name:27s} {taken:.3f}   {taken / base:.2f} x")


if __name__ == "__main__":
    main()
