"""Rules for lossless reciprocal waves: gradients by phase masks from fields that run backwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from pfmc.distill.rules.base import (
    ON_DEVICE,
    Feeds,
    Gradient,
    Part,
    Problem,
    Rule,
    differentiate,
)
from pfmc.errors import UsageError


@contextmanager
def _measuring(problem: Problem, how: str, strength: float) -> Iterator[None]:
    if not problem.stacks:
        raise UsageError(
            "there are no phase masks to train here",
            mend="this rule trains the masks of an optical side path: --target optical",
        )
    kept = {name: (s.measure, s.strength) for name, s in problem.stacks.items()}
    for stack in problem.stacks.values():
        stack.measure, stack.strength = how, strength
    try:
        yield
    finally:
        for name, stack in problem.stacks.items():
            stack.measure, stack.strength = kept[name]


@dataclass(frozen=True)
class ReciprocityAdjoint(Rule):
    """The error field runs backwards through the same masks; both fields are measured."""

    name: ClassVar[str] = "adjoint"
    title: ClassVar[str] = "reciprocity adjoint through phase masks"
    paper: ClassVar[str] = (
        "Hughes et al., Optica 5, 864 (2018); Pai et al., Science 380, 398 (2023)"
    )
    needs: ClassVar[str] = "reciprocal phase masks and field measurements at every element"
    parts: ClassVar[frozenset[Part]] = ON_DEVICE

    def gradient(self, problem: Problem, feeds: Feeds, seed: int = 0) -> Gradient:
        """One pass each way; exact for the device as it is."""
        with _measuring(problem, "adjoint", 0.0):
            return differentiate(problem, problem.loss(problem.measured()(**feeds), feeds))

    def runs(self) -> Mapping[str, int]:
        """One pass each way."""
        return {"device": 1, "device_back": 1}


@dataclass(frozen=True)
class HamiltonianEcho(Rule):
    """The output is kicked along the error, time-reversed and sent back: intensities at each mask,
    compared between two kicks, are the gradient.

    Attributes:
        strength: size of the kick over that of the field.
    """

    name: ClassVar[str] = "echo"
    title: ClassVar[str] = "Hamiltonian echo: a kicked, time-reversed wave"
    paper: ClassVar[str] = "Lopez-Pastor and Marquardt, PRX 13, 031020 (2023)"
    needs: ClassVar[str] = "lossless phase masks and a phase-conjugating mirror; intensities only"
    parts: ClassVar[frozenset[Part]] = ON_DEVICE
    strength: float = 1e-2

    def gradient(self, problem: Problem, feeds: Feeds, seed: int = 0) -> Gradient:
        """One pass forwards, two echoes."""
        with _measuring(problem, "echo", self.strength):
            return differentiate(problem, problem.loss(problem.measured()(**feeds), feeds))

    def runs(self) -> Mapping[str, int]:
        """One pass forwards, two back."""
        return {"device": 1, "device_back": 2}
