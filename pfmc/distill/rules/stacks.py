"""Layers realised by a stack of phase masks, trained where the light goes: for adjoint and echo.

A chosen layer of an optical model is replaced by a `pfmc.distill.rules.masks.MaskStack`. Its phases
are first fitted in silico to the layer's matrix; the device's masks then miss them by errors that
its model does not know, normal numbers of the technology's phase error drawn from the die's seed.
What the device's masks do to unit inputs becomes the layer's weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import ceil, pi

import torch
from torch import Tensor, nn

from pfmc import noise
from pfmc.distill.rules.masks import MaskStack
from pfmc.distill.trainable import InputGrid, TrainableLinear
from pfmc.distill.trainee import Trainee
from pfmc.errors import UsageError, did_you_mean
from pfmc.hardware import FixedLinear
from pfmc.targets.base import Die, Twin
from pfmc.technology import Technology

LARGEST = 512
"""Modes of the largest stack; a pass of M modes through P planes costs P M² products a sample."""

_SPREAD = 1.5  # phases over entries of the matrix
_RATE, _GAIN_RATE = 0.03, 0.05  # of the fit: radians a step, relative change a step


@dataclass(frozen=True)
class StackOptions:
    """What ``--rule-set`` may say of stacks.

    Attributes:
        layers: glob over layer names; "": the smallest layer of every block.
        planes: masks of a stack; 0: half as many phases again as the matrix has entries.
        fit: steps of fitting the phases to the layer's matrix.
    """

    layers: str = ""
    planes: int = 0
    fit: int = 300


class StackLayer(TrainableLinear):
    """A trainable layer whose product is a stack of masks; its weight is what the stack was last
    measured to do, so that it settles like any other layer.

    Args:
        stack: the device's masks. The others are those of `TrainableLinear`.
    """

    def __init__(
        self, record: FixedLinear, weight: Tensor, grid: InputGrid, twin: Twin, stack: MaskStack
    ) -> None:
        super().__init__(record, weight, grid, twin)
        self.stack = stack

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``: input converter, masks, digital gain and bias."""
        if not self.training:
            self.measure()
        y: Tensor = self.stack(self.grid(x)[0])
        return y + self.bias

    @torch.no_grad()
    def measure(self) -> None:
        """Reads the stack's matrix with unit inputs; steps widen where codes would clip."""
        unit = torch.eye(self.stack.inputs, device=self.weight.device)
        self.weight.copy_(self.stack(unit).T)
        groups = self.log_scale.shape[1]
        short = groups * self.group - self.weight.shape[1] if groups > 1 else 0
        wide = nn.functional.pad(self.weight.abs(), (0, short))
        tiles = wide.reshape(len(wide), groups, -1)
        needed = (tiles.amax(dim=2) / self.top).clamp(min=1e-12).log()
        self.log_scale.copy_(torch.maximum(self.log_scale, needed))


def smallest_of_blocks(records: Mapping[str, FixedLinear]) -> list[str]:
    """The layer of least weights of every numbered block, or of the model if none is numbered."""
    blocks: dict[str, list[str]] = {}
    for name in records:
        found = re.match(r".*?\.\d+(?=\.)", name)
        if found:
            blocks.setdefault(found.group(), []).append(name)
    groups: Iterable[list[str]] = blocks.values() or [list(records)]
    return [min(g, key=lambda n: records[n].inputs * records[n].outputs) for g in groups]


def chosen(records: Mapping[str, FixedLinear], pattern: str) -> list[str]:
    """Names of the layers that become stacks.

    Raises:
        UsageError: `pattern` fits none, or a layer is too wide.
    """
    fits = [n for n in records if fnmatchcase(n, pattern)]
    names = fits if pattern else smallest_of_blocks(records)
    if not names:
        raise UsageError(f"no layer fits {pattern!r}", mend=did_you_mean(pattern, list(records)))
    for name in names:
        modes = max(records[name].inputs, records[name].outputs)
        if modes > LARGEST:
            raise UsageError(
                f"a stack of {modes} modes is too wide to be followed plane by plane", where=name,
                mend=f"choose layers of at most {LARGEST}: --rule-set layers=GLOB",
            )  # fmt: skip
    return names


def install(
    trainee: Trainee, weights: Mapping[str, Tensor], options: StackOptions, die: Die,
    technology: Technology,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Puts stacks in the place of the chosen layers.

    Args:
        weights: real weights ``[in, out]`` by layer.
        die: its seed draws the masks' errors.
        technology: its phase error sizes them.

    Returns:
        by layer: modes, planes, what the fit leaves and what the device adds, over the matrix.
    """
    told = {}
    for name in chosen(trainee.records, options.layers):
        layer, record = trainee.linears[name], trainee.records[name]
        stack = _stack(record, options)
        left = fit(stack, weights[name].detach().float().T, options.fit)
        model = effective(stack).detach()
        stack.error = _errors(stack, name, die, technology)
        twin: Twin = layer.twin
        made = StackLayer(record, weights[name], layer.grid, twin, stack)
        trainee.student.replace(name, made.to(layer.weight.device))
        off = float((effective(stack).detach() - model).norm() / model.norm())
        told[name] = {
            "modes": stack.modes, "planes": len(stack.phase), "fit_error": left, "die_error": off,
        }  # fmt: skip
    return told


def _stack(record: FixedLinear, options: StackOptions) -> MaskStack:
    modes = max(record.inputs, record.outputs)
    planes = options.planes or max(4, ceil(_SPREAD * record.inputs * record.outputs / modes))
    return MaskStack(record.inputs, record.outputs, modes, planes, record.name)


def _errors(stack: MaskStack, name: str, die: Die, technology: Technology) -> Tensor:
    """Phases can be set to any value here, so levels of the printed planes do not count."""
    drawn = noise.generator(die.seed or 0, name, "write masks").standard_normal(stack.phase.shape)
    return torch.from_numpy(drawn * technology.number("write.phase_error")).float()


def effective(stack: MaskStack, gain: Tensor | None = None) -> Tensor:
    """The real matrix of a stack ``[out, in]``: `MaskStack.forward` of unit inputs by FFT, with
    another `gain` if one is given."""
    u = torch.eye(stack.inputs, stack.modes, dtype=torch.complex64)
    for mask in stack.masks():
        u = torch.fft.fft(u * mask, norm="ortho")
    return (u.real[:, : stack.outputs] * (stack.gain if gain is None else gain)).T


def fit(stack: MaskStack, weight: Tensor, steps: int) -> float:
    """Fits phases and gains to ``weight[out, in]`` by Adam; returns |made - weight| / |weight|."""
    with torch.no_grad():
        stack.gain.fill_(float(torch.linalg.matrix_norm(weight, ord=2)))
    log_gain = stack.gain.detach().log().requires_grad_()
    rates = [{"params": [stack.phase], "lr": _RATE}, {"params": [log_gain], "lr": _GAIN_RATE}]
    adam = torch.optim.Adam(rates)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(1, steps))
    plain, power = torch.ones_like(stack.gain), weight.square().sum()
    for _ in range(steps):
        adam.zero_grad()
        made = effective(stack, plain) * log_gain.exp()[:, None]
        loss = (made - weight).square().sum() / power
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        schedule.step()
    with torch.no_grad():
        stack.gain.copy_(log_gain.exp())
        stack.phase.remainder_(2 * pi)
        return float((effective(stack) - weight).norm() / power.sqrt())
