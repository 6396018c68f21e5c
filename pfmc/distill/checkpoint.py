"""Checkpoints of a training under way, and stopping it between two steps when a signal arrives."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from types import FrameType
from typing import Any

import torch

from pfmc.distill.train import Training, load_state
from pfmc.errors import CorruptError, FileError, UsageError

FILE = "checkpoint.pt"


def save(path: Path, training: Training, key: str) -> None:
    """Writes the whole state; all processes must call it, the first one writes.

    Args:
        path: the file, replaced at once.
        training: between two steps.
        key: digest of what is trained on what, checked when it is loaded.

    Raises:
        FileError: the disk is full.
    """
    state = {
        "key": key, "step": training.step, "steps": training.steps,
        "history": training.history, "best": training.best, "worse": training.worse,
        "model": training.processes.state(training.trainee.student),
        "buffers": {n: b.clone() for n, b in training.trainee.student.state_dict().items()
                    if n not in dict(training.trainee.student.named_parameters())},
        "optimiser": _moments(training),
    }  # fmt: skip
    if training.processes.rank:
        return
    part = path.with_suffix(".part")
    try:
        torch.save(state, part)
    except (OSError, RuntimeError) as error:  # torch tells of a full disk by a RuntimeError
        part.unlink(missing_ok=True)
        raise FileError(
            "the checkpoint cannot be written", where=str(path),
            mend="make room on the disk; the same command goes on from the checkpoint before",
        ) from error  # fmt: skip
    part.replace(path)


def _moments(training: Training) -> list[dict[str, Any]]:
    """Adam's moments of each parameter, whole, in the order of its groups."""
    found = []
    for group in training.optimiser.param_groups:
        for parameter in group["params"]:
            held = training.optimiser.state.get(parameter, {})
            found.append({k: training.processes.whole(v) for k, v in held.items()})
    return found


def steps_of(path: Path, key: str) -> int | None:
    """The steps that an interrupted training was planned for; None without a checkpoint."""
    state = _read(path, key)
    return None if state is None else int(state["steps"])


def resume(path: Path, training: Training, key: str) -> bool:
    """Puts a training where its checkpoint left it; says whether there was one.

    Raises:
        UsageError: the checkpoint is of another model, or of other options.
    """
    state = _read(path, key)
    if state is None:
        return False
    student = training.trainee.student
    load_state(student, state["model"])
    student.load_state_dict(state["buffers"], strict=False)
    parameters = [p for g in training.optimiser.param_groups for p in g["params"]]
    for parameter, held in zip(parameters, state["optimiser"], strict=True):
        if held:
            training.optimiser.state[parameter] = {
                k: training.processes.like(v, parameter) for k, v in held.items()
            }
    training.step, training.steps = state["step"], state["steps"]
    training.history, training.best = state["history"], state["best"]
    training.worse = state["worse"]
    return True


def _read(path: Path, key: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, UnpicklingError) as error:
        raise CorruptError(
            "the checkpoint cannot be read", where=str(path), mend="remove it and start again"
        ) from error
    if state.get("key") != key:
        raise UsageError(
            "the checkpoint here is of another model or of other options", where=str(path),
            mend="give another folder with -o, or --force to start again",
        )  # fmt: skip
    return state


class Stop:
    """Whether SIGINT or SIGTERM has arrived; see `held_back`."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self, number: int, _: FrameType | None) -> None:
        """Takes note of a signal."""
        self.signal = number


@contextmanager
def held_back() -> Iterator[Stop]:
    """Holds SIGINT and SIGTERM back, so that the loop can save; they take effect at the end."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stop.signal is not None:
        signal.raise_signal(stop.signal)
