"""`calibrate`: from an artifact and one die to an artifact that is corrected for this die.

First closed forms (`pfmc.distill.side_fit`), then distillation of the corrections against the
untouched float model on the very die, read noise and all. What is kept is what is best on held-out
samples: never worse than the die was before.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import pfmc
from pfmc import simulate
from pfmc.artifact import Writer, canonical_json, sha256_given
from pfmc.calibration import notice, writing
from pfmc.calibration.choices import Calibration, Choices
from pfmc.calibration.die import Bench, Data, require_noisy
from pfmc.distill import checkpoint
from pfmc.distill.side import Side
from pfmc.distill.side_linear import SideTrainee, side_trainee
from pfmc.distill.train import Figures, Training, steps_for, told
from pfmc.errors import UsageError
from pfmc.simulate import Machine
from pfmc.targets.base import Die

Progress = Callable[[str], None]
Sides = Mapping[str, Side]

SAVE_EVERY_S = 60.0


def calibrate(
    source: str | Path, out: str | Path, *, choices: Choices | None = None,
    data: Data | None = None, progress: Progress = lambda _: None,
) -> Calibration:  # fmt: skip
    """Corrects one die of an artifact.

    Args:
        source: a finished artifact, calibrated before or not.
        out: the artifact to write; shares its tiles.
        choices, data: how, and on what.
        progress: takes a line at a time.

    Raises:
        UsageError: nothing to correct, a budget too small, no data.
        InputError: measurements that do not fit the model.
    """
    choices, data, began = choices or Choices(), data or Data(), time.process_time()
    torch.set_num_threads(choices.threads)
    place, made = Path(source), Path(out)
    machine = simulate.describe_machine(place, Die(choices.die, choices.age_s, True))
    if made.exists() and made.samefile(place):
        raise UsageError("the copy needs another name", where=str(made), mend="give one with -o")
    require_noisy(machine)
    config, request = _config(machine, choices, data)
    with Writer(made, force=choices.force) as writer:
        if finished := writer.current(request):
            notes = writing.report_of(made)["passes"]["calibrate"]
            return Calibration(finished, notes, ready=True)
        run = _Run(machine, choices, data, writer, request, progress, began)
        sides, notes, origins = run.fit()
        body = {"config": config, "request_sha256": request}
        done = writing.write(writer, machine, sides, body, notes, origins)
    return Calibration(done, notes, cpu_s=time.process_time() - began)


def _config(machine: Machine, choices: Choices, data: Data) -> tuple[dict[str, Any], str]:
    """The new manifest's configuration, and the digest of all that decides the result."""
    files = {"text": data.text, "inputs": data.inputs, "measured": choices.measured}
    asked = {
        "die": choices.die, "age_s": choices.age_s, "share": choices.share, "rank": choices.rank,
        "only_gain": choices.only_gain, "course": asdict(choices.course),
        "of": machine.manifest.tree, "pfmc": pfmc.__version__,
        "data": {k: None if p is None else sha256_given(p) for k, p in files.items()},
    }  # fmt: skip
    config = {**machine.manifest["config"], notice.KEY: asked}
    return config, hashlib.sha256(canonical_json(config)).hexdigest()


@dataclass
class _Run:
    """One calibration under way."""

    machine: Machine
    choices: Choices
    data: Data
    writer: Writer
    key: str
    progress: Progress
    began: float
    told: dict[str, Any] = field(default_factory=dict)

    def fit(self) -> tuple[dict[str, Side], dict[str, Any], dict[str, Path]]:
        """The corrections as stored, what the report says of them, and what they came from."""
        folder = self.writer.path / ".tmp"
        course, measured = self.choices.course, self.choices.measured
        bench = Bench.of(self.machine, self.data, course, folder, measured, self.progress)
        known = self._candidates(bench)
        trainee = self._trainee(bench, known)
        training = Training(trainee, bench.teacher, bench.lesson, course, 1)
        figures = {name: self._judged(training, sides) for name, sides in known.items()}
        starts = list(known)[0 if bench.present else 1 :]  # paths of nothing but zeros never learn
        name = min(starts, key=lambda n: figures[n]["loss"])
        trainee.put(known[name])
        best = {n: s.stored() for n, s in known[name].items()}
        if course.steps != 0 and (course.steps or course.seconds):
            state = self._distil(training, folder / checkpoint.FILE)
            trained = {n: s.stored() for n, s in trainee.sides(state).items()}
            figures["distilled"] = self._judged(training, trained)
            if figures["distilled"]["loss"] < figures[name]["loss"]:
                name, best = "distilled", trained
        if figures["before"]["loss"] <= figures[name]["loss"]:
            name, best = "before", bench.present
        notes = self._notes(bench, best, figures, name, training.step)
        return best, notes, bench.origins(self.data.adapter)

    def _candidates(self, bench: Bench) -> dict[str, Sides]:
        """Corrections to begin with, by name, all of the same ranks; the first is no change."""
        fitter = bench.fitter()
        gains = fitter.gains()
        ranks = self._ranks(bench, fitter.ranks)
        sizes = fitter.sizes
        none = {n: Side.none(*sizes[n], ranks[n]) for n in sizes}
        before = {n: bench.present.get(n, none[n]) for n in sizes}
        found: dict[str, Sides] = {"before": before}
        if bench.present:
            found["gain refitted"] = fitter.regained(before)
            if self.choices.only_gain:
                return found
        elif self.choices.only_gain:
            return found | {"gain": gains}
        return found | {"reconstructed": fitter.paths(ranks)}

    def _ranks(self, bench: Bench, share_out: Callable[[int], dict[str, int]]) -> dict[str, int]:
        """The rank of every layer; the memory of a corrected die stays as large as it is."""
        sizes = {n: p.wanted.shape for n, p in bench.plants.items()}
        if bench.present:
            return {n: bench.present[n].rank if n in bench.present else 0 for n in sizes}
        if self.choices.only_gain:
            return dict.fromkeys(sizes, 0)
        if self.choices.rank is not None:
            return {n: min(self.choices.rank, *size) for n, size in sizes.items()}
        trims = sum(2 * size[1] for size in sizes.values())
        budget = int(self.choices.share * bench.weights) - trims
        if budget < 0:
            least = trims / bench.weights
            raise UsageError(
                f"a share of {self.choices.share:g} has no room for gains and offsets",
                mend=f"--share {least:.3g} or more",
            )
        return share_out(budget)

    def _trainee(self, bench: Bench, known: Mapping[str, Sides]) -> SideTrainee:
        sides = list(known.values())[-1]
        units = {n: float(max(1e-6, abs(p.wanted).sum(axis=0).mean() / len(p.wanted) ** 0.5))
                 for n, p in bench.plants.items()}  # fmt: skip
        return side_trainee(bench.student, sides, units, bench.tokens, self.choices.only_gain)

    @staticmethod
    def _judged(training: Training, sides: Sides) -> Figures:
        """Held-out figures of corrections as they would be stored."""
        trainee = training.trainee
        assert isinstance(trainee, SideTrainee)
        trainee.put({n: s.stored() for n, s in sides.items()})
        return training.judge(converters=True)

    def _distil(self, training: Training, path: Path) -> Mapping[str, torch.Tensor]:
        """Trains on from where the trainee stands, or from a checkpoint; returns the best state."""
        course = self.choices.course
        planned = checkpoint.steps_of(path, self.key) or course.steps
        spent = time.process_time() - self.began
        training.steps = planned or steps_for(training, max(1.0, course.seconds - spent))
        training.restart()
        if checkpoint.resume(path, training, self.key):
            self.progress(f"calibrate: resumed at step {training.step}")
        training.teacher.remember(training.steps * course.batch)
        saved = time.process_time()
        with checkpoint.held_back() as stop:
            for _ in training.run(self._tell):
                now = time.process_time()
                if stop.signal is not None or now - saved > SAVE_EVERY_S:
                    checkpoint.save(path, training, self.key)
                    saved = now
                if stop.signal is not None:
                    break
        assert training.best is not None
        return training.best[2]

    def _tell(self, training: Training, figures: Figures) -> None:
        spent = time.process_time() - self.began
        self.progress(
            f"calibrate: step {training.step}/{training.steps}  {told(figures)}  {spent:.0f} CPU s"
        )

    def _notes(
        self, bench: Bench, sides: Sides, figures: Mapping[str, Figures], kept: str, steps: int
    ) -> dict[str, Any]:
        held = sum(s.parameters for s in sides.values())
        return {
            "die": self.choices.die, "age_s": self.choices.age_s, "kept": kept, "steps": steps,
            "parameters": held, "share_of_weights": held / bench.weights,
            "ranks": {n: s.rank for n, s in sides.items()}, "held_out": dict(figures),
        }  # fmt: skip
