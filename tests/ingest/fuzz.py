"""Throws damaged models at ingest, lint, canonicalisation and ``pfmc inspect``; finds what breaks.

A finding is any exception but a clean refusal, an internal error, a crash of the process, more
than ten CPU seconds or more than a gigabyte. By hand, for an hour on one core::

    nice -n 19 python -m tests.ingest.fuzz --seconds 3600 --out findings

Each finding is a file there, named by what went wrong; mended, it goes into ``corpus/``, which
`test_fuzz.py` runs through the same `probe`, with a few hundred fresh cases from a fixed seed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from . import fuzz_mutations, fuzz_seeds

SECONDS = 10
MEMORY_BYTES = 1 << 30
BATCH = 2000
STALL_S = 120  # of wall time, for code that does not come back to Python
_WEIGHTS = b"\x01\x02\x03\x04" * 1024  # a file for the external data of seeds and mutants


class SlowError(BaseException):
    """A case took too long."""


def probe(path: Path) -> None:
    """Does everything that a user may do first with a model; a clean refusal is no error.

    Raises:
        Exception: a finding.
    """
    heard = _Heard()
    logging.getLogger().addHandler(heard)
    try:
        _probe(path)
    finally:
        logging.getLogger().removeHandler(heard)
    assert not heard.errors, heard.errors  # a traceback on the user's screen


class _Heard(logging.Handler):
    """Remembers exceptions that were only logged."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[object] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.errors.append(record.exc_info[1])


def _probe(path: Path) -> None:
    from pfmc import ingest
    from pfmc.errors import InternalError, PfmcError
    from pfmc.lint import lint
    from pfmc.passes import pipeline, recipe

    steps = recipe.load("stream").passes
    settings = pipeline.Settings(reproducer=path.parent / "crash")
    try:
        pipeline.canonicalise(ingest.load(path).model, steps, settings=settings)
    except InternalError:
        raise
    except PfmcError as error:
        told = str(error).strip()
    else:
        told = "accepted"
    assert told
    found = lint(path)
    found.to_text(), found.to_json()
    broken = [f for f in found.findings if "this is a bug of pfmc" in f.mend]
    assert not broken, broken
    for options in ([], ["--json"]):
        code, out = _inspect(path, options)
        assert code in (0, 3), out


def _inspect(path: Path, options: list[str]) -> tuple[int, str]:
    from pfmc import cli

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = cli._run(["inspect", str(path), *options])
    return code, out.getvalue()


def cases(seed: int) -> Iterator[bytes]:
    """Damaged models without end; the same for the same seed and the same seeds on disk."""
    rng = random.Random(seed)
    seeds = fuzz_seeds.small()
    while True:
        yield fuzz_mutations.damaged(rng, rng.choice(seeds), seeds)


def place(folder: Path) -> Path:
    """Where cases are put in `folder`, beside a file of weights."""
    (folder / "weights.bin").write_bytes(_WEIGHTS)
    return folder / "model.onnx"


# -- by hand -------------------------------------------------------------------------------------


def worker(seed: int, count: int, folder: Path, rich: bool) -> None:
    """Runs `count` cases; each finding is printed as one line and kept."""
    path = place(folder)
    rng = random.Random(seed)
    seeds = fuzz_seeds.everything() if rich else fuzz_seeds.small()
    probe(_write(path, seeds[0]))  # imports count for nobody
    signal.signal(signal.SIGPROF, _too_slow)
    limit = _address_space() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    for index in range(count):
        data = fuzz_mutations.damaged(rng, rng.choice(seeds), seeds)
        _write(path, data)
        print(f"at {index}", flush=True)
        try:
            with _watched():
                probe(path)
        except (Exception, SlowError) as error:
            name = _name(error)
            kept = folder / "findings" / f"{name}.onnx"
            kept.parent.mkdir(exist_ok=True)
            if not kept.exists() or kept.stat().st_size > len(data):
                kept.write_bytes(data)
                kept.with_suffix(".txt").write_text(traceback.format_exc(), errors="replace")
            print(f"found {name}", flush=True)


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _too_slow(_: int, __: FrameType | None) -> None:
    raise SlowError(f"more than {SECONDS} CPU s")


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _name(error: BaseException) -> str:
    """What a finding is called: its kind and the innermost place in pfmc."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/pfmc/" in f.filename]
    spot = f"{Path(frames[-1].filename).stem}-{frames[-1].lineno}" if frames else "nowhere"
    text = re.sub(r"[^A-Za-z]+", "-", str(error))[:40]
    return f"{type(error).__name__}-{spot}-{text}".strip("-")


def hunt(seconds: float, first: int, out: Path, rich: bool) -> int:
    """Runs workers one after another until the time is over; returns how many cases ran."""
    out.mkdir(parents=True, exist_ok=True)
    end, seed, ran = time.monotonic() + seconds, first, 0
    while time.monotonic() < end:
        with tempfile.TemporaryDirectory(prefix="pfmc-fuzz-") as folder:
            ran += _batch(seed, Path(folder), out, end, rich)
        seed += 1
        print(f"seed {seed}: {ran} cases, {len(list(out.glob('*.onnx')))} findings", flush=True)
    return ran


def _batch(seed: int, folder: Path, out: Path, end: float, rich: bool) -> int:
    command = [sys.executable, "-m", "tests.ingest.fuzz", "--worker", str(seed), "--out"]
    child = subprocess.Popen(
        [*command, str(folder), *(["--rich"] if rich else [])], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(folder)}, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert child.stdout is not None
    ran, told = 0, []
    signal.signal(signal.SIGALRM, lambda *_: child.kill())
    for line in child.stdout:
        signal.alarm(STALL_S)
        if line.startswith("at "):
            ran += 1
        else:
            told.append(line)
            if line.startswith("found "):
                print(line.strip(), flush=True)
        if time.monotonic() > end:
            break
    signal.alarm(0)
    over = time.monotonic() > end
    if over:
        child.kill()
    code = child.wait()
    if code and not over:  # a crash or a stall: the case that did it is still there
        (out / f"crash-{seed}.onnx").write_bytes((folder / "model.onnx").read_bytes())
        (out / f"crash-{seed}.txt").write_text(f"exit code {code}\n" + "".join(told[-50:]))
    for kept in (folder / "findings").glob("*"):
        (out / kept.name).write_bytes(kept.read_bytes())
    return ran


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("findings"))
    parser.add_argument("--rich", action="store_true", help="also onnx's node models and the zoo")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker is not None:
        worker(asked.worker, BATCH, asked.out, asked.rich)
        return 0
    ran = hunt(asked.seconds, asked.seed, asked.out, asked.rich)
    found = sorted(p.name for p in asked.out.glob("*.onnx"))
    print(f"{ran} cases, {len(found)} findings", *found, sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
