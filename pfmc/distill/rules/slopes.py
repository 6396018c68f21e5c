"""The slope of what follows a fixed linear in a graph: f' of direct feedback alignment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from pfmc.ir import vocabulary

ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "Tanh": torch.tanh,
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Gelu": functional.gelu,
    "Swish": functional.silu,
    "Elu": functional.elu,
    "Softplus": functional.softplus,
    vocabulary.SWIGLU: functional.silu,
}
"""Operator -> elementwise function; of a gated one, that of the gate."""


def following(model: ir.Model) -> dict[str, Callable[[Tensor], Tensor]]:
    """Layer -> the activation that its output goes straight into, where there is one."""
    found = {}
    for node in vocabulary.fixed_linears(model):
        uses = list(node.outputs[0].uses())
        gate = [u.node.op_type for u in uses if u.idx == 0 and u.node.op_type in ACTIVATIONS]
        if len(uses) == 1 and gate:
            found[str(node.name)] = ACTIVATIONS[gate[0]]
    return found


def slope_of(model: ir.Model) -> Callable[[str, Tensor], Tensor]:
    """``(layer, y) -> f'(y)`` of a model's graph; 1 where no activation follows."""
    known = following(model)

    def slope(layer: str, y: Tensor) -> Tensor:
        if layer not in known:
            return torch.ones_like(y)
        with torch.enable_grad():
            z = y.detach().requires_grad_()
            return torch.autograd.grad(known[layer](z).sum(), z)[0]

    return slope
