"""Fits every layer's correction in two runs of the die over the same data.

In each run a layer sees what the layers before it make *with* their corrections, and fits its own
before it answers. The first run has gains and offsets only, and tells how ranks are shared out; the
second has the paths too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pfmc.distill.lessons import Lesson
from pfmc.distill.side import Moments, Plant, Side, Spectrum, allocate, fit, refit_gain
from pfmc.distill.side_linear import CorrectedLinear
from pfmc.distill.student import Student

Feeds = Mapping[str, Any]
Choose = Callable[[str, Moments], Side]


class _Listening(nn.Module):
    """Fits a layer's correction to the first input it gets, then answers with it."""

    def __init__(self, name: str, frozen: nn.Module, token_top: float, choose: Choose) -> None:
        super().__init__()
        self.name, self.frozen, self.token_top, self.choose = name, frozen, token_top, choose

    def forward(self, x: Tensor) -> Tensor:
        side = self.choose(self.name, Moments.of(x.detach().flatten(0, -2).cpu().numpy()))
        made: Tensor = CorrectedLinear(self.frozen, side.stored(), 1.0, self.token_top)(x)
        return made.detach()


@dataclass
class Fitter:
    """Fits one die.

    Attributes:
        student: the model on this die, nothing beside its layers.
        plants: its layers as measured and as meant.
        feeds: the data, one batch.
        tokens: see `CorrectedLinear`.
        importance: of each layer's outputs; see `importance_of`.
    """

    student: Student
    plants: Mapping[str, Plant]
    feeds: Feeds
    tokens: Mapping[str, float]
    importance: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        self.powers: dict[str, float] = {}
        self.spectra: dict[str, Spectrum] = {}

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Layer -> (inputs, outputs)."""
        return {n: (int(p.wanted.shape[0]), int(p.wanted.shape[1])) for n, p in self.plants.items()}

    def run(self, choose: Choose) -> dict[str, Side]:
        """One run; `choose` fits a layer to the moments of its input."""
        found: dict[str, Side] = {}

        def listen(name: str, moments: Moments) -> Side:
            found[name] = choose(name, moments)
            return found[name]

        frozen = dict(self.student.linears)
        for name, layer in frozen.items():
            self.student.replace(name, _Listening(name, layer, self.tokens[name], listen))
        try:
            with torch.no_grad():
                self.student(**self.feeds)
        finally:
            for name, layer in frozen.items():
                self.student.replace(name, layer)
        return found

    def gains(self) -> dict[str, Side]:
        """Gains and offsets alone; remembers spectra and the power of each output."""

        def choose(name: str, moments: Moments) -> Side:
            plant = self.plants[name]
            side, self.spectra[name] = fit(plant, moments, 0, self.importance.get(name))
            self.powers[name] = _power(plant, moments)
            return side

        return self.run(choose)

    def ranks(self, budget: int) -> dict[str, int]:
        """How `budget` parameters of factors are shared out; `gains` was called before."""
        removed = {}
        for name, found in self.spectra.items():
            whole = 1.0 if name in self.importance else self.powers[name] or 1.0
            removed[name] = (np.square(found.values) / whole).tolist()
        return allocate(removed, self.sizes, budget)

    def paths(self, ranks: Mapping[str, int]) -> dict[str, Side]:
        """Gains, offsets and paths of given ranks."""

        def choose(name: str, moments: Moments) -> Side:
            return fit(self.plants[name], moments, ranks[name], self.importance.get(name))[0]

        return self.run(choose)

    def regained(self, sides: Mapping[str, Side]) -> dict[str, Side]:
        """Gains and offsets anew beside paths that stay."""
        return self.run(lambda name, moments: refit_gain(self.plants[name], moments, sides[name]))


def _power(plant: Plant, moments: Moments) -> float:
    """Mean square of the meant output, its bias left out."""
    varying = np.einsum("io,io->", plant.wanted, moments.covariance @ plant.wanted)
    return float(varying + np.square(moments.mean @ plant.wanted).sum())


def importance_of(student: Student, lesson: Lesson, rows: int, seed: int) -> dict[str, np.ndarray]:
    """How much a squared error of every output counts: diagonal Fisher information ``[out]``.

    Of a language model, by the gradient of the likelihood of tokens drawn from its own scores
    (Martens 2020, arXiv:1412.1193, section 5); empty for other models.

    Args:
        student: the model without errors. lesson: has samples. rows: how many are taken.
    """
    drive = getattr(lesson, "drive", None)
    if drive is None:
        return {}
    seen: dict[str, Tensor] = {}

    def observe(name: str, _: Tensor, y: Tensor) -> None:
        y.requires_grad_(True)
        y.retain_grad()
        seen[name] = y

    student.observe = observe
    try:
        scores = student(**lesson.feeds(range(min(rows, lesson.rows))))[drive.logits]
    finally:
        student.observe = None
    logs = torch.log_softmax(scores.float().flatten(0, -2), dim=-1)
    drawn = torch.multinomial(
        logs.detach().exp(), 1, generator=torch.Generator(logs.device).manual_seed(seed)
    )
    logs.gather(1, drawn).sum().backward()  # type: ignore[no-untyped-call]
    student.zero_grad(set_to_none=True)
    return {n: _mean_square(y) for n, y in seen.items() if y.grad is not None}


def _mean_square(y: Tensor) -> np.ndarray:
    assert y.grad is not None
    held = y.grad.flatten(0, -2).double().square().mean(dim=0)
    return np.asarray(held.cpu().numpy())
