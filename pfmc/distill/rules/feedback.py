"""Direct feedback alignment: every layer hears the output's error through a fixed random matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from pfmc import noise
from pfmc.distill.rules.base import (
    ON_DEVICE,
    Feeds,
    Gradient,
    Outputs,
    Part,
    Problem,
    Rule,
    pull_back,
    record,
)
from pfmc.errors import UsageError, did_you_mean

SLOPES: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "cos": torch.cos,
    "sin": torch.sin,
    "one": torch.ones_like,
}
"""Functions that augmented feedback may take for f'."""


def _error(problem: Problem, outputs: Outputs, feeds: Feeds) -> tuple[str, Tensor]:
    """The output that the loss reads, and dL/d(output) there."""
    leaves = {k: v.detach().requires_grad_() for k, v in outputs.items() if v.is_floating_point()}
    with torch.enable_grad():
        loss = problem.loss({**outputs, **leaves}, feeds)
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    read = [(name, g) for name, g in zip(leaves, found, strict=True) if g is not None]
    if len(read) != 1:
        names = ", ".join(name for name, _ in read) or "none"
        raise UsageError(f"feedback alignment needs a loss of one output, not of: {names}")
    return read[0]


def _spread(error: Tensor, like: Tensor) -> Tensor:
    """The error at every position of a layer: ``[..., E]`` over the leading sizes of `like`."""
    if error.shape[:-1] == like.shape[:-1]:
        return error
    if error.shape[:-1].numel() == like.shape[:-1].numel():
        return error.reshape(*like.shape[:-1], error.shape[-1])
    each = error.reshape(error.shape[0], -1, error.shape[-1]).mean(dim=1)
    rest = like.shape[1:-1]
    if error.shape[0] != like.shape[0]:
        raise UsageError("a layer's batch is not the output's: feedback has no way to it")
    wide = each.reshape(each.shape[0], *[1] * len(rest), -1).expand(*like.shape[:-1], -1)
    return wide / max(rest.numel(), 1)


def feedback_matrix(layer: str, errors: int, outputs: int, seed: int) -> Tensor:
    """B of a layer, ``[errors, outputs]``: normal numbers of variance 1 / errors, fixed by seed."""
    drawn = noise.generator(seed, layer, "feedback").standard_normal((errors, outputs), "float32")
    return torch.from_numpy(drawn) / math.sqrt(errors)


@dataclass(frozen=True)
class DirectFeedback(Rule):
    """delta_l = (e B_l) f'(y_l), dL/dtheta_l ~ (df_l/dtheta_l)^T delta_l at the measured x_l; the
    layer that makes the output gets e itself.

    Attributes:
        feedback_seed: of the random matrices, which never change.
    """

    name: ClassVar[str] = "feedback"
    title: ClassVar[str] = "direct feedback alignment: random matrices carry the output's error"
    paper: ClassVar[str] = "Nokland, NeurIPS 2016; Launay et al., NeurIPS 2020"
    needs: ClassVar[str] = "a device in the loop and the slope of its nonlinearity"
    parts: ClassVar[frozenset[Part]] = ON_DEVICE
    feedback_seed: int = 0

    def slope(self, problem: Problem, layer: str, y: Tensor) -> Tensor:
        """f'(y) of what follows the layer."""
        return torch.ones_like(y) if problem.slope is None else problem.slope(layer, y)

    def gradient(self, problem: Problem, feeds: Feeds, seed: int = 0) -> Gradient:
        """One measured pass; every layer on its own."""
        outputs, seen = record(problem.measured(), feeds)
        name, error = _error(problem, outputs, feeds)
        found: Gradient = {}
        for layer, (x, y) in seen.items():
            found |= pull_back(
                problem, layer, x, self._delta(problem, layer, y, error, outputs[name])
            )
        zeros = {k: torch.zeros_like(p) for k, p in problem.flat().items()}
        return zeros | found

    def _delta(
        self, problem: Problem, layer: str, y: Tensor, error: Tensor, last: Tensor
    ) -> Tensor:
        if y.shape == last.shape and torch.equal(y, last):
            return error
        matrix = feedback_matrix(layer, error.shape[-1], y.shape[-1], self.feedback_seed)
        return (_spread(error, y) @ matrix.to(error)) * self.slope(problem, layer, y)

    def runs(self) -> Mapping[str, int]:
        """One measured pass."""
        return {"device": 1}


@dataclass(frozen=True)
class AugmentedFeedback(DirectFeedback):
    """As `DirectFeedback` with any function g for f': nothing of the device need be known.

    Attributes:
        g: ``cos``, ``sin`` or ``one``.
    """

    name: ClassVar[str] = "augmented-feedback"
    title: ClassVar[str] = "direct feedback alignment with an arbitrary slope"
    paper: ClassVar[str] = "Nakajima et al., Nat. Commun. 13, 7847 (2022)"
    needs: ClassVar[str] = "a device in the loop"
    g: str = "cos"

    def __post_init__(self) -> None:
        if self.g not in SLOPES:
            raise UsageError(f"no slope {self.g!r}", mend=did_you_mean(self.g, SLOPES))

    def slope(self, problem: Problem, layer: str, y: Tensor) -> Tensor:
        """g(y)."""
        return SLOPES[self.g](y)
