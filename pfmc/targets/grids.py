"""Rounding that can be trained: values fall on a grid, gradients reach values and step alike.

The gradient of the step is that of LSQ (Esser et al., ICLR 2020, arXiv:1902.08153, equation 3),
without its scaling factor, which an optimiser of Adam's kind does not see.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

_EDGE = 1e-6
"""How much wider, relatively, the range is that gradients pass: its own ends lie inside."""


def _passed(gradient: Tensor, x: Tensor, limit: float) -> Tensor:
    """The gradient where |x| is at most `limit`, else 0: one pass, without a tensor of booleans."""
    limit *= 1 + _EDGE
    made: Tensor = torch.ops.aten.hardtanh_backward(gradient, x, -limit, limit)
    return made


class _Grid(torch.autograd.Function):
    """The nearest multiple of `step`, straight through inside the clipping range.

    The step's gradient is (code - ratio) inside and the code outside, times the value's gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, top: float, odd: bool) -> Tensor:
        ratio = x / step
        codes = ratio.sub(1).div_(2).round_().mul_(2).add_(1) if odd else torch.round(ratio)
        codes.clamp_(-top, top)
        ctx.limit, ctx.step_shape = (top + 1 if odd else top), step.shape
        learns = ctx.needs_input_grad[1]
        ctx.save_for_backward(ratio, codes if learns else None)
        return codes * step if learns else codes.mul_(step)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        ratio, codes = ctx.saved_tensors
        for_x = _passed(gradients[0], ratio, ctx.limit)
        if codes is None:
            return for_x, None, None, None
        outside = (gradients[0] - for_x).mul_(codes)
        for_step = torch.addcmul(outside, codes - ratio, for_x)  # exactly 0 for values on the grid
        return for_x, for_step.sum_to_size(ctx.step_shape), None, None


def on_grid(x: Tensor, step: Tensor, top: float, odd: bool = False) -> Tensor:
    """The code nearest to each ``x / step``, at most `top`, times the step.

    Args:
        x: any shape.
        step: positive, broadcasts against `x`.
        top: largest code.
        odd: whether codes are odd integers (the format ``midrise``), else all integers.
    """
    return cast(Tensor, _Grid.apply(x, step, top, odd))  # type: ignore[no-untyped-call]


class _Integers(torch.autograd.Function):
    """The nearest integer, straight through inside the clipping range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, top: float) -> Tensor:
        ctx.top = top
        ctx.save_for_backward(x)
        return torch.round(x).clamp_(-top, top)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return _passed(gradients[0], x, ctx.top), None


def on_integers(x: Tensor, top: float) -> Tensor:
    """`on_grid` of step 1; where x is counted in steps, the chain rule is LSQ's gradient."""
    return cast(Tensor, _Integers.apply(x, top))  # type: ignore[no-untyped-call]


class _OwnGrid(torch.autograd.Function):
    """`on_grid` with the step of each row set by its own peak; the gradient passes through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, top: float) -> Tensor:
        step = peak_step(x, top)
        return torch.round(x / step).clamp_(-top, top).mul_(step)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def peak_step(x: Tensor, top: float) -> Tensor:
    """The step that makes the largest |x| of each row the code `top`, ``[..., 1]``."""
    return x.detach().abs().amax(-1, keepdim=True).clamp_min_(1e-30).div_(top)


def on_own_grid(x: Tensor, top: float) -> Tensor:
    """``QuantiseToken``: each row of ``x[..., D]`` on the grid that its own peak sets."""
    return cast(Tensor, _OwnGrid.apply(x, top))  # type: ignore[no-untyped-call]


_POOL = 1 << 22
_pools: dict[torch.device, Tensor] = {}


def pooled_normal(like: Tensor, seed: int) -> Tensor:
    """Normal numbers shaped like `like`, not to be written to.

    They are a stretch of a pool of four million that starts where `seed` says: drawing them costs
    nothing, and for training two stretches at different places are as good as independent.
    """
    count = like.numel()
    if count >= _POOL:
        generator = torch.Generator(like.device).manual_seed(seed)
        return torch.empty_like(like).normal_(generator=generator)
    pool = _pools.get(like.device)
    if pool is None:
        generator = torch.Generator(like.device).manual_seed(0)
        pool = torch.empty(_POOL, device=like.device).normal_(generator=generator)
        _pools[like.device] = pool
    start = seed % (_POOL - count)
    return pool[start : start + count].view(like.shape)


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Puts a whole tensor into a parameter, which may lie sharded over processes."""
    mesh = getattr(parameter, "device_mesh", None)
    value = value.to(parameter.device, parameter.dtype).reshape(parameter.shape)
    if mesh is not None:
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, mesh, parameter.placements)  # type: ignore[attr-defined]
    parameter.copy_(value)


def whole(parameter: Tensor) -> Tensor:
    """A copy on the host of a parameter, which may lie sharded; then all processes must call it."""
    held = parameter.detach()
    gather = getattr(held, "full_tensor", None)
    made: Tensor = held if gather is None else gather()
    return made.cpu().clone()


def local_part(tensor: Tensor) -> Tensor:
    """This process' part of a tensor that may lie sharded."""
    part = getattr(tensor, "to_local", None)
    made: Tensor = tensor if part is None else part()
    return made
