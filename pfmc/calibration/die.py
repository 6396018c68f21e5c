"""One die on the bench: its machine, what its layers were meant to do, data, the float truth."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import nn

from pfmc import ingest, store
from pfmc.against_source import drive_of, find_source
from pfmc.calibration import beside, measured
from pfmc.distill.batching import batch_of, freed
from pfmc.distill.corpus import lesson_of
from pfmc.distill.course import Course
from pfmc.distill.lessons import Language, Lesson
from pfmc.distill.side import Plant, Side
from pfmc.distill.side_fit import Fitter, importance_of
from pfmc.distill.side_linear import MeasuredLinear
from pfmc.distill.student import Student
from pfmc.distill.teacher import Teacher
from pfmc.errors import UsageError
from pfmc.passes import pipeline
from pfmc.passes import recipe as recipes
from pfmc.passes.base import Context
from pfmc.simulate import Machine
from pfmc.with_adapter import find_adapter, has_adapter, merged_source

Progress = Callable[[str], None]

FITTED_ROWS = 32
"""Samples that the closed forms are fitted on."""
IMPORTANCE_ROWS = 8


def require_noisy(machine: Machine) -> None:
    """Refuses hardware whose dies are all alike.

    Raises:
        UsageError: there is nothing to calibrate.
    """
    if machine.target.exact:
        raise UsageError(
            f"every die of {machine.technology.name} is the same: there is nothing to correct",
            where=str(machine.path), mend="pfmc distill mends what number formats cost",
        )  # fmt: skip
    if not machine.technology.noise:
        raise UsageError(
            f"{machine.technology.name} has no noise: there is nothing to correct",
            where=str(machine.path),
        )


@dataclass(frozen=True)
class Data:
    """Where samples come from, and the source model if it moved.

    Attributes:
        text, inputs: files; by default a language model writes its own text.
        model, adapter: what the artifact was compiled from.
    """

    text: Path | None = None
    inputs: Path | None = None
    model: Path | None = None
    adapter: Path | None = None


@dataclass
class Bench:
    """A die and what is known about it.

    Attributes:
        machine: the artifact on this die. model: its graph without corrections.
        present: corrections that it had.
        source: the file it was compiled from.
        lesson: samples as the artifact takes them; teacher: the untouched float model.
        plants: every layer as measured and as meant. student: the die in front of `lesson`.
        tokens: see `pfmc.distill.side_linear.CorrectedLinear`.
    """

    machine: Machine
    model: ir.Model
    present: dict[str, Side]
    source: Path
    lesson: Lesson
    teacher: Teacher
    plants: dict[str, Plant]
    student: Student
    tokens: dict[str, float]
    importance: dict[str, Any]

    @staticmethod
    def of(
        machine: Machine, data: Data, course: Course, folder: Path, file: Path | None,
        progress: Progress,
    ) -> Bench:  # fmt: skip
        """Sets everything up; `folder` keeps made-up samples, `file` holds measurements."""
        require_noisy(machine)
        source = find_source(machine, data.model)
        with merged_source(machine, source, data.adapter) as truth:
            untouched = Student(freed(canonical_source(machine, truth))).eval()
            _require_free(untouched.model, machine)
            lesson = _lesson(machine, untouched, data, course, folder, progress)
        teacher = Teacher(untouched, lesson, course.micro)
        model = ir.load(machine.path / "model.onnx")
        present = beside.take(model)
        tokens = beside.token_tops(model)
        model = freed(model)
        _require_free(model, machine)
        lesson = _as_taken(lesson, model)
        ideal = Student(model).eval()
        feeds = lesson.feeds(range(min(FITTED_ROWS, lesson.rows)))
        progress("calibrate: measuring the die")
        layers, plants = _layers(machine, ideal, feeds, file)
        importance = importance_of(ideal, lesson, IMPORTANCE_ROWS, course.seed)
        student = Student(model, layers).eval()
        return Bench(
            machine, model, present, source, lesson, teacher, plants, student, tokens, importance
        )

    def origins(self, adapter: Path | None) -> dict[str, Path]:
        """What the artifact was compiled from, by name: the source, and its adapter if any."""
        found = {"source": self.source}
        if has_adapter(self.machine):
            found["adapter"] = find_adapter(self.machine, adapter)
        return found

    @property
    def weights(self) -> int:
        """Fixed weights of all layers."""
        return sum(p.wanted.size for p in self.plants.values())

    def fitter(self) -> Fitter:
        """Fits closed forms, in front of a die whose layers are exactly as measured."""
        layers: dict[str, nn.Module] = {
            n: MeasuredLinear(p.matrix, p.constant) for n, p in self.plants.items()
        }
        feeds = self.lesson.feeds(range(min(FITTED_ROWS, self.lesson.rows)))
        student = Student(self.model, layers).eval()
        return Fitter(student, self.plants, feeds, self.tokens, self.importance)


def canonical_source(machine: Machine, source: Path) -> ir.Model:
    """The float model after the artifact's passes: the same function, quick to write text with."""
    held = machine.manifest["config"]
    body = {k: v for k, v in held["recipe"].items() if k != "name"}
    plan = recipes.parse(body, held["recipe"]["name"])
    context = Context(limits=machine.target.limits(machine.technology), seed=held["seed"])
    return pipeline.canonicalise(ingest.load(source).model, plan.passes, context).model


def _lesson(
    machine: Machine, untouched: Student, data: Data, course: Course, folder: Path,
    progress: Progress,
) -> Lesson:  # fmt: skip
    tokenizer = machine.path / "tokenizer" / "tokenizer.json"
    key = json.dumps(machine.manifest["config"]["inputs"], sort_keys=True)
    return lesson_of(
        untouched, course, folder=folder, key=key,
        tokenizer=tokenizer if tokenizer.is_file() else None, text=data.text, inputs=data.inputs,
        progress=lambda line: progress(line.replace("distill:", "calibrate:", 1)),
    )  # fmt: skip


def _require_free(model: ir.Model, machine: Machine) -> None:
    """Refuses a graph that cannot be run on many whole samples at once (UsageError)."""
    lead, batch = drive_of(model), batch_of(model)
    few = lead.length if lead is not None and lead.memories else None
    if batch is not None or few is not None:
        takes = f"{few} tokens a call" if batch is None else f"{batch} samples at once"
        raise UsageError(
            f"the graph takes {takes}, and calibration needs many", where=str(machine.path),
            mend="export the model with a free batch and a free length, and compile it again",
        )  # fmt: skip


def _as_taken(lesson: Lesson, model: ir.Model) -> Lesson:
    """The lesson for the artifact's graph, whose inputs may be other ones (a KV memory)."""
    own = drive_of(model)
    return replace(lesson, drive=own) if isinstance(lesson, Language) and own else lesson


def _layers(
    machine: Machine, ideal: Student, feeds: Mapping[str, Any], file: Path | None
) -> tuple[dict[str, nn.Module], dict[str, Plant]]:
    """The die's layers, and what they were measured to be."""
    meant = measured.nominal(ideal)
    if file is not None:
        plants = measured.read_measured(file, meant)
        return {n: MeasuredLinear(p.matrix, p.constant) for n, p in plants.items()}, plants
    stored = store.read_layers(machine.path)
    layers = {s.name: machine.target.layer(s, machine.technology, machine.die) for s in stored}
    spread = measured.input_spread(ideal, feeds)
    seed = machine.die.seed or 0
    return dict(layers), measured.probed_layers(layers.items(), meant, spread, seed)
