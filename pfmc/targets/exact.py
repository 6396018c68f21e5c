"""A layer of exact integers while it is trained: a plain product is it. For any such target."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pfmc.hardware import TiledLinear
from pfmc.targets.base import Die


class ExactTwin(nn.Module):
    """``x @ weight`` of operands on their grids: what exact integers compute, up to float rounding.

    Every die is the same and outputs stay wide integers, so there is nothing to draw or to learn.
    """

    def face(self, die: Die, converters: bool = True, readings: int | None = None) -> None:
        """Nothing differs between dies."""

    @torch.no_grad()
    def clip(self, weight: Tensor, sigmas: float) -> None:
        """Clips each output's weights, ``[out, in]`` in place."""
        limit = sigmas * weight.std(dim=1, keepdim=True)
        weight.copy_(torch.maximum(torch.minimum(weight, limit), -limit))

    def ranges(self) -> None:
        """There is no output converter."""

    def set_ranges(self, tiled: TiledLinear) -> None:
        """There is no output converter."""

    def forward(self, x: Tensor, weight: Tensor, full: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        return functional.linear(x, weight)
