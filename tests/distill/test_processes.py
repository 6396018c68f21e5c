"""Training on two processes gives the losses of training on one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pfmc.distill.processes import Processes
from pfmc.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (
    "calibration.sequences=2", "calibration.length=16", "distill.sequences=16",
    "distill.held_out=4", "distill.length=16", "distill.batch=4", "distill.judge_every=2",
    "distill.lr=3e-4", "distill.converters_from=1", "distill.clip_sigmas=0",
)  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(
    rank: int, count: int, port: int, model: Path, out: Path, *budget: str,
    program: tuple[str, ...] = ("-m", "pfmc"),
) -> subprocess.Popen[str]:  # fmt: skip
    joined = {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    settings = [x for s in SETTINGS for x in ("--set", s)]
    return subprocess.Popen(
        [sys.executable, *program, "distill", str(model), "-t", "crossbar", "-o", str(out),
         *(budget or ("--steps", "5")), *settings, "--json"],
        env=env | (joined if count > 1 else {}), text=True, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def losses(folder: Path) -> list[list[float]]:
    rows = (folder / "history.csv").read_text().splitlines()[1:]
    return [[float(v) for v in row.split(",")] for row in rows]


def test_two_processes_are_one(tiny: Path, tmp_path: Path) -> None:
    """Layers sharded by FSDP2 over gloo, samples shared, gradients averaged, one die for all.

    The last step, with output converters, is left out: their read noise differs from sample to
    sample.
    """
    port = free_port()
    alone = start(0, 1, port, tiny, tmp_path / "one")
    out, err = alone.communicate(timeout=200)
    assert alone.returncode == 0, err
    pair = [start(rank, 2, port, tiny, tmp_path / "two") for rank in (0, 1)]
    for process in pair:
        _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err[-3000:]
    assert json.loads(out)["steps"] == 5
    pairs = zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True)
    for one, two in list(pairs)[:-1]:
        assert two == pytest.approx(one, abs=1e-5)


UNLIKE = """
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
from pfmc import cli, distillation
from pfmc.distill import train

rank, steps, advance = int(os.environ["RANK"]), [], train.Training.advance
clock = time.process_time
distillation.time = SimpleNamespace(process_time=lambda: clock() * (1000 if rank else 1))

def planned(training, seconds):
    Path(sys.argv[6]).with_suffix(f".seconds{rank}").write_text(str(seconds))
    return 5

def interrupted(training):
    loss = advance(training)
    steps.append(training.step)
    if rank and len(steps) == 4:
        signal.raise_signal(signal.SIGINT)
    return loss

distillation.steps_for, train.Training.advance = planned, interrupted
cli.main()
"""


def test_processes_plan_save_and_stop_together(tiny: Path, tmp_path: Path) -> None:
    """One process has a faster clock, and it alone is interrupted; then both resume."""
    out = tmp_path / "d"
    for code in (130, 0):
        port = free_port()
        pair = [
            start(rank, 2, port, tiny, out, "--seconds", "1e9", program=("-c", UNLIKE))
            for rank in (0, 1)
        ]
        for process in pair:
            _, err = process.communicate(timeout=200)
            assert process.returncode == code, err[-3000:]
        assert (out / "checkpoint.pt").is_file() == bool(code)
    planned = {out.with_suffix(f".seconds{rank}").read_text() for rank in (0, 1)}
    assert len(planned) == 1
    assert [row[0] for row in losses(out)] == [0, 2, 4, 5]


def test_samples_are_shared_evenly_or_refused() -> None:
    assert Processes(1, 2).share([5, 6, 7, 8]) == [7, 8]
    with pytest.raises(UsageError, match="3 samples a step cannot be shared by 2"):
        Processes(0, 2).share([1, 2, 3])
