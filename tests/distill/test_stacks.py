"""Stacks of masks in the place of layers: the fit, the choice of layers, what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pfmc.distill.rules.masks import MaskStack
from pfmc.distill.rules.stacks import chosen, effective, fit, smallest_of_blocks
from pfmc.errors import UsageError


def records(**shapes: tuple[int, int]) -> dict[str, Any]:
    return {
        n.replace("__", "."): SimpleNamespace(inputs=i, outputs=o) for n, (i, o) in shapes.items()
    }


def test_a_stack_is_fitted_to_a_matrix() -> None:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)) * 0.3
    stack = MaskStack(16, 8, 16, 16, "layer")
    left = fit(stack, weight, 300)
    assert left < 0.05
    np.testing.assert_allclose(effective(stack).detach(), weight, atol=0.1)
    with torch.no_grad():
        unit = stack(torch.eye(16)).T
    np.testing.assert_allclose(unit, effective(stack).detach(), atol=1e-5)
    assert float(stack.phase.detach().min()) >= 0


def test_the_smallest_layer_of_every_block_is_chosen() -> None:
    known = records(
        m__layers__0__q=(8, 8), m__layers__0__k=(8, 4), m__layers__1__k=(8, 4),
        m__layers__1__up=(8, 32), head=(8, 2),
    )  # fmt: skip
    assert chosen(known, "") == ["m.layers.0.k", "m.layers.1.k"]
    assert chosen(known, "*.1.*") == ["m.layers.1.k", "m.layers.1.up"]
    assert smallest_of_blocks(records(a=(8, 8), b=(8, 4))) == ["b"]


def test_layers_that_cannot_be_stacks_are_refused() -> None:
    with pytest.raises(UsageError, match="no layer fits"):
        chosen(records(a=(8, 8)), "b*")
    with pytest.raises(UsageError, match="a stack of 513 modes"):
        chosen(records(a=(513, 8)), "")
