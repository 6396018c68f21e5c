"""The CPU time of a distillation step beside a plain float training step of the same torch model.

    python -m benchmarks.bench_distill [MODEL.onnx]

The plain step is cross-entropy of the next token on the float model with the same Adam, batch and
length; both run in this process, one thread, in turns, the least of several runs of each.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import torch
from torch.nn import functional

from benchmarks.figure import Figure, table
from pfmc.compile import Options
from pfmc.distill.batching import freed
from pfmc.distill.lessons import Language
from pfmc.distill.processes import Processes
from pfmc.distill.student import Student
from pfmc.distill.train import Training
from pfmc.distillation import Choices, Run, keep_freed_memory

BARD = Path(__file__).resolve().parent.parent / "models" / "bard" / "model.onnx"
SETTINGS = ("distill.sequences=48", "calibration.sequences=4", "quantise.search=clip")
TARGETS = {"rom": (), "crossbar": ("distill.age_s=86400",)}
REPEATS, STEPS, GOAL = 5, 100, 1.7


def plain(run: Run, training: Training) -> Callable[[], object]:
    """A step of ordinary training."""
    model = Student(freed(run.prepared.teacher)).train()
    optimiser = torch.optim.Adam(model.parameters(), 1e-6, fused=True)
    lesson = cast(Language, training.lesson)
    feeds = lesson.feeds(training.rows(0))
    ids = torch.as_tensor(feeds[lesson.drive.ids])[:, 1:].flatten()

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        scores = model(**feeds)[lesson.drive.logits][:, :-1].flatten(0, 1)
        functional.cross_entropy(scores, ids).backward()
        optimiser.step()

    return step


def at(training: Training, number: int) -> Callable[[], object]:
    """The distillation steps of one die from `number` on: late ones emulate output converters."""

    def step() -> None:
        for k in range(training.course.die_steps):
            training.step = number + k
            training.advance()

    return step


def in_turns(steps: dict[str, tuple[Callable[[], object], int]]) -> dict[str, float]:
    """The least CPU seconds of each call, which makes so many steps."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(REPEATS):
        for name, (step, count) in steps.items():
            start = time.process_time()
            step()
            found[name].append((time.process_time() - start) / count)
    return {name: min(times) for name, times in found.items()}


def figures(model: Path = BARD) -> Iterator[Figure]:
    """One figure for each target: the mean step of a course, its phases beside."""
    torch.set_num_threads(1)
    keep_freed_memory()  # for both sides
    for target, more in TARGETS.items():
        with tempfile.TemporaryDirectory() as folder:
            options = Options(target=target, settings=(*SETTINGS, *more))
            run = Run.begin(model, folder, options, Choices(), Processes(), lambda _: None)
            training = run.training()
        training.steps = STEPS
        training.teacher.remember(1 << 40)
        share = training.course.converters_from if training.trainee.converts else 1.0
        count = training.course.die_steps
        steps = {"plain": (plain(run, training), 1), "early": (at(training, 4), count)}
        if share < 1.0:
            steps["late"] = (at(training, STEPS - 2 * count), count)
        found = in_turns(steps)
        base = found["plain"]
        mean = share * found["early"] + (1 - share) * found.get("late", 0.0)
        parts = ", ".join(f"{n} {v / base:.2f}" for n, v in found.items() if n != "plain")
        beside = f"plain {base * 1e3:.0f} ms; {parts}"
        yield Figure(f"distillation step, {target}", mean / base, "x", GOAL, beside=beside)


if __name__ == "__main__":
    print(table(figures(Path(sys.argv[1]) if len(sys.argv) > 1 else BARD)))
