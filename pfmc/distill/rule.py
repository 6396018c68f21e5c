"""The interface of a training rule: how a step gets its gradient. The rest of the loop is shared.

A rule fills ``.grad`` of the parameters it can train and returns the step's loss; the loop
averages gradients between processes, clips their norm, lets Adam move, and clips the weights. Other
rules (physics-aware, feedback alignment, zeroth order …) live in `pfmc.distill.rules`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pfmc.distill.lessons import Lesson
from pfmc.distill.teacher import Teacher
from pfmc.distill.trainee import IDEAL, Trainee
from pfmc.targets.base import Die


@dataclass(frozen=True)
class Step:
    """One step as a rule sees it.

    Attributes:
        number: from 0.
        trainee: the model; its layers already stand on the step's die.
        parts: micro-batches. Each is called without arguments and returns its share of the loss
            as a tensor with gradient; their sum is the loss of the step. Calling one again
            computes it again on the same die: the same seed draws the same devices.
        seed: of whatever the rule itself draws.
        rows: the samples of each part, for rules that run the model themselves.
        lesson, teacher: what the samples are and what they should give; None in a step that is
            only timed.
        die: that the layers stand on; converters: whether their outputs are converted.
    """

    number: int
    trainee: Trainee
    parts: tuple[Callable[[], Tensor], ...]
    seed: int
    rows: tuple[tuple[int, ...], ...] = ()
    lesson: Lesson | None = None
    teacher: Teacher | None = None
    die: Die = IDEAL
    converters: bool = True


class Rule(Protocol):
    """How gradients come about."""

    def __call__(self, step: Step) -> float:
        """Fills ``.grad`` of the trainee's parameters; returns the loss."""
        ...


def backpropagation(step: Step) -> float:
    """The exact gradient through the twin: noise-aware training in silico."""
    total = 0.0
    for part in step.parts:
        loss = part()
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
        step.trainee.forget()
    return total
