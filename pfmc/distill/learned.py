"""Learns the rounding and the scales of one block so that its output errs least.

The latent of each weight is a real number in units of its scale, whose nearest code is used; it
starts inside the cell of the code that the layer-wise search chose, as near to the float weight as
the cell allows. Latents and scales follow Adam through straight-through rounding, on the mean
square error of the block's output with inputs from the blocks rounded so far, and the step size
falls to nothing, so no latent moves further than about a cell. AutoRound (arXiv:2309.05516) learns
offsets by sign descent and EfficientQAT (arXiv:2407.11062) weights and scales by Adam; this is in
between. The state of least error is kept, the start among them, judged on batches that are not
learned from where there are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pfmc.formats import E2M1, Format, of
from pfmc.hardware import QuantisedMatrix

Forward = Callable[[int, Mapping[str, nn.Module]], list[Tensor]]
"""Runs the block on one batch with these linears; its results."""

State = dict[str, tuple[Tensor, Tensor]]
"""Layer -> its latent and the logarithm of its scale."""

_BOLDNESS = (1.0, 0.25)  # of the rates; the second where the first found nothing better
_LOOKS = 5  # at the error, in a run
_HELD_OUT = 5  # every so many batches one is kept for judging, if there are that many
_INSIDE = 0.45  # how far from its code a latent starts at most, in steps between codes


@dataclass(frozen=True)
class Learning:
    """How long and how boldly to learn.

    Attributes:
        iterations: steps a block, one batch each.
        rate: Adam's first step size of latents, in units of a scale.
        scale_rate: of scales, relative.
        seed: of the order of batches.
    """

    iterations: int = 200
    rate: float = 0.005
    scale_rate: float = 0.001
    seed: int = 0


def torch_codes(ratio: Tensor, form: Format) -> Tensor:
    """`Format.codes` in torch."""
    if form.name == "midrise":
        codes = 2 * torch.round((ratio - 1) / 2) + 1
        return codes.clamp(-form.top, form.top)
    if form.top == E2M1[-1]:
        size = ratio.abs()
        step = torch.where(size < 4, 1.0, torch.where(size < 8, 2.0, 4.0))
        return (torch.round(size / step) * step).clamp(max=form.top) * ratio.sign()
    return torch.round(ratio).clamp(-form.top, form.top)


class LatentLinear(nn.Module):
    """``x @ (codes(latent) * scale) + bias`` whose latent and scale can be learned.

    Args:
        weight: what the layer-wise search approximated, ``[in, out]``.
        matrix: what it found.
        bias: ``[out]``, or None.
        convert: the input converter, or None.
    """

    def __init__(
        self, weight: npt.NDArray[np.float32], matrix: QuantisedMatrix, bias: Tensor | None,
        convert: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.form, self.group, self.matrix = of(matrix.format, matrix.bits), matrix.group, matrix
        self.bias, self.convert = bias, convert
        self.frozen = self.form.scales != "free"
        codes = torch.from_numpy(matrix.codes.astype(np.float32))
        scale = torch.from_numpy(matrix.scale.astype(np.float32))
        self.register_buffer("start", scale.clone(), persistent=False)
        ratio = torch.from_numpy(np.asarray(weight, np.float32)) / self._spread(scale)
        self.cell = 2.0 if self.form.name == "midrise" else 1.0
        reach = _INSIDE * self.cell
        latent = torch.minimum(torch.maximum(ratio, codes - reach), codes + reach)
        self.latent = nn.Parameter(latent)
        self.log_scale = nn.Parameter(torch.zeros_like(scale), requires_grad=not self.frozen)

    def _spread(self, scale: Tensor) -> Tensor:
        inputs = self.matrix.codes.shape[0]
        return scale.repeat_interleave(self.group, dim=0)[:inputs] if len(scale) > 1 else scale

    def scale(self) -> Tensor:
        """``[groups, out]``."""
        start: Tensor = self.get_buffer("start")
        return start if self.frozen else start * torch.exp(self.log_scale)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        if self.convert is not None:
            x = self.convert(x)
        inside = self.latent.clamp(-self.form.top - 0.5, self.form.top + 0.5)
        codes = inside + (torch_codes(self.latent, self.form) - inside).detach()
        y = torch.matmul(x, codes * self._spread(self.scale()))
        return y if self.bias is None else y + self.bias

    def result(self) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
        """Codes and scales now."""
        with torch.no_grad():
            codes = torch_codes(self.latent, self.form).to(torch.int8).numpy()
            return codes, self.scale().detach().to(torch.float32).clone().numpy()


def tune(
    linears: Mapping[str, LatentLinear],
    forward: Forward,
    targets: Sequence[list[Tensor]],
    options: Learning,
) -> tuple[float, float]:
    """Learns `linears` in place; leaves them at the best state seen.

    Args:
        linears: those of the block that are learned.
        forward: runs the block on batch n.
        targets: what the float model's block gives for each batch.
        options: how long.

    Returns:
        the block's error before and after, relative to its output power, where it is judged.
    """
    held, taught = _split(len(targets))
    power = _power(targets, held)

    def error() -> float:
        with torch.no_grad():
            return sum(float(_square(forward(n, linears), targets[n])) for n in held) / power

    before = best = error()
    kept = _state(linears)
    for boldness in _BOLDNESS:
        _restore(linears, kept)
        for state in _descend(linears, forward, targets, options, boldness, taught):
            now = error()
            if now < best:
                best, kept = now, state
        if best < before:
            break
    _restore(linears, kept)
    return before, best


def _descend(
    linears: Mapping[str, LatentLinear],
    forward: Forward,
    targets: Sequence[list[Tensor]],
    options: Learning,
    boldness: float,
    taught: Sequence[int],
) -> Iterator[State]:
    """One run of Adam; pauses a few times for its state to be judged."""
    rng = np.random.default_rng([options.seed, len(linears)])
    mean = _power(targets, taught) / len(taught)
    optimiser = torch.optim.Adam([
        {"params": [m.latent for m in linears.values()], "lr": boldness * options.rate},
        {"params": [m.log_scale for m in linears.values() if not m.frozen],
         "lr": boldness * options.scale_rate},
    ], betas=(0.9, 0.95))  # fmt: skip
    first = [float(g["lr"]) for g in optimiser.param_groups]
    look = max(1, options.iterations // _LOOKS)
    for step in range(options.iterations):
        for group, rate in zip(optimiser.param_groups, first, strict=True):
            group["lr"] = rate * (1 - step / options.iterations)
        number = taught[int(rng.integers(len(taught)))]
        loss = _square(forward(number, linears), targets[number]) / mean
        if not bool(torch.isfinite(loss)):
            return
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if (step + 1) % look == 0 or step + 1 == options.iterations:
            yield _state(linears)


def _split(count: int) -> tuple[list[int], list[int]]:
    """Batches to judge on and to learn from: all for both where there are few."""
    everything = list(range(count))
    held = everything[::_HELD_OUT]
    if count < _HELD_OUT:
        return everything, everything
    return held, [n for n in everything if n not in held]


def _power(targets: Sequence[list[Tensor]], numbers: Sequence[int]) -> float:
    """Σ y² of the batches `numbers`."""
    return sum(float((t.double() ** 2).sum()) for n in numbers for t in targets[n]) or 1.0


def _square(found: list[Tensor], wanted: list[Tensor]) -> Tensor:
    return torch.stack([((a - b) ** 2).sum() for a, b in zip(found, wanted, strict=True)]).sum()


def _state(linears: Mapping[str, LatentLinear]) -> State:
    return {
        n: (m.latent.detach().clone(), m.log_scale.detach().clone()) for n, m in linears.items()
    }


def _restore(linears: Mapping[str, LatentLinear], state: State) -> None:
    with torch.no_grad():
        for name, (latent, scale) in state.items():
            linears[name].latent.copy_(latent)
            linears[name].log_scale.copy_(scale)
