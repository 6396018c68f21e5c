"""Rules that differentiate: through the model, through noise, or through measurements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pfmc.distill.rules.base import (
    ANYWHERE,
    ON_DEVICE,
    Feeds,
    Gradient,
    Part,
    Problem,
    Rule,
    differentiate,
    standing,
)
from pfmc.errors import UsageError


@dataclass(frozen=True)
class InSilico(Rule):
    """dL/dtheta of the digital model; the device never takes part."""

    name: ClassVar[str] = "in-silico"
    title: ClassVar[str] = "backpropagation through the digital model"
    paper: ClassVar[str] = "arXiv 2406.03372, section on in-silico training"
    needs: ClassVar[str] = "a differentiable model"
    parts: ClassVar[frozenset[Part]] = ANYWHERE

    def gradient(self, problem: Problem, feeds: Feeds, seed: int = 0) -> Gradient:
        """Backpropagation."""
        return differentiate(problem, problem.loss(problem.model(**feeds), feeds))

    def runs(self) -> Mapping[str, int]:
        """One pass of the model and its backward pass."""
        return {"model": 2}


@dataclass(frozen=True)
class NoiseAware(Rule):
    """The mean of dL/dtheta over `draws` draws of the hardware's noise: one training fits every
    copy of a part, which makes it the rule of mask-fixed weights (with `InSilico`).

    Attributes:
        draws: of noise for one gradient.
    """

    name: ClassVar[str] = "noise-aware"
    title: ClassVar[str] = "backpropagation through the model under the hardware's noise"
    paper: ClassVar[str] = "Joshi et al., Nat. Commun. 11, 2473 (2020); arXiv 2505.09663"
    needs: ClassVar[str] = "a differentiable model and the statistics of the noise"
    parts: ClassVar[frozenset[Part]] = ANYWHERE
    draws: int = 1

    def gradient(self, problem: Problem, feeds: Feeds, seed: int = 0) -> Gradient:
        """Backpropagation through fresh noise."""
        if problem.noisy is None:
            raise UsageError("noise-aware training needs the noise of a target")
        losses = [problem.loss(problem.noisy(**feeds), feeds) for _ in range(self.draws)]
        return differentiate(problem, torch.stack(losses).mean())

    def runs(self) -> Mapping[str, int]:
        """A forward and a backward pass of the model a draw."""
        return {"model": 2 * self.draws}


def _through(
    problem: Problem, feeds: Feeds, pair: Callable[[nn.Module, nn.Module], nn.Module]
) -> Gradient:
    """dL/dtheta of the device whose every layer is a `pair` of itself and its model."""
    device, layers = problem.measured(), problem.model.linears
    with standing(device, lambda name, layer: pair(layer, layers[name])):
        return differentiate(problem, problem.loss(device(**feeds), feeds))


class _Measured(nn.Module):
    """Measured value forwards, the model's derivatives at the measured input backwards."""

    def __init__(self, device: nn.Module, model: nn.Module) -> None:
        super().__init__()
        self.device, self.model = device, model

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            measured: Tensor = self.device(x)
        modelled: Tensor = self.model(x)
        return modelled + (measured - modelled).detach()


@dataclass(frozen=True)
class PhysicsAware(Rule):
    """Physics-aware training: x_{l+1} is measured, Jacobians are the model's at measured x_l."""

    name: ClassVar[str] = "physics-aware"
    title: ClassVar[str] = "forward through the device, backward through the model"
    paper: ClassVar[str] = "Wright et al., Nature 601, 549 (2022)"
    needs: ClassVar[str] = "a device in the loop and a differentiable model"
    parts: ClassVar[frozenset[Part]] = ON_DEVICE

    def gradient(self, problem: Problem, feeds: Feeds, seed: int = 0) -> Gradient:
        """One measured forward pass, one modelled backward pass."""
        return _through(problem, feeds, _Measured)

    def runs(self) -> Mapping[str, int]:
        """One measured pass; the model once forwards and once backwards."""
        return {"device": 1, "model": 2}


class _Reversible(nn.Module):
    """Errors flow back through the device itself; parameters get theirs from the model."""

    def __init__(self, device: nn.Module, model: nn.Module) -> None:
        super().__init__()
        self.device, self.model = device, model

    def forward(self, x: Tensor) -> Tensor:
        fixed = {name: p.detach() for name, p in self.device.named_parameters()}
        measured: Tensor = torch.func.functional_call(self.device, fixed, (x,))
        modelled: Tensor = self.model(x.detach())
        return measured + modelled - modelled.detach()


@dataclass(frozen=True)
class Reciprocal(Rule):
    """In-situ backpropagation: the error goes backwards through the device, which by reciprocity
    applies the transpose of its own matrix, imperfections included; dL/dtheta_l is the product of
    measured error and measured input."""

    name: ClassVar[str] = "reciprocal"
    title: ClassVar[str] = "the error runs backwards through the reciprocal device"
    paper: ClassVar[str] = (
        "Hughes et al., Optica 5, 864 (2018); Pai et al., Science 380, 398 (2023)"
    )
    needs: ClassVar[str] = "a reciprocal device with access to both ports"
    parts: ClassVar[frozenset[Part]] = ON_DEVICE

    def gradient(self, problem: Problem, feeds: Feeds, seed: int = 0) -> Gradient:
        """One pass forwards and one backwards through the device."""
        return _through(problem, feeds, _Reversible)

    def runs(self) -> Mapping[str, int]:
        """One pass each way."""
        return {"device": 1, "device_back": 1}
