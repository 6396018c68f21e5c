"""A stack of trainable phase masks between fixed lossless couplers, as a layer.

u_0 = x padded to the modes; at plane k: u_k = C (exp(i phi_k) * u_{k-1}), C unitary and symmetric;
y = gain * Re(u_K). A lossless reciprocal volume in its simplest form: what runs backwards through
it meets the transpose of every element in reverse order.
"""

from __future__ import annotations

from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from pfmc import noise
from pfmc.errors import UsageError

MEASURES: Final = ("autograd", "adjoint", "echo")
"""How the gradient by the phases is had: calculus, a reversed error field, or an echo."""


def coupler(modes: int) -> Tensor:
    """The unitary symmetric discrete Fourier transform, complex64 ``[modes, modes]``: a lens."""
    k = torch.arange(modes, dtype=torch.float64)
    angle = -2.0 * torch.pi * torch.outer(k, k) / modes
    return torch.polar(torch.full_like(angle, modes**-0.5), angle).to(torch.complex64)


class MaskStack(nn.Module):
    """``x[..., in] -> y[..., out]`` through `planes` phase masks.

    Args:
        inputs, outputs: at most `modes` each; modes: of the field; planes: masks.
        layer: names the layer; seed: of the first phases.
        error: phase error of every element of this device in radians ``[planes, modes]``, unknown
            to its model; None for the model itself.

    Attributes:
        phase: radians ``[planes, modes]``; gain: ``[out]``.
        measure: one of `MEASURES`.
        strength: size of the echo's kick over the field.
    """

    error: Tensor | None
    couple: Tensor

    def __init__(
        self, inputs: int, outputs: int, modes: int, planes: int, layer: str = "", seed: int = 0,
        error: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if max(inputs, outputs) > modes:
            raise UsageError(f"{modes} modes cannot carry {inputs} inputs and {outputs} outputs")
        drawn = noise.generator(seed, layer, "phases").uniform(0.0, 2 * torch.pi, (planes, modes))
        self.phase = nn.Parameter(torch.from_numpy(drawn).float())
        self.gain = nn.Parameter(torch.ones(outputs))
        self.inputs, self.outputs, self.modes = inputs, outputs, modes
        self.measure, self.strength = "autograd", 1e-2
        self.register_buffer("couple", coupler(modes), persistent=False)
        self.register_buffer("error", error)

    def masks(self) -> Tensor:
        """exp(i phi) of every element, complex ``[planes, modes]``."""
        phase = self.phase if self.error is None else self.phase + self.error
        return torch.polar(torch.ones_like(phase), phase)

    def forward(self, x: Tensor) -> Tensor:
        """The homodyne reading of the field behind the last coupler."""
        flat = x.reshape(-1, self.inputs)
        if self.measure == "autograd":
            reading = self.fields(embed(flat, self.modes), self.masks())[-1].real
        else:
            run = cast(Any, _Measured).apply
            reading = run(flat, self.phase, self)
        return (reading[:, : self.outputs] * self.gain).reshape(*x.shape[:-1], self.outputs)

    def fields(self, u: Tensor, masks: Tensor) -> list[Tensor]:
        """The field just behind each mask, then the one behind the last coupler."""
        found = []
        for mask in masks:
            u = u * mask
            found.append(u)
            u = u @ self.couple.T
        return [*found, u]

    def reversed(self, v: Tensor, masks: Tensor) -> tuple[list[Tensor], Tensor]:
        """What a field `v` sent in from behind is just behind each mask, and where x comes in."""
        found = []
        for mask in masks.flip(0):
            v = v @ self.couple
            found.append(v)
            v = v * mask
        return found[::-1], v


def embed(x: Tensor, modes: int) -> Tensor:
    """Real ``[n, in]`` as the amplitudes of the first modes, complex ``[n, modes]``."""
    return nn.functional.pad(x, (0, modes - x.shape[1])).to(torch.complex64)


class _Measured(torch.autograd.Function):
    """The stack's reading, whose derivatives are measured on the device."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, phase: Tensor, stack: MaskStack) -> Tensor:
        masks = stack.masks().detach()
        fields = stack.fields(embed(x, stack.modes), masks)
        ctx.stack, ctx.masks, ctx.fields, ctx.inputs = stack, masks, fields, x.shape[1]
        return fields[-1].real.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        measure = _adjoint if ctx.stack.measure == "adjoint" else _echo
        back, slope = measure(ctx.stack, ctx.masks, ctx.fields, gradients[0])
        return back[:, : ctx.inputs], slope, None


def _adjoint(
    stack: MaskStack, masks: Tensor, fields: list[Tensor], error: Tensor
) -> tuple[Tensor, Tensor]:
    """dL/dphi = Re(conj(lambda) i u): the conjugate error field runs backwards through the stack,
    both fields are measured at every element (Hughes et al., Optica 5, 864, 2018)."""
    reverse, end = stack.reversed(error.to(torch.complex64).conj(), masks)
    slopes = [(v * 1j * u).real.sum(0) for u, v in zip(fields, reverse, strict=False)]
    return end.conj().real, torch.stack(slopes)


def _echo(
    stack: MaskStack, masks: Tensor, fields: list[Tensor], error: Tensor
) -> tuple[Tensor, Tensor]:
    """Time reversal with a small kick: the field behind the stack is moved by -i epsilon dL/dy,
    conjugated and sent back; the change of *intensity* at an element is its gradient,
    dL/dphi = (I_echo(+epsilon) - I_echo(-epsilon)) / (4 epsilon)
    (Lopez-Pastor and Marquardt, PRX 13, 031020, 2023)."""
    out = fields[-1]
    size = error.norm(dim=1, keepdim=True)
    field = out.abs().norm(dim=1, keepdim=True).clamp(min=1e-12)  # a kick needs no light before it
    epsilon = stack.strength * field / size.clamp(min=1e-30)
    kick = -1j * epsilon * error
    echoes = [stack.reversed((out + s * kick).conj(), masks) for s in (1.0, -1.0)]
    pairs = zip(echoes[0][0], echoes[1][0], strict=True)
    safe = epsilon.clamp(min=1e-30)
    slopes = [((a.abs() ** 2 - b.abs() ** 2) / (4 * safe)).sum(0) for a, b in pairs]
    back = (1j * (echoes[0][1] - echoes[1][1]).conj() / (2 * safe)).real
    return back, torch.stack(slopes)
