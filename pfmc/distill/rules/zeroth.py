"""Rules that only read the loss: the device is a black box."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pfmc.distill.rules.base import ON_DEVICE, Feeds, Gradient, Part, Problem, Rule


def spsa_cosine(probes: int, parameters: int) -> float:
    """Expected cosine of an SPSA gradient to the true one: sqrt(K / (K + P)).

    Args:
        probes: K, directions averaged; parameters: P.
    """
    return math.sqrt(probes / (probes + parameters))


@contextmanager
def _moved(problem: Problem, step: Mapping[str, Tensor], factor: float) -> Iterator[None]:
    parameters = problem.flat()
    kept = {name: p.detach().clone() for name, p in parameters.items()}
    with torch.no_grad():
        for name, p in parameters.items():
            p.add_(step[name], alpha=factor)
        try:
            yield
        finally:
            for name, p in parameters.items():
                p.copy_(kept[name])


def _loss(problem: Problem, feeds: Feeds, step: Mapping[str, Tensor], factor: float) -> float:
    with _moved(problem, step, factor):
        return float(problem.loss(problem.measured()(**feeds), feeds))


def _signs(problem: Problem, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        name: (torch.randint(0, 2, p.shape, generator=generator) * 2 - 1).to(p)
        for name, p in problem.flat().items()
    }


def _normals(problem: Problem, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        name: torch.randn(p.shape, generator=generator).to(p) for name, p in problem.flat().items()
    }


@dataclass(frozen=True)
class Spsa(Rule):
    """g = mean over K of (L(theta + c D) - L(theta - c D)) / (2 c) D, D of random signs.

    Attributes:
        probes: K; radius: c, in units of the parameters.
    """

    name: ClassVar[str] = "spsa"
    title: ClassVar[str] = "simultaneous perturbation: two readings of the loss a direction"
    paper: ClassVar[str] = "Spall, IEEE TAC 37, 332 (1992); MeZO, arXiv 2305.17333"
    needs: ClassVar[str] = "a device whose parameters can be moved; only the loss is read"
    parts: ClassVar[frozenset[Part]] = ON_DEVICE
    probes: int = 8
    radius: float = 1e-3

    def gradient(self, problem: Problem, feeds: Feeds, seed: int = 0) -> Gradient:
        """2 K readings of the loss."""
        generator = torch.Generator().manual_seed(seed)
        total = {name: torch.zeros_like(p) for name, p in problem.flat().items()}
        for _ in range(self.probes):
            signs = _signs(problem, generator)
            rise, fall = (_loss(problem, feeds, signs, s * self.radius) for s in (1.0, -1.0))
            for name, direction in signs.items():
                total[name].add_(direction, alpha=(rise - fall) / (2 * self.radius * self.probes))
        return total

    def runs(self) -> Mapping[str, int]:
        """Two readings a probe."""
        return {"device": 2 * self.probes}


@dataclass(frozen=True)
class Evolution(Rule):
    """Evolution strategy with mirrored samples and rank-shaped fitness: a search gradient that
    knows the losses' order only, and so does not care about their scale.

    Attributes:
        pairs: mirrored pairs of a generation; radius: standard deviation of the mutations.
    """

    name: ClassVar[str] = "evolution"
    title: ClassVar[str] = "evolution strategy: mirrored mutations, ranked by their loss"
    paper: ClassVar[str] = "Wierstra et al., JMLR 15, 949 (2014); arXiv 1703.03864"
    needs: ClassVar[str] = "a device whose parameters can be moved; only losses' order is read"
    parts: ClassVar[frozenset[Part]] = ON_DEVICE
    pairs: int = 8
    radius: float = 1e-2

    def gradient(self, problem: Problem, feeds: Feeds, seed: int = 0) -> Gradient:
        """Two readings of the loss a pair."""
        generator = torch.Generator().manual_seed(seed)
        states, losses = [], []
        for _ in range(self.pairs):
            states.append(generator.get_state())
            mutation = _normals(problem, generator)
            losses += [_loss(problem, feeds, mutation, s * self.radius) for s in (1.0, -1.0)]
        fitness = _ranked(torch.tensor(losses, dtype=torch.float64))
        total = {name: torch.zeros_like(p) for name, p in problem.flat().items()}
        for pair, state in enumerate(states):  # mutations are drawn again, not kept
            generator.set_state(state)
            weight = float(fitness[2 * pair] - fitness[2 * pair + 1])
            for name, mutation_of in _normals(problem, generator).items():
                total[name].add_(mutation_of, alpha=weight / (2 * self.pairs * self.radius))
        return total

    def runs(self) -> Mapping[str, int]:
        """Two readings a pair."""
        return {"device": 2 * self.pairs}


def _ranked(losses: Tensor) -> Tensor:
    """Centred ranks in [-1/2, 1/2]; the highest loss gets 1/2, equal losses get equal ranks."""
    below, equal = (
        (other(losses[None], losses[:, None])).sum(1).to(losses) for other in (torch.lt, torch.eq)
    )
    ranks = below + (equal - 1) / 2
    return ranks / max(len(losses) - 1, 1) - 0.5
