"""What stays in pieces: operators of the fabric that a wider recognition would have taken in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from pfmc.hardware import FabricOp
from pfmc.ir import provenance, vocabulary
from pfmc.passes.rules import where

PIECES = frozenset({
    "Conv", "ConvTranspose", "GatherElements", "Gemm", "InstanceNormalization", "LogSoftmax",
    "MatMul", "RotaryEmbedding", "ScatterElements", "ScatterND", "Softmax", "TopK",
})  # fmt: skip
"""Operators with work of their own that no block such as Attention has taken in."""
_IDLE = frozenset({"wiring", "control", "table"})
_PLAIN = {
    "MatMul": "a product of two activations",
    "TopK": "a choice made at run time",
    "ScatterND": "rows sent back to their places",
}


def left_in_pieces(
    model: ir.Model, fabric: Sequence[FabricOp], notes: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The pieces of `model` in graph order, each with the work it is priced by.

    Args:
        model: CANONICAL or QUANTISED.
        fabric: `pfmc.targets.fabric.work.fabric_ops` of the same model.
        notes: label -> report of each pass (`pfmc.passes.pipeline.Step.report`), for the reasons.

    Returns:
        operator, node, scope, sources, work a position, and why it was not taken in.
    """
    linears = set(vocabulary.fixed_linears(model))
    nodes = [n for n in model.graph if n not in linears]
    reasons = {d["where"]: d["reason"] for r in notes.values() for d in r.get("declined", ())}
    return [
        {
            "operator": node.op_type,
            "node": str(node.name),
            "scope": provenance.scope(node),
            "sources": list(provenance.sources(node)),
            "work": dict(op.work),
            "reason": reasons.get(where(node)) or _PLAIN.get(node.op_type, "part of no block"),
        }
        for node, op in zip(nodes, fabric, strict=False)
        if node.op_type in PIECES and op.kind not in _IDLE
    ]
