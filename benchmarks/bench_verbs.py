"""CPU seconds of the light verbs and of compiling the shipped model to each target.

    python -m benchmarks.bench_verbs
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benchmarks import process
from pfmc.cli.models import shipped_model

REPEATS = 3


def least(command: list[str]) -> process.Cost:
    """The cheapest of several runs."""
    return min((process.run(command) for _ in range(REPEATS)), key=lambda c: c.cpu_s)


def main() -> None:
    model = str(shipped_model())
    empty = least([sys.executable, "-c", "pass"])
    print(f"{'verb':44s}{'CPU s':>8s}{'goal':>8s}{'peak MB':>9s}")
    _line("python -c pass (the floor)", empty, None)
    _line("pfmc --help", least(process.pfmc("--help")), 0.25)
    _line("pfmc inspect (shipped model)", least(process.pfmc("inspect", model)), 1.0)
    with tempfile.TemporaryDirectory(prefix="pfmc-bench-") as folder:
        for target in ("rom", "crossbar", "optical"):
            out = str(Path(folder) / f"{target}.pfm")
            command = process.pfmc("compile", model, "--target", target, "-o", out)
            _line(f"pfmc compile --target {target}", process.run(command), 30.0)


def _line(name: str, cost: process.Cost, goal: float | None) -> None:
    limit = "" if goal is None else f"{goal:8.2f}"
    print(f"{name:44s}{cost.cpu_s:8.2f}{limit:>8s}{cost.peak_bytes / 1e6:9.0f}")


if __name__ == "__main__":
    main()
