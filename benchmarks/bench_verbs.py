"""CPU seconds of the light verbs, and of compiling and verifying the shipped model.

    python -m benchmarks.bench_verbs
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import process
from benchmarks.figure import Figure, table
from pfmc.cli.models import shipped_model

REPEATS = 3
TARGETS = ("rom", "crossbar", "optical")


def least(command: list[str]) -> process.Cost:
    """The cheapest of several runs."""
    return min((process.run(command) for _ in range(REPEATS)), key=lambda c: c.cpu_s)


def figures() -> Iterator[Figure]:
    """Help, inspect, then compile and verify for each target."""
    model = str(shipped_model())
    empty = least([sys.executable, "-c", "pass"])
    floor = f"python -c pass: {empty.cpu_s:.3f} CPU s"
    yield Figure("pfmc --help", least(process.pfmc("--help")).cpu_s, "CPU s", 0.25, beside=floor)
    inspect = least(process.pfmc("inspect", model))
    yield Figure(
        "pfmc inspect, shipped model", inspect.cpu_s, "CPU s", 1.0,
        beside=f"{inspect.peak_bytes / 1e6:.0f} MB",
    )  # fmt: skip
    yield Figure("torch modules loaded by pfmc inspect", _torch_modules(model), "", 0)
    with tempfile.TemporaryDirectory(prefix="pfmc-bench-") as folder:
        for target in TARGETS:
            yield from _artifact(model, target, Path(folder) / f"{target}.pfm")


def _artifact(model: str, target: str, out: Path) -> Iterator[Figure]:
    made = process.run(process.pfmc("compile", model, "--target", target, "-o", str(out)))
    phases = json.loads((out / "provenance" / "timing.json").read_bytes())["cpu_s"]
    slow = sorted(phases, key=lambda k: -phases[k])[:3]
    yield Figure(
        f"pfmc compile --target {target}, shipped model", made.cpu_s, "CPU s", 30.0,
        beside=", ".join(f"{k} {phases[k]:.2f}" for k in slow),
    )  # fmt: skip
    checked = process.run(process.pfmc("verify", str(out)))
    beside = f"{checked.peak_bytes / 1e6:.0f} MB"
    yield Figure(f"pfmc verify, {target}", checked.cpu_s, "CPU s", beside=beside)


def _torch_modules(model: str) -> int:
    code = (
        "import sys\nfrom pfmc.cli import main\n"
        "try:\n    main(['inspect', sys.argv[1]])\n"
        "finally:\n    print(sum(m.split('.')[0] == 'torch' for m in sys.modules),"
        " file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, model], capture_output=True, text=True, check=True
    )
    return int(done.stderr.splitlines()[-1])


if __name__ == "__main__":
    print(table(figures()))
