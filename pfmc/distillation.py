"""`distil_model`: from a model file to a distilled folder, which `pfmc compile --distilled` takes.

The teacher is the untouched float model; the student is the quantised model that a compile would
lower, every fixed linear trainable and noisy as the target is (`pfmc.distill.trainee`). The loop is
in `pfmc.distill.train`, what comes out in `pfmc.distilled`. The result is never worse than the
start: whichever of both is better on held-out samples, on the same dies, is kept.
"""

from __future__ import annotations

import csv
import ctypes
import hashlib
import io
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import pfmc
from pfmc import distilled
from pfmc.artifact import canonical_json, sha256_given
from pfmc.compile import Options, Prepared, prepare
from pfmc.distill import checkpoint
from pfmc.distill.batching import batch_of, freed
from pfmc.distill.corpus import lesson_of
from pfmc.distill.course import Course
from pfmc.distill.lessons import Lesson
from pfmc.distill.processes import Processes
from pfmc.distill.rule import backpropagation
from pfmc.distill.rules.method import Method
from pfmc.distill.student import IdealLinear, Student
from pfmc.distill.teacher import Teacher
from pfmc.distill.train import Figures, Training, load_state, steps_for, told
from pfmc.distill.trainee import Trainee, build
from pfmc.errors import UsageError
from pfmc.hardware import FixedLinear
from pfmc.passes.records import linear_record, quantised_linears

Progress = Callable[[str], None]

SAVE_EVERY_S = 60.0
"""CPU seconds between two checkpoints."""
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of malloc.h
_WATCHED = 4  # batches that ranges and statistics are taken from


@dataclass(frozen=True)
class Choices:
    """How a distillation runs, beside what it makes.

    Attributes:
        steps, seconds: override the recipe's ``[distill]``.
        device: ``cpu``, ``cuda`` …
        method: training rule and part (`pfmc.distill.rules.method`); None: noise-aware, masks.
        force: start again although something else is in the folder.
        threads: of torch; results are the same bytes for the same number.
    """

    steps: int | None = None
    seconds: float | None = None
    device: str = "cpu"
    method: Method | None = None
    force: bool = False
    threads: int = 1

    def __post_init__(self) -> None:
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise UsageError(f"{self.seconds} seconds are no amount of training", mend="e.g. 300")


@dataclass(frozen=True)
class Distillation:
    """A finished distillation: its folder, its manifest, whether it was there already, and time."""

    path: Path
    manifest: Mapping[str, Any]
    ready: bool = False
    cpu_s: float = 0.0


def distil_model(
    model: str | Path, out: str | Path | None = None, *, options: Options,
    choices: Choices | None = None, progress: Progress = lambda _: None,
) -> Distillation:  # fmt: skip
    """Distils `model` for a target.

    Args:
        model: an ONNX file, or the folder of a Hugging Face checkpoint.
        out: the folder to write; ``<model>-<target>.distilled`` in the current one by default.
        options: as of `compile_model`: target, recipe, settings, data, seed.
        choices: budget, device, rule.
        progress: takes one line at a time.

    Returns:
        the finished folder. Interrupted, the same command resumes; the same number of steps gives
        the same bytes, interrupted or not.

    Raises:
        PfmcError: with an exit code.
    """
    choices, began = choices or Choices(), time.process_time()
    _require_device(choices.device)
    torch.set_num_threads(choices.threads)
    keep_freed_memory()
    processes = Processes.join(choices.device)
    try:
        run = Run.begin(Path(model), out, options, choices, processes, progress)
        if (found := run.finished()) is not None:
            return Distillation(run.folder, found, ready=True)
        manifest = run.train()
        return Distillation(run.folder, manifest, cpu_s=time.process_time() - began)
    finally:
        processes.leave()


def _require_device(name: str) -> None:
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:  # no such word; torch built without it
        raise UsageError(
            f"torch cannot run on {name!r} here", where="--device", mend="--device cpu"
        ) from error


def keep_freed_memory() -> None:
    """Tells glibc to keep what is freed: training frees and takes the same large arrays at every
    step, and fetching their pages from the system each time costs more than some of the work."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            mallopt(parameter, 1 << 30)


@dataclass
class Run:
    """One distillation; `course` is the one `asked` for, as far as the graph's batch allows it."""

    prepared: Prepared
    asked: Course
    course: Course
    folder: Path
    options: Options
    choices: Choices
    processes: Processes
    progress: Progress
    began: float = field(default_factory=time.process_time)
    loop_began: tuple[float, int] = (0.0, 0)
    stacks: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def begin(
        model: Path, out: str | Path | None, options: Options, choices: Choices,
        processes: Processes, progress: Progress,
    ) -> Run:  # fmt: skip
        """Prepares the model and the folder."""
        prepared = prepare(model, options, progress)
        course = prepared.plan.distill.course(options.seed)
        if choices.steps is not None or choices.seconds is not None:
            course = replace(course, steps=choices.steps, seconds=choices.seconds or course.seconds)
        if choices.method is not None:
            choices.method.require(prepared.target, prepared.tech)
            course = choices.method.course(course)
        if choices.method is not None and choices.method.die is not None and processes.count > 1:
            raise UsageError("a prototype is trained by one process", where="--die")
        stem = model.name if model.is_dir() else model.stem
        folder = Path(out) if out else Path(f"{stem}-{prepared.tech.name}.distilled")
        if folder.exists() and not folder.is_dir():
            raise UsageError(
                "the output is a file", where=str(folder), mend="give a folder with -o"
            )
        folder.mkdir(parents=True, exist_ok=True)
        return Run(prepared, course, course, folder, options, choices, processes, progress)

    @property
    def request(self) -> dict[str, Any]:
        """Everything that decides the result."""
        o = self.options
        held = {"text": o.text, "inputs": o.inputs, "tokenizer": self.prepared.tokenizer}
        return {
            "pfmc": pfmc.__version__, "origin": self.prepared.origin,
            "course": asdict(self.asked), "rule": self._told(),
            "calibration": self.prepared.plan.canonical()["calibration"],
            "data": {k: None if p is None else sha256_given(p) for k, p in held.items()},
        }  # fmt: skip

    @property
    def key(self) -> str:
        """sha256 of `request`."""
        return hashlib.sha256(canonical_json(self.request)).hexdigest()

    def finished(self) -> dict[str, Any] | None:
        """The manifest, if the folder holds this very distillation.

        Raises:
            UsageError: it holds another one, without `force`.
        """
        found = distilled.read_manifest(self.folder)
        if found is None:
            return None
        if found.get("request_sha256") == self.key:
            return found
        if not self.choices.force:
            raise UsageError(
                "a distillation of another model, recipe or course is here", where=str(self.folder),
                mend="give another folder with -o, or --force",
            )  # fmt: skip
        (self.folder / distilled.MANIFEST).unlink(missing_ok=True)
        (self.folder / checkpoint.FILE).unlink(missing_ok=True)
        return None

    # -- training -------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Trains, or carries an interrupted training on, and writes the folder."""
        training = self.training()
        path = self.folder / checkpoint.FILE
        if self.choices.force:
            path.unlink(missing_ok=True)
        planned = checkpoint.steps_of(path, self.key) or self.course.steps
        spent = self.processes.mean(time.process_time() - self.began)
        training.steps = planned or steps_for(training, max(1.0, self.course.seconds - spent))
        self.processes.shard(training.trainee.student)
        training.restart()
        if checkpoint.resume(path, training, self.key):
            self.progress(f"distill: resumed at step {training.step}")
        training.teacher.remember(training.steps * self.course.batch)
        self._loop(training, path)
        return self._finish(training)

    def training(self) -> Training:
        """Teacher, trainee and samples, ready to be trained; one step is planned."""
        device, prepared = self.choices.device, self.prepared
        float_model, model = freed(prepared.teacher), freed(prepared.model)
        fixed = batch_of(float_model)
        if fixed is not None:
            batch = max(fixed, self.course.batch - self.course.batch % fixed)
            self.course = replace(self.course, batch=batch, micro=fixed)
        untouched = Student(float_model, device=device)
        weights = {n: _weight(m) for n, m in untouched.linears.items()}
        trainee = build(
            model, self._records(), weights, self._twin, norms=self.course.norms,
            tables=self.course.tables, device=device,
        )  # fmt: skip
        lesson = self._lesson(untouched, fixed or 1)
        teacher = Teacher(untouched, lesson, self.course.micro)
        training = Training(
            trainee, teacher, lesson, self.course, 1, backpropagation, self._converters,
            self.processes,
        )  # fmt: skip
        if self.choices.method is not None:
            self._apply(self.choices.method, training, weights)
        return training

    def _apply(
        self, method: Method, training: Training, weights: Mapping[str, torch.Tensor]
    ) -> None:
        """Another rule than the loop's own; a device keeps the converter ranges of its start."""
        training.rule, training.prototype = method.engine(), method.die
        self.stacks = method.prepare(training.trainee, weights, self.prepared.tech)
        if method.die is not None:
            training.enter_converters = None

    def _told(self) -> dict[str, Any] | str:
        return "backpropagation" if self.choices.method is None else self.choices.method.told()

    def _records(self) -> dict[str, FixedLinear]:
        known = self.prepared.statistics
        nodes = quantised_linears(self.prepared.model)
        return {str(n.name): linear_record(n, known.get(str(n.name))) for n in nodes}

    def _twin(self, record: FixedLinear) -> Any:
        return self.prepared.target.twin(record, self.prepared.tech)

    def _lesson(self, untouched: Student, multiple: int) -> Lesson:
        o = self.options
        key = json.dumps(self.prepared.origin["inputs"], sort_keys=True)
        return lesson_of(
            untouched, self.course, folder=self.folder if self.processes.count == 1 else None,
            key=key, tokenizer=self.prepared.tokenizer, text=o.text, inputs=o.inputs,
            progress=self.progress, multiple=multiple,
        )  # fmt: skip

    def _converters(self, training: Training) -> None:
        """When converters begin to count: the ranges that the target's rule chooses now."""
        records = self._settle(training)
        lower = self.prepared.target.lower_linear
        training.trainee.set_ranges(records, lambda r: lower(r, self.prepared.tech))

    def _settle(self, training: Training) -> dict[str, FixedLinear]:
        """The layers as they are now, with statistics of the samples they learn from."""
        course, lesson = self.course, training.lesson
        count = min(lesson.rows, _WATCHED * course.micro)
        batches = (
            lesson.feeds(range(i, min(i + course.micro, count)))
            for i in range(0, count, course.micro)
        )
        state = self.processes.state(training.trainee.student)
        return training.trainee.settle(state, training.trainee.statistics(batches))

    def _loop(self, training: Training, path: Path) -> None:
        saved = time.process_time()
        self.loop_began = saved, training.step
        with checkpoint.held_back() as stop:
            for _ in training.run(self._tell):
                now = time.process_time()
                if training.step % self.course.die_steps and training.step < training.steps:
                    continue  # a die's errors are not saved: the next step needs them
                told, waited = self.processes.greatest(stop.signal or 0, now - saved)
                if told or waited > SAVE_EVERY_S:  # all of them together, or none
                    checkpoint.save(path, training, self.key)
                    saved = now
                if told:
                    stop.signal = int(told)
                    break

    def _tell(self, training: Training, figures: Figures) -> None:
        """One line after a judgement."""
        now, (start, first) = time.process_time(), self.loop_began
        left = ""
        if training.step > first:
            each = (now - start) / (training.step - first)
            left = f", {each * (training.steps - training.step):.0f} s left"
        self.progress(
            f"distill: step {training.step}/{training.steps}  {told(figures)}"
            f"  {now - self.began:.0f} CPU s{left}"
        )

    # -- the result -----------------------------------------------------------------------------

    def _finish(self, training: Training) -> dict[str, Any]:
        """Takes the best state, settles it and writes the folder."""
        assert training.best is not None
        _, step, state = training.best
        load_state(training.trainee.student, state)
        start = {k: v for k, v in training.history[0].items() if k not in ("step", "train")}
        best = next(h for h in training.history if h["step"] == step)
        records = dict(training.trainee.records) if step == 0 else self._settled(training, state)
        manifest = {
            "request_sha256": self.key, "request": self.request, "origin": self.prepared.origin,
            "steps": training.step, "kept": "the start" if step == 0 else "the distilled",
            "best_step": step, "start": start,
            "best": {k: v for k, v in best.items() if k not in ("step", "train")}, **self.stacks,
        }  # fmt: skip
        fabric = {} if step == 0 else self._fabric(training.trainee, state)
        if self.processes.rank == 0:
            (self.folder / distilled.HISTORY).write_text(_history(training.history))
            distilled.write(self.folder, distilled.Distilled(records, fabric, manifest))
            (self.folder / checkpoint.FILE).unlink(missing_ok=True)
        return distilled.read_manifest(self.folder) or manifest

    def _settled(
        self, training: Training, state: Mapping[str, torch.Tensor]
    ) -> dict[str, FixedLinear]:
        records = self._settle(training)
        ranges = training.trainee.ranges(state)
        return {n: replace(r, output_range=ranges.get(n)) for n, r in records.items()}

    @staticmethod
    def _fabric(trainee: Trainee, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        names = trainee.student.constants
        return {n: state[names[n]].float().numpy() for n in trainee.constants}


def _weight(module: torch.nn.Module) -> torch.Tensor:
    assert isinstance(module, IdealLinear)
    return module.weight


def _history(rows: list[Figures]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
