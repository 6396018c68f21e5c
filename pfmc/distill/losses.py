"""What a student is punished for: divergence of token scores, errors of vectors, inner errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

_PIECE = 1 << 18
"""Elements multiplied at a time: they stay in the cache."""


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Sum of ``a * b [N, V]``: row by row, since one running sum of float32 loses the many terms
    of a large vocabulary that are small beside it."""
    rows = max(1, _PIECE // max(1, a.shape[-1]))
    pairs = zip(torch.split(a, rows), torch.split(b, rows), strict=True)
    return torch.stack([(x * y).sum(dim=-1).sum() for x, y in pairs]).sum()


class _Divergence(torch.autograd.Function):
    """Mean over rows of sum p (log p - log q), q = softmax of the student's scores."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, target: Tensor, certainty: Tensor) -> Tensor:
        logs = functional.log_softmax(scores.float(), dim=-1)
        cross = _product(target, logs)
        total: Tensor = (certainty.sum() - cross) / len(scores)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(logs.exp_().sub_(target).div_(len(scores)).to(scores.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * gradients[0], None, None


def forward_kl(scores: Tensor, target: Tensor, certainty: Tensor | None = None) -> Tensor:
    """KL(teacher || student) in nats, mean over rows; temperature 1.

    Hinton et al. 2015, arXiv:1503.02531, with the whole distribution of the teacher as target.

    Args:
        scores: the student's ``[N, V]``; its gradient is (q - p) / N.
        target: the teacher's probabilities ``[N, V]`` float32.
        certainty: sum p log p of each row, of any shape; computed if absent.
    """
    if certainty is None:
        certainty = torch.special.xlogy(target, target).sum()
    return cast(Tensor, _Divergence.apply(scores, target, certainty))  # type: ignore[no-untyped-call]


def vector_error(ours: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared error over the teacher's power, plus 1 - cosine of the mean vector of each sample.

    Args:
        ours, truth: ``[B, ..., D]``.
        mask: ``[B, S]``, 1 where there is a token.
    """
    if mask is not None and ours.ndim == 3:
        weight = mask.to(ours.dtype).unsqueeze(-1)
        ours, truth = ours * weight, truth * weight
    relative = (ours - truth).square().sum() / truth.square().sum().clamp_min(1e-30)
    pooled = [v if v.ndim == 2 else v.flatten(1, -2).sum(dim=1) for v in (ours, truth)]
    cosine = functional.cosine_similarity(pooled[0], pooled[1], dim=-1)
    return relative + (1 - cosine).mean()


def inner_error(ours: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> Tensor:
    """Mean over layers of squared error over the teacher's power, of outputs by layer name."""
    parts = [
        (ours[name] - value).square().sum() / value.square().sum().clamp_min(1e-30)
        for name, value in truth.items()
    ]
    return torch.stack(parts).mean()
