"""Physical local learning: a positive and a negative pass, and every layer learns by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from pfmc.distill.rules.base import ON_DEVICE, Feeds, Gradient, Part, Problem, Rule, record
from pfmc.errors import UsageError


def local_loss(positive: Tensor, negative: Tensor, theta: float) -> Tensor:
    """ln(1 + exp(theta * cos(positive, negative))), mean over positions; Momeni et al. 2023.

    Args:
        positive, negative: ``[..., out]`` of one layer; theta: how sharp.
    """
    return functional.softplus(theta * functional.cosine_similarity(positive, negative, -1)).mean()


@dataclass(frozen=True)
class PhysicalLocal(Rule):
    """Each layer makes what it says to a positive and to a negative batch dissimilar. No error
    travels between layers: dL_l/dtheta_l needs the layer's own measured inputs and outputs.

    Attributes:
        theta: sharpness of the local loss.
    """

    name: ClassVar[str] = "local"
    title: ClassVar[str] = "physical local learning: contrast of a positive and a negative pass"
    paper: ClassVar[str] = "Momeni et al., Science 382, 1297 (2023); Hinton, arXiv 2212.13345"
    needs: ClassVar[str] = "a device in the loop and a way to make negative batches"
    parts: ClassVar[frozenset[Part]] = ON_DEVICE
    theta: float = 5.0

    def gradient(self, problem: Problem, feeds: Feeds, seed: int = 0) -> Gradient:
        """Two measured passes; the gradient of the sum of all local losses."""
        if problem.contrast is None:
            raise UsageError("local learning needs negative batches, and none can be made here")
        runs = [record(problem.measured(), batch)[1] for batch in problem.contrast(feeds)]
        found: Gradient = {k: torch.zeros_like(p) for k, p in problem.flat().items()}
        for layer in problem.parameters:
            found |= self._layer(problem, layer, runs[0][layer], runs[1][layer])
        return found

    def _layer(
        self, problem: Problem, layer: str, positive: tuple[Tensor, Tensor],
        negative: tuple[Tensor, Tensor],
    ) -> Gradient:  # fmt: skip
        group = problem.parameters[layer]
        with torch.enable_grad():
            sides = [self._through(problem, layer, *pair) for pair in (positive, negative)]
            loss = local_loss(sides[0], sides[1], self.theta)
            found = torch.autograd.grad(loss, list(group.values()), allow_unused=True)
        named = zip(group, found, strict=True)
        return {f"{layer}.{name}": g for name, g in named if g is not None}

    @staticmethod
    def _through(problem: Problem, layer: str, x: Tensor, y: Tensor) -> Tensor:
        modelled: Tensor = problem.model.linears[layer](x)
        return modelled + (y - modelled).detach()

    def runs(self) -> Mapping[str, int]:
        """Two measured passes."""
        return {"device": 2}
