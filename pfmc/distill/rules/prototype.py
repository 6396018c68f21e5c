"""Prototypes: a rewritable device, or its twin, trained by any rule of the registry.

A `Prototype` is what the distillation loop calls at every step (`pfmc.distill.rule.Rule`). It turns
the trainee into a `pfmc.distill.rules.base.Problem`: three networks over one student, which differ
in the die that the layers' twins face. *model* is the ideal die without output converters,
*device* the named die, read afresh in every pass, *noisy* a fresh die in every pass. What can be
rewritten is the weight and the bias of each layer; the digital fabric beside it stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from pfmc import noise
from pfmc.distill.lessons import Language, Lesson
from pfmc.distill.rule import Step, backpropagation
from pfmc.distill.rules.base import Feeds, Outputs, Problem, Rule
from pfmc.distill.rules.slopes import slope_of
from pfmc.distill.rules.stacks import StackLayer
from pfmc.distill.trainable import TrainableLinear
from pfmc.distill.trainee import IDEAL, Trainee
from pfmc.targets.base import Die

Facing = tuple[Die, bool, int | None]
"""What `Twin.face` takes: die, converters, readings."""

REWRITTEN = ("weight", "bias")
"""Parameters of a layer that a device holds and that can be written again."""


class Faced(nn.Module):
    """A layer that turns to its network's die before it computes."""

    def __init__(self, layer: TrainableLinear, network: TwinNetwork) -> None:
        super().__init__()
        self.layer = layer
        self._network = (network,)  # in a tuple: a network is no submodule

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        cast(Any, self.layer.twin).face(*self._network[0].facing)
        self.layer.grid.forget()  # its last answer may be of a call without gradients
        y: Tensor = self.layer(x)
        self.layer.grid.forget()
        return y


class TwinNetwork:
    """The trainee on one kind of die: a `pfmc.distill.rules.base.Network`.

    Args:
        trainee: shared with other networks; only during a call do its layers belong to this one.
        facing: what the twins face in pass 0, 1, 2 …

    Attributes:
        passes: calls so far; facing: of the last of them.
    """

    def __init__(self, trainee: Trainee, facing: Callable[[int], Facing]) -> None:
        self.student, self._choose = trainee.student, facing
        self.linears: dict[str, nn.Module] = {
            name: Faced(layer, self) for name, layer in trainee.linears.items()
        }
        self.passes, self.facing = 0, facing(0)

    def replace(self, name: str, module: nn.Module) -> nn.Module:
        """Puts `module` in the place of layer `name`; returns what stood there."""
        before, self.linears[name] = self.linears[name], module
        return before

    def __call__(self, **feeds: Any) -> dict[str, Tensor]:
        """Runs the student with this network's layers."""
        self.facing = self._choose(self.passes)
        self.passes += 1
        student = self.student
        kept, student.linears = student.linears, {**student.linears, **self.linears}
        try:
            return student(**feeds)  # type: ignore[no-any-return]
        finally:
            student.linears = kept


class _Loss:
    """The lesson's loss on some samples; remembers what it came to."""

    def __init__(self, lesson: Lesson, target: Outputs) -> None:
        self.lesson, self.target = lesson, target
        self.values: list[float] = []

    def __call__(self, outputs: Outputs, feeds: Feeds) -> Tensor:
        loss = self.lesson.loss(outputs, self.target, feeds)
        self.values.append(float(loss.detach()))
        return loss


@dataclass(frozen=True)
class Prototype:
    """The engine's rule that trains one device by a rule of the registry.

    Attributes:
        rule: of the registry.
        die: the device.
    """

    rule: Rule
    die: Die

    def __call__(self, step: Step) -> float:
        """Adds the rule's gradients up over the micro-batches; returns the mean loss it read."""
        assert step.lesson is not None
        assert step.teacher is not None
        count, total = sum(map(len, step.rows)), 0.0
        for k, rows in enumerate(step.rows):
            loss = _Loss(step.lesson, step.teacher.ask(rows))
            feeds = step.lesson.feeds(rows)
            problem = self.problem(step, loss, rows)
            found = self.rule.gradient(problem, feeds, _key(step.seed, "rule", k))
            if not loss.values:  # a rule that reads no loss
                with torch.no_grad():
                    loss(problem.measured()(**feeds), feeds)
            _add(problem, found, len(rows) / count)
            total += float(np.mean(loss.values)) * len(rows) / count
            step.trainee.forget()
        return total

    def problem(self, step: Step, loss: Any, rows: Sequence[int]) -> Problem:
        """What the rule is given at `step` for the samples `rows`."""
        trainee, stacked = step.trainee, stacks_of(step.trainee)
        return Problem(
            TwinNetwork(trainee, lambda _: (IDEAL, False, None)), written(trainee), loss,
            TwinNetwork(trainee, lambda k: (self.die, True, _key(step.seed, "reading", k))),
            TwinNetwork(trainee, lambda k: (self._fresh(step, k), step.converters, None)),
            _contrast(step.lesson, rows, step.seed), slope_of(trainee.student.model),
            {name: layer.stack for name, layer in stacked.items()},
        )  # fmt: skip

    def _fresh(self, step: Step, number: int) -> Die:
        return replace(self.die, seed=_key(step.seed, "die", number))


@dataclass(frozen=True)
class Silico:
    """The engine's rule for masks: gradients through the model alone, before there is a device.

    Attributes:
        draws: dies that a step's gradient is averaged over; 0: the ideal one.
    """

    draws: int = 1

    def __call__(self, step: Step) -> float:
        """Fills the gradients; returns the mean loss."""
        total, draws = 0.0, max(1, self.draws)
        for k in range(draws):
            step.trainee.face(self._die(step, k), step.converters)
            total += backpropagation(step) / draws
        for parameter in step.trainee.student.parameters() if draws > 1 else ():
            if parameter.grad is not None:
                parameter.grad /= draws
        return total

    def _die(self, step: Step, number: int) -> Die:
        if not self.draws:
            return IDEAL
        if number == 0 or step.die.seed is None:
            return step.die
        return replace(step.die, seed=_key(step.seed, "die", number))


# -- parameters ------------------------------------------------------------------------------------


def stacks_of(trainee: Trainee) -> dict[str, StackLayer]:
    """The layers that are stacks of masks."""
    return {n: m for n, m in trainee.linears.items() if isinstance(m, StackLayer)}


def written(trainee: Trainee) -> dict[str, Mapping[str, nn.Parameter]]:
    """What is trained, by layer and name: of stacks if there are any, else of every layer."""
    stacked = stacks_of(trainee)
    if stacked:
        return {n: {"phase": s.stack.phase, "gain": s.stack.gain} for n, s in stacked.items()}
    return {n: {k: getattr(m, k) for k in REWRITTEN} for n, m in trainee.linears.items()}


def freeze(trainee: Trainee) -> None:
    """Lets nothing learn but what a device can be rewritten with."""
    for parameter in trainee.student.parameters():
        parameter.requires_grad_(False)
    for group in written(trainee).values():
        for parameter in group.values():
            parameter.requires_grad_(True)


def _add(problem: Problem, found: Mapping[str, Tensor], share: float) -> None:
    for name, parameter in problem.flat().items():
        if parameter.grad is None:  # laid out as the parameter, which fused optimisers rely on
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.add_(found[name].detach(), alpha=share)


# -- draws and batches -----------------------------------------------------------------------------


def _key(seed: int, what: str, number: int) -> int:
    return int(noise.generator(seed, what, str(number)).integers(2**40))


def _contrast(
    lesson: Lesson | None, rows: Sequence[int], seed: int
) -> Callable[[Feeds], tuple[Feeds, Feeds]]:
    """Positive: the batch; negative: the same tokens in another order, or other samples."""
    rng = noise.generator(seed, "contrast", "negative")

    def make(feeds: Feeds) -> tuple[Feeds, Feeds]:
        assert lesson is not None
        if not isinstance(lesson, Language):
            shift = int(rng.integers(1, max(2, lesson.rows)))
            return feeds, lesson.feeds([(row + shift) % lesson.rows for row in rows])
        ids, real = np.array(feeds[lesson.drive.ids]), lesson.ids.shape[1]
        ids[:, :real] = rng.permuted(ids[:, :real], axis=1)
        return feeds, {**feeds, lesson.drive.ids: ids}

    return make
