"""The training loop: steps, judgements, the best state so far; resumes to the same bytes.

Everything that a step draws follows from its number and the course's seed (which samples, which
die), so a run that was interrupted continues as if it had not been. The order: a rule fills the
gradients (`pfmc.distill.rule`), they are averaged over processes and clipped, Adam moves, weights
are clipped, and every so often the student is judged on held-out samples on a few fixed dies.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pfmc.distill.course import Course
from pfmc.distill.lessons import Lesson, order_of
from pfmc.distill.losses import inner_error
from pfmc.distill.processes import Processes
from pfmc.distill.rule import Rule, Step, backpropagation
from pfmc.distill.teacher import Teacher
from pfmc.distill.trainee import Trainee
from pfmc.errors import InputError
from pfmc.ir import routing
from pfmc.targets.base import Die
from pfmc.targets.grids import assign

Figures = dict[str, float]
Enter = Callable[["Training"], None]

_JUDGES = 1 << 40  # added to the seeds of dies that judge, so that training never meets them


def told(figures: Figures) -> str:
    """What the last judgement found, for one line of progress."""
    shown = "  ".join(
        f"{'held-out' if k == 'loss' else k} {v:.4f}"
        for k, v in figures.items() if k not in ("step", "train")
    )  # fmt: skip
    return f"loss {figures['train']:.4f}  {shown}"


@dataclass
class Training:
    """A training under way; `run` carries it on from `step`.

    Attributes:
        trainee, teacher, lesson, course, steps: what is trained, by whom, on what, how long.
        rule: how gradients come about.
        enter_converters: called once, when output converters begin to count.
        processes: of which this is one.
        step: the next step; history: one row a judgement.
        best: (loss, step, parameters) of the best judgement with all effects, or None.
        worse: judgements since then.
        prototype: the one device that is trained (`pfmc.distill.rules.prototype`): it judges.
    """

    trainee: Trainee
    teacher: Teacher
    lesson: Lesson
    course: Course
    steps: int
    rule: Rule = backpropagation
    enter_converters: Enter | None = None
    processes: Processes = field(default_factory=Processes)
    step: int = 0
    history: list[Figures] = field(default_factory=list)
    best: tuple[float, int, dict[str, Tensor]] | None = None
    worse: int = 0
    prototype: Die | None = None
    _epoch: tuple[int, list[int]] = field(default=(-1, []), init=False, repr=False)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Makes the optimiser afresh, for the parameters as they lie now."""
        self.optimiser = torch.optim.Adam(
            self._groups(), lr=1.0, betas=(0.9, 0.98), eps=1e-12, fused=True
        )

    def _groups(self) -> list[dict[str, Any]]:
        """Parameters by learning rate, and by whether they lie sharded."""
        course = self.course
        found: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in self.trainee.student.named_parameters():
            last = name.rpartition(".")[2]
            if last == "log_step" and not course.inputs:
                parameter.requires_grad_(False)
            if parameter.requires_grad:
                found.setdefault((self._rate(last), hasattr(parameter, "to_local")), []).append(
                    parameter
                )
        return [{"params": p, "base": rate} for (rate, _), p in found.items()]

    def _rate(self, name: str) -> float:
        if name == "weight":
            return self.course.lr
        return self.course.scale_lr if name.startswith("log_") else self.course.fabric_lr

    # -- the loop -------------------------------------------------------------------------------

    def run(self, tell: Callable[[Training, Figures], None]) -> Iterator[Training]:
        """Carries on to the end; yields after every step, when the state is whole.

        Args:
            tell: called after each judgement with its figures.

        Raises:
            InputError: the loss is not a number.
        """
        if self.step == 0 and not self.history:
            tell(self, self._judge_and_keep(0.0))
        while self.step < self.steps and not self._given_up:
            first = self.course.first_converted(self.steps)
            if self.step == first and self.trainee.converts and self.enter_converters is not None:
                self.enter_converters(self)
            loss = self.advance()
            self.step += 1
            if self.step % self.course.judge_every == 0 or self.step == self.steps:
                tell(self, self._judge_and_keep(loss))
            yield self

    @property
    def _given_up(self) -> bool:
        return bool(self.course.patience) and self.worse >= self.course.patience

    def advance(self) -> float:
        """One step; returns its loss."""
        student, course = self.trainee.student, self.course
        student.train()
        self.face(self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = group["base"] * course.rate(self.step, self.steps)
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.processes.mean(self.rule(self.view(self.step)))
        if not math.isfinite(loss):
            raise InputError(
                f"the loss is {loss} at step {self.step}", where="distillation",
                mend="lower the learning rate, e.g. --set distill.lr=3e-4",
            )  # fmt: skip
        self.processes.average(student)
        if course.gradient_norm:
            self.processes.clip(student, course.gradient_norm)
        self.optimiser.step()
        if course.clip_sigmas and self.prototype is None:
            with torch.no_grad():
                self.trainee.clip(course.clip_sigmas)
        return loss

    def view(self, step: int) -> Step:
        """`step` as its rule sees it."""
        cut = self.cut(step)
        return Step(
            step, self.trainee, self.parts(cut), self._seed("rule", step), cut, self.lesson,
            self.teacher, self.die(step), self.course.converts(step, self.steps),
        )  # fmt: skip

    def die(self, step: int) -> Die:
        """The die of `step`: a fresh one every `die_steps` steps, if there is noise."""
        course = self.course
        seed = self._seed("die", step // course.die_steps)
        return Die(seed if course.noise else None, course.age_s, course.noise)

    def face(self, step: int) -> None:
        """Puts the trainee on the die of `step`."""
        self.trainee.face(self.die(step), self.course.converts(step, self.steps))

    def cut(self, step: int) -> tuple[tuple[int, ...], ...]:
        """The samples of `step` that this process computes, by micro-batch."""
        rows = self.processes.share(self.rows(step))
        micro = max(1, min(self.course.micro, len(rows)))
        return tuple(tuple(rows[i : i + micro]) for i in range(0, len(rows), micro))

    def parts(self, cut: Sequence[Sequence[int]]) -> tuple[Callable[[], Tensor], ...]:
        """The shares of the loss of micro-batches."""
        count = sum(map(len, cut))
        return tuple(lambda part=part: self._loss(part) * (len(part) / count) for part in cut)

    def rows(self, step: int) -> list[int]:
        """The samples of `step`: each once in an epoch."""
        count, batch = self.lesson.rows, min(self.course.batch, self.lesson.rows)
        epoch, place = divmod(step, count // batch)
        if self._epoch[0] != epoch:
            random = np.random.default_rng(self._seed("order", epoch))
            self._epoch = (epoch, order_of(self.lesson, batch, random).tolist())
        return self._epoch[1][place * batch : (place + 1) * batch]

    def _loss(self, rows: Sequence[int]) -> Tensor:
        if self.course.hidden:
            return self._loss_with_inner(rows)
        target, feeds = self.teacher.ask(rows), self.lesson.feeds(rows)
        with self._precision():
            outputs = self.trainee.student(**feeds)
        return self.lesson.loss(outputs, target, feeds)

    def _loss_with_inner(self, rows: Sequence[int]) -> Tensor:
        """The loss, and beside it the errors of the output of every fixed linear but experts'."""
        feeds = self.lesson.feeds(rows)
        truth: dict[str, Tensor] = {}
        ours: dict[str, Tensor] = {}
        pairs = ((self.teacher.student, truth), (self.trainee.student, ours))
        for student, seen in pairs:
            student.observe = lambda name, _, y, seen=seen: seen.__setitem__(name, y)
        try:
            with torch.no_grad():
                target = self.lesson.keep(self.teacher.student(**feeds))
            with self._precision():
                outputs = self.trainee.student(**feeds)
        finally:
            for student, _ in pairs:
                student.observe = None
        loss = self.lesson.loss(outputs, target, feeds)
        truth = {name: y for name, y in truth.items() if name not in self._routed}
        return loss + self.course.hidden * inner_error(ours, truth)

    @cached_property
    def _routed(self) -> frozenset[str]:
        """Experts' layers: the teacher's router and the student's may send them other rows."""
        return frozenset(n for g in routing.groups(self.teacher.student.model) for n in g)

    def _precision(self) -> Any:
        if self.course.precision == "fp32":
            return nullcontext()
        device = next(self.trainee.student.parameters()).device.type
        return torch.autocast(device, torch.bfloat16)

    def _seed(self, what: str, number: int) -> int:
        sequence = np.random.SeedSequence([self.course.seed, number, *what.encode()])
        return int(sequence.generate_state(1)[0])

    # -- judging --------------------------------------------------------------------------------

    def judge(self, converters: bool) -> Figures:
        """Figures on the held-out samples, mean over the fixed dies."""
        course, student = self.course, self.trainee.student
        count = course.dies if self.trainee.converts else 1  # digital dies are all the same
        dies = [Die(_JUDGES + d, course.age_s) for d in range(count)]
        dies = dies if self.prototype is None else [self.prototype]
        readings = None if self.prototype is None else _JUDGES
        total: dict[str, float] = {}
        student.eval()
        for die in dies:
            self.trainee.face(die, converters, readings)
            for name, value in self._held_out().items():
                total[name] = total.get(name, 0.0) + value / len(dies)
        return total

    def _held_out(self) -> Figures:
        total: dict[str, float] = {}
        count, micro = self.lesson.held_out, self.course.micro
        for start in range(0, count, micro):
            rows = range(start, min(start + micro, count))
            feeds, target = self.lesson.feeds(rows, True), self.teacher.ask(rows, True)
            with torch.no_grad():
                found = self.lesson.figures(self.trainee.student(**feeds), target, feeds)
            self.trainee.forget()
            for name, value in found.items():
                total[name] = total.get(name, 0.0) + value * len(rows) / count
        return total

    def _judge_and_keep(self, loss: float) -> Figures:
        """Judges, keeps the state if it is the best that had all effects, and writes history."""
        whole = not self.trainee.converts or self.course.converts(self.step - 1, self.steps)
        figures = self.judge(converters=whole or self.step == 0)
        if self.step == 0 or whole:
            self._keep(figures["loss"])
        row = {"step": float(self.step), "train": loss, **figures}
        self.history.append(row)
        return row

    def _keep(self, loss: float) -> None:
        self.worse += 1
        if self.best is None or loss < self.best[0]:
            self.best, self.worse = (loss, self.step, self.processes.state(self.trainee.student)), 0

    # -- time -----------------------------------------------------------------------------------

    def time_step(self, converters: bool) -> float:
        """CPU seconds of a step, which is then taken back: the least of a few equal ones, or the
        mean where samples have different lengths."""
        student, course = self.trainee.student, self.course
        kept = {name: v.detach().clone() for name, v in student.state_dict().items()}
        equal, self.steps = self.lesson.lengths is None, _TIMED
        first, times = course.first_converted(_TIMED) if converters else 0, []
        for step in range(first, first + (3 if equal else 8)):
            self.step = min(step, _TIMED - 1)
            start = time.process_time()
            self.advance()
            times.append(time.process_time() - start)
        student.load_state_dict(kept)  # what twins remember from call to call, too
        student.zero_grad(set_to_none=True)
        self.step = 0
        self.restart()
        return min(times) if equal else sum(times) / len(times)


_TIMED = 1000
"""Steps of the training that the timed ones are taken from."""


def steps_for(training: Training, seconds: float) -> int:
    """How many steps fit into CPU `seconds`, both kinds of steps timed; the same everywhere."""
    share = training.course.converters_from if training.trainee.converts else 1.0
    mean = training.time_step(False) * share if share else 0.0
    if share < 1.0:
        mean += training.time_step(True) * (1.0 - share)
    return max(1, int(0.93 * seconds / training.processes.mean(mean)))


def load_state(student: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Puts whole parameters back in place."""
    for name, parameter in student.named_parameters():
        assign(parameter, state[name])
