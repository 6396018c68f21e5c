"""Equilibrium propagation: let the system settle freely, nudge it, and compare.

For a system that settles into a minimum of an energy E(s, theta), nudged with beta * L, the
gradient of the loss at the free equilibrium is the contrast of two nudged ones,
dL/dtheta = lim (dE/dtheta(s_beta) - dE/dtheta(s_-beta)) / (2 beta)  (Scellier and Bengio 2017; the
centred form Laborieux et al. 2021). `settle` and `contrast` hold for any energy; the rule gives
every layer of a network an elastic state, E = sum_l |s_l - f_l(x_l)|^2 / 2, whose free equilibrium
is the network's own forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pfmc.distill.rules.base import (
    ON_DEVICE,
    Feeds,
    Gradient,
    Network,
    Part,
    Problem,
    Rule,
    pull_back,
    record,
    standing,
)

Energy = Callable[[Sequence[Tensor]], Tensor]


def settle(energy: Energy, start: Sequence[Tensor], steps: int, rate: float) -> list[Tensor]:
    """Follows -dE/ds from `start` for `steps` steps of size `rate`."""
    states = [s.detach().clone().requires_grad_() for s in start]
    for _ in range(steps):
        with torch.enable_grad():
            slopes = torch.autograd.grad(energy(states), states)
        with torch.no_grad():
            for state, slope in zip(states, slopes, strict=True):
                state.sub_(slope, alpha=rate)
    return [s.detach() for s in states]


def contrast(
    energy: Energy, parameters: Sequence[Tensor], plus: Sequence[Tensor],
    minus: Sequence[Tensor], beta: float,
) -> list[Tensor]:  # fmt: skip
    """(dE/dtheta at `plus` - dE/dtheta at `minus`) / (2 beta), one tensor a parameter."""
    ends = [torch.autograd.grad(energy(states), list(parameters)) for states in (plus, minus)]
    return [(a - b) / (2 * beta) for a, b in zip(*ends, strict=True)]


class _Elastic(nn.Module):
    """A layer whose output may leave what it computes: y = f(x) + stretch."""

    def __init__(self, layer: nn.Module, name: str, work: _Stretch) -> None:
        super().__init__()
        self.layer, self.name, self.work = layer, name, work

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        self.work.inputs[self.name] = x.detach()
        stretch = self.work.stretch.get(self.name)
        return y if stretch is None else y + stretch


class _Stretch:
    """The elastic states of one run, s_l - f_l(x_l) by layer, and the inputs last seen."""

    def __init__(self) -> None:
        self.stretch: dict[str, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}


@dataclass(frozen=True)
class EquilibriumPropagation(Rule):
    """The centred contrast of two nudged equilibria of the elastic network.

    Attributes:
        beta: strength of the nudge; a batch's loss is its mean, so positions share it.
        steps: of relaxation in each phase; rate: their size.
    """

    name: ClassVar[str] = "equilibrium"
    title: ClassVar[str] = "equilibrium propagation: contrast of two nudged equilibria"
    paper: ClassVar[str] = (
        "Scellier and Bengio, Front. Comput. Neurosci. 11, 24 (2017); "
        "Laborieux et al., Front. Neurosci. 15, 633674 (2021)"
    )
    needs: ClassVar[str] = "a device that settles into an energy's minimum (symmetric couplings)"
    parts: ClassVar[frozenset[Part]] = ON_DEVICE
    beta: float = 0.02
    steps: int = 12
    rate: float = 0.7

    def gradient(self, problem: Problem, feeds: Feeds, seed: int = 0) -> Gradient:
        """Two relaxations from the free equilibrium, which is the forward pass."""
        sums = {name: torch.zeros_like(p) for name, p in problem.flat().items()}
        for sign in (1.0, -1.0):
            work = self._relaxed(problem, feeds, sign * self.beta)
            for layer, x in work.inputs.items():
                found = pull_back(problem, layer, x, -work.stretch[layer])
                for name, slope in found.items():
                    sums[name].add_(slope, alpha=sign / (2 * self.beta))
        return sums

    def _relaxed(self, problem: Problem, feeds: Feeds, beta: float) -> _Stretch:
        """The equilibrium of E + beta L, by descent in the stretches."""
        device, work = problem.measured(), _Stretch()
        self._start(device, work, feeds)
        with standing(device, lambda name, layer: _Elastic(layer, name, work)):
            for _ in range(self.steps):
                with torch.enable_grad():
                    loss = problem.loss(device(**feeds), feeds)
                    names = list(work.stretch)
                    states = [work.stretch[n] for n in names]
                    slopes = torch.autograd.grad(loss, states, allow_unused=True)
                for name, state, slope in zip(names, states, slopes, strict=True):
                    pull = state.detach() if slope is None else state.detach() + beta * slope
                    work.stretch[name] = (state.detach() - self.rate * pull).requires_grad_()
            with torch.no_grad():
                device(**feeds)  # the inputs at equilibrium
        work.stretch = {k: v.detach() for k, v in work.stretch.items()}
        return work

    @staticmethod
    def _start(device: Network, work: _Stretch, feeds: Feeds) -> None:
        """No stretch anywhere: the free equilibrium."""
        for name, (_, y) in record(device, feeds)[1].items():
            work.stretch[name] = torch.zeros_like(y).requires_grad_()

    def runs(self) -> Mapping[str, int]:
        """Settling runs; each step of a relaxation is one pass each way in simulation."""
        return {"device": 2 * self.steps + 4, "device_back": 2 * self.steps}
