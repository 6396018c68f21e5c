"""The digital parts every target needs: norms, attention, KV memory, tables, adders, and money."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pfmc.hardware import FabricOp
from pfmc.targets.fabric.cost import FabricCost, cost, linears_in_sequence, static_energy
from pfmc.targets.fabric.keys import FABRIC_KEYS

if TYPE_CHECKING:
    import onnx_ir as ir

    from pfmc.ir.probe import ShapeProbe


def fabric_ops(model: ir.Model, shapes: Mapping[str, tuple[ShapeProbe, ...]]) -> list[FabricOp]:
    """The dynamic operations of `model`; see `pfmc.targets.fabric.work.fabric_ops`."""
    from pfmc.targets.fabric import work

    return work.fabric_ops(model, shapes)


__all__ = [
    "FABRIC_KEYS",
    "FabricCost",
    "cost",
    "fabric_ops",
    "linears_in_sequence",
    "static_energy",
]
