"""One die's frozen layers with their corrections beside them, as modules that can be trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pfmc.distill.side import TOP, Side
from pfmc.distill.student import Student
from pfmc.distill.trainee import Trainee
from pfmc.targets.base import Die
from pfmc.targets.grids import assign, on_own_grid

PARTS = ("gain", "shift", "down", "up")


class MeasuredLinear(nn.Module):
    """``x @ matrix + constant``: a layer of which nothing is known but what was measured.

    Args:
        matrix: ``[in, out]``; constant: ``[out]``.
    """

    matrix: Tensor
    constant: Tensor

    def __init__(self, matrix: np.ndarray, constant: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.from_numpy(np.array(matrix, np.float32)))
        self.register_buffer("constant", torch.from_numpy(np.array(constant, np.float32)))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        return x @ self.matrix + self.constant


class CorrectedLinear(nn.Module):
    """``gain * frozen(x) + offset + (x @ down) @ up`` with factors of 8 bits.

    Args:
        frozen: the die's own layer; its parameters are not touched.
        side: where the correction starts.
        unit: what an offset is counted in, the layer's typical output.
        token_top: largest code of the path's own input, 0 where it reads the converter's codes.

    Attributes:
        gain, shift, down, up: what learns; ``shift * unit`` is the offset.
    """

    def __init__(self, frozen: nn.Module, side: Side, unit: float, token_top: float = 0.0) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.unit, self.token_top = unit or 1.0, token_top
        self.gain, self.shift, self.down, self.up = (
            nn.Parameter(torch.from_numpy(v)) for v in self._values(side)
        )

    def _values(self, side: Side) -> list[np.ndarray]:
        shift = side.offset / np.float32(self.unit)
        return [np.array(v, np.float32) for v in (side.gain, shift, side.down, side.up)]

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        y: Tensor = self.frozen(x)
        y = torch.addcmul(self.shift * self.unit, y, self.gain)
        if not self.down.shape[1]:
            return y
        held = on_own_grid(x, self.token_top) if self.token_top else x
        down, up = (on_own_grid(m.T, TOP).T for m in (self.down, self.up))
        return y + (held @ down) @ up

    def put(self, side: Side) -> None:
        """Takes over a correction of the same shape."""
        for name, value in zip(PARTS, self._values(side), strict=True):
            assign(getattr(self, name), torch.from_numpy(value))

    def side(self, values: Mapping[str, Tensor] | None = None) -> Side:
        """The correction as it is, or as `values` by name (`PARTS`) say."""
        held = values or {n: getattr(self, n) for n in PARTS}
        gain, shift, down, up = (held[n].detach().float().cpu().numpy().copy() for n in PARTS)
        return Side(gain, shift * np.float32(self.unit), down, up)

    def reseed(self, seed: int) -> None:
        """Starts the read noise of the frozen layer anew."""
        source: Any = getattr(self.frozen, "generator", None)
        if source is not None and not isinstance(source, torch.Generator):
            source = source(self.gain.device)
        if source is not None:
            source.manual_seed(seed)


@dataclass
class SideTrainee(Trainee):
    """A model on one die, of which only the corrections learn.

    Attributes:
        only_gain: whether the paths stay as they are.
    """

    only_gain: bool = False

    @property
    def corrected(self) -> dict[str, CorrectedLinear]:
        """The layers by name."""
        found = self.student.linears
        return {n: m for n, m in found.items() if isinstance(m, CorrectedLinear)}

    def face(self, die: Die, converters: bool = True, readings: int | None = None) -> None:
        """The die stays: its seed only says which readings are drawn."""
        for number, layer in enumerate(self.corrected.values()):
            layer.reseed((die.seed or 0) + (number << 44))

    def forget(self) -> None:
        """Nothing is remembered."""

    def clip(self, sigmas: float) -> None:
        """Nothing is clipped: the weights are fixed."""

    def put(self, sides: Mapping[str, Side]) -> None:
        """Takes over corrections of the same shapes."""
        for name, layer in self.corrected.items():
            layer.put(sides[name])

    def sides(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Side]:
        """The corrections as they are, or as a state of the student has them."""
        found = {}
        for name, layer in self.corrected.items():
            prefix = f"layers.{name.replace('.', '/')}."
            held = None if state is None else {p: state[prefix + p] for p in PARTS}
            found[name] = layer.side(held)
        return found


def side_trainee(
    student: Student, sides: Mapping[str, Side], units: Mapping[str, float],
    tokens: Mapping[str, float], only_gain: bool,
) -> SideTrainee:  # fmt: skip
    """Puts corrections beside every layer of `student`, which are a die's."""
    for name, frozen in list(student.linears.items()):
        student.replace(name, CorrectedLinear(frozen, sides[name], units[name], tokens[name]))
    learned = PARTS[:2] if only_gain else PARTS
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[2] in learned and parameter.numel() > 0)
    return SideTrainee(student, {}, {}, only_gain=only_gain)


def frozen_layers(student: Student) -> Iterable[tuple[str, nn.Module]]:
    """The die's own layers by name, whether or not something stands beside them."""
    for name, module in student.linears.items():
        yield name, module.frozen if isinstance(module, CorrectedLinear) else module
