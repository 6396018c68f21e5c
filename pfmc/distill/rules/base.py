"""What a training rule is, what it is given, and the tools that rules share.

Notation: layer l computes y_l = f_l(x_l; theta_l); the digital *model* knows f_l and its
derivatives, the *device* (a twin of it here) computes its own y_l from the same theta; e is the
loss's gradient by the network's output.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from pfmc.errors import UsageError

Feeds = Mapping[str, Any]
Outputs = Mapping[str, Tensor]
Loss = Callable[[Outputs, Feeds], Tensor]
"""A scalar of the network's outputs and what was fed."""
Gradient = dict[str, Tensor]
"""Estimate of dL/dtheta by parameter name, shaped like the parameter."""


class Part(StrEnum):
    """What is trained."""

    MASKS = "masks"
    """Weights that manufacture fixes: there is no device yet, training is in silico."""
    PROTOTYPE = "prototype"
    """A rewritable device, or its twin, with all weights in reach."""
    SIDE = "side"
    """A writable side path beside fixed weights of one manufactured die."""


class Network(Protocol):
    """What rules need of a network; `pfmc.distill.student.Student` is one."""

    linears: dict[str, nn.Module]

    def replace(self, name: str, module: nn.Module) -> nn.Module:
        """Puts `module` in the place of layer `name`; returns what stood there."""
        ...

    def __call__(self, **feeds: Any) -> dict[str, Tensor]:
        """Runs the network."""
        ...


@dataclass(frozen=True)
class Problem:
    """One thing to train.

    Attributes:
        model: the digital model; differentiable by the parameters.
        parameters: layer -> parameter name -> the parameter; the same objects in `model`, `device`
            and `noisy`.
        loss: what is minimised.
        device: the device or its twin: layers of the same names whose outputs are measured; None
            before manufacture.
        noisy: the model with fresh noise of the hardware at every call, for noise-aware rules.
        contrast: makes a positive and a negative batch of a batch, for local rules.
        slope: derivative of what follows a layer's output, ``(layer, y) -> f'(y)``; None: 1.
        stacks: layer -> its trainable phase masks (`pfmc.distill.rules.masks.MaskStack`).
    """

    model: Network
    parameters: Mapping[str, Mapping[str, nn.Parameter]]
    loss: Loss
    device: Network | None = None
    noisy: Network | None = None
    contrast: Callable[[Feeds], tuple[Feeds, Feeds]] | None = None
    slope: Callable[[str, Tensor], Tensor] | None = None
    stacks: Mapping[str, Any] = field(default_factory=dict)

    def flat(self) -> dict[str, nn.Parameter]:
        """Every parameter under ``layer.parameter``."""
        groups = self.parameters.items()
        return {f"{layer}.{n}": p for layer, group in groups for n, p in group.items()}

    def measured(self) -> Network:
        """The device.

        Raises:
            UsageError: there is none.
        """
        if self.device is None:
            raise UsageError(
                "this training rule needs a device, and there is none yet",
                mend="name a die with --die, or train in silico: --rule in-silico, noise-aware",
            )
        return self.device


@dataclass(frozen=True)
class Rule(ABC):
    """A training rule; its fields are its options.

    Class attributes:
        name: as in the registry; title: one line; paper: where it is from.
        parts: what it can train.
        needs: what it needs of the world, in words.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[str]
    parts: ClassVar[frozenset[Part]]

    @abstractmethod
    def gradient(self, problem: Problem, feeds: Feeds, seed: int = 0) -> Gradient:
        """Estimate of the loss's gradient on one batch, deterministic in `seed`.

        Raises:
            UsageError: the problem lacks what the rule needs.
        """

    @abstractmethod
    def runs(self) -> Mapping[str, int]:
        """Work of one gradient: passes of ``device``, ``device_back`` and ``model``."""

    @classmethod
    def require(cls, part: Part) -> None:
        """Refuses a part that this rule cannot train (UsageError)."""
        if part not in cls.parts:
            fit = ", ".join(sorted(p.value for p in cls.parts))
            raise UsageError(
                f"the rule {cls.name} cannot train {part.value}: it needs {cls.needs}",
                mend=f"it trains: {fit}",
            )


ANYWHERE = frozenset(Part)
ON_DEVICE = frozenset({Part.PROTOTYPE, Part.SIDE})


# -- tools -----------------------------------------------------------------------------------------


def scatter(problem: Problem, gradients: Sequence[Tensor | None]) -> Gradient:
    """Gradients in the order of ``problem.flat()`` by name; what has none gets zeros."""
    return {
        name: torch.zeros_like(p) if g is None else g.detach()
        for (name, p), g in zip(problem.flat().items(), gradients, strict=True)
    }


def differentiate(problem: Problem, loss: Tensor) -> Gradient:
    """dL/dtheta by automatic differentiation."""
    parameters = list(problem.flat().values())
    return scatter(problem, torch.autograd.grad(loss, parameters, allow_unused=True))


@contextmanager
def standing(network: Network, make: Callable[[str, nn.Module], nn.Module]) -> Iterator[None]:
    """Puts ``make(layer, what stands there)`` in every layer's place, for a while."""
    before = dict(network.linears)
    for name, module in before.items():
        network.replace(name, make(name, module))
    try:
        yield
    finally:
        for name, module in before.items():
            network.replace(name, module)


class Recorder(nn.Module):
    """A layer that remembers what went in and what came out, without gradients."""

    def __init__(self, layer: nn.Module, name: str, seen: dict[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.layer, self.name, self.seen = layer, name, seen

    def forward(self, x: Tensor) -> Tensor:
        """``layer(x)``."""
        y: Tensor = self.layer(x)
        self.seen[self.name] = (x.detach(), y.detach())
        return y


def record(network: Network, feeds: Feeds) -> tuple[Outputs, dict[str, tuple[Tensor, Tensor]]]:
    """Outputs of one measured run, and every layer's (x, y)."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.no_grad(), standing(network, lambda name, layer: Recorder(layer, name, seen)):
        outputs = network(**feeds)
    return outputs, seen


def pull_back(problem: Problem, layer: str, x: Tensor, cotangent: Tensor) -> Gradient:
    """(df_l/dtheta_l)^T cotangent of the digital model of `layer` at measured input `x`."""
    group = problem.parameters.get(layer, {})
    if not group:
        return {}
    with torch.enable_grad():
        y = problem.model.linears[layer](x.detach())
        found = torch.autograd.grad(y, list(group.values()), cotangent, allow_unused=True)
    return {
        f"{layer}.{name}": torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(group.items(), found, strict=True)
    }


def cosine(one: Gradient, other: Gradient) -> float:
    """Cosine between two gradients taken as one long vector each."""
    a, b = (torch.cat([g[k].double().reshape(-1) for k in sorted(g)]) for g in (one, other))
    return float(a @ b / (a.norm() * b.norm()))
