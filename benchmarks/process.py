"""Runs a command and says what it cost: CPU seconds and peak memory of it and its children."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ONE_THREAD = {
    name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
}


@dataclass(frozen=True)
class Cost:
    """CPU seconds (user and system), wall seconds and peak resident bytes of one command."""

    cpu_s: float
    wall_s: float
    peak_bytes: int


def run(command: Sequence[str], cwd: Path | None = None) -> Cost:
    """Runs `command` on one thread and measures it alone, in a child of its own.

    Raises:
        RuntimeError: it failed; the message holds its last words.
    """
    code = (
        "import json,resource,subprocess,sys\n"
        "done = subprocess.run(json.loads(sys.argv[1]), stdout=subprocess.DEVNULL)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(json.dumps([done.returncode, used.ru_utime + used.ru_stime, used.ru_maxrss]))"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(list(command))], capture_output=True, text=True,
        cwd=cwd, env={**os.environ, **ONE_THREAD}, check=False,
    )  # fmt: skip
    wall_s = time.perf_counter() - start
    returncode, cpu_s, peak_kib = json.loads(done.stdout)
    if returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return Cost(cpu_s, wall_s, peak_kib * 1024)


def own_peak_bytes() -> int:
    """Peak resident bytes of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def pfmc(*arguments: str) -> list[str]:
    """The command line of a pfmc call with the running interpreter."""
    return [sys.executable, "-m", "pfmc", *arguments]
