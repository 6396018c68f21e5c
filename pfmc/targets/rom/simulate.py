"""A read-only-weight layer in torch: the integers of the hardware, exactly, and a gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pfmc.targets.base import StoredLinear
from pfmc.targets.rom.lower import layout

EXACT_FLOAT32 = 1 << 24
"""Integers up to here are exact in float32, sums in any order included."""


class RomLinear(nn.Module):
    """``x[..., in] -> y[..., out]``: quantise, multiply integers exactly, rescale, add the bias.

    The product runs as float32 matmuls over so few inputs that no sum can pass 2**24; their
    results are added in float64. Rounding passes gradients straight through.

    Args:
        stored: the layer as read from an artifact.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    step: Tensor | None

    def __init__(self, stored: StoredLinear) -> None:
        super().__init__()
        held = layout(stored.tensors)
        codes = torch.from_numpy(stored.tensors["codes"].astype("int8"))
        self.register_buffer("codes", codes.to(torch.float32), persistent=False)
        scale = torch.from_numpy(stored.tensors["scale"].astype("float32"))
        self.register_buffer("scale", scale, persistent=False)
        bias = None if stored.bias is None else torch.from_numpy(stored.bias.copy())
        self.register_buffer("bias", bias, persistent=False)
        given = stored.input_scale
        fixed = None if given is None else torch.tensor(given, dtype=torch.float32)
        self.register_buffer("step", fixed, persistent=False)
        self.group = held.group
        self.top = float(2 ** (stored.input_bits - 1) - 1)
        self.chunk = max(1, EXACT_FLOAT32 // int(self.top * held.form.top) - 1)

    def quantise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (as floats, straight-through) and the step of each position."""
        step = self.step
        if step is None:
            step = x.detach().abs().amax(-1, keepdim=True).clamp_min_(1e-30).div_(self.top)
        ratio = x / step
        if not (torch.is_grad_enabled() and x.requires_grad):
            return ratio.round_().clamp_(-self.top, self.top), step
        inside = ratio.clamp(-self.top, self.top)
        codes = torch.round(ratio).clamp(-self.top, self.top)
        return inside + (codes - inside).detach(), step

    def integers(self, codes: Tensor) -> list[Tensor]:
        """The exact integer products ``[..., out]`` of input codes ``[..., in]``, one a group."""
        inputs = self.codes.shape[0]
        return [
            self._product(codes, start, min(start + self.group, inputs))
            for start in range(0, inputs, self.group)
        ]

    def _product(self, codes: Tensor, start: int, stop: int) -> Tensor:
        if stop - start <= self.chunk:
            whole = stop - start == self.codes.shape[0]
            return codes @ self.codes if whole else codes[..., start:stop] @ self.codes[start:stop]
        pieces = math.ceil((stop - start) / self.chunk)
        total = torch.zeros((), dtype=torch.float64, device=codes.device)
        for k in range(pieces):
            a, b = start + k * self.chunk, min(start + (k + 1) * self.chunk, stop)
            total = total + (codes[..., a:b] @ self.codes[a:b]).to(torch.float64)
        return total

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` float to ``[..., out]`` of the same type."""
        codes, step = self.quantise(x.to(torch.float32))
        scales = self.scale.unbind()
        parts = [p.to(torch.float32) * s for p, s in zip(self.integers(codes), scales, strict=True)]
        y = sum(parts[1:], parts[0]) * step
        return (y if self.bias is None else y + self.bias).to(x.dtype)
