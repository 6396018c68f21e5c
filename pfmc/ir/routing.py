"""Fixed linears that a router chooses: which they are, who stands beside them, how often they work.

A router's choice is an integer: the second output of ``TopK``, or ``NonZero``. What is computed of
choices is a choice; rows gathered by a choice are *routed*, and stay so through operators that
work row by row. A fixed linear that reads routed rows is an expert's. The experts of one stack
gather from one value, and all but one number of their names is alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from pfmc.ir import vocabulary
from pfmc.ir.probe import ShapeProbe

_GATHERS = frozenset({"Gather", "GatherND", "GatherElements", "Compress"})
_ROWWISE = frozenset({
    "Add", "Cast", "Clip", "Div", "Gelu", "Identity", "Max", "Min", "Mul", "Quantise",
    "QuantiseToken", "Relu", "Reshape", "Sigmoid", "Slice", "Split", "Squeeze", "Sub", "SwiGLU",
    "Swish", "Tanh", "Transpose", "Unsqueeze", *vocabulary.LINEARS,
})  # fmt: skip


def groups(model: ir.Model) -> list[tuple[str, ...]]:
    """The names of the experts' fixed linears, those of one stack together, in graph order."""
    roots = _routed(model)
    found: dict[tuple[str, str], list[str]] = {}
    for node in vocabulary.fixed_linears(model):
        root = roots.get(node.inputs[0]) if node.inputs[0] is not None else None
        if root is not None:
            alike = re.sub(r"\d+", "*", str(node.name))
            found.setdefault((str(root.name), alike), []).append(str(node.name))
    return [tuple(names) for names in found.values()]


def _routed(model: ir.Model) -> dict[ir.Value, ir.Value]:
    """Routed value -> the value that its rows were gathered from."""
    chosen: set[ir.Value] = set()
    plain: set[ir.Value] = set()  # computed from shapes and constants alone
    roots: dict[ir.Value, ir.Value] = {}
    for node in model.graph:
        inputs = [v for v in node.inputs if v is not None and v.const_value is None]
        if node.op_type == "Shape" or all(v in plain for v in inputs):
            plain.update(node.outputs)
        elif all(v in plain or v in chosen for v in inputs):
            chosen.update(node.outputs)
        elif node.op_type == "TopK":
            chosen.update(node.outputs[1:])
        elif node.op_type == "NonZero":
            chosen.update(node.outputs)
        elif node.op_type in _GATHERS and node.inputs[1] in chosen:
            roots.update(dict.fromkeys(node.outputs, inputs[0]))
        elif node.op_type in _ROWWISE and all(v in roots for v in inputs if v not in plain):
            first = next(v for v in inputs if v in roots)
            roots.update(dict.fromkeys(node.outputs, roots[first]))
    return roots


def activity(
    model: ir.Model, shapes: Mapping[str, Sequence[ShapeProbe]], seen: Mapping[str, int],
    positions: int | None = None,
) -> dict[str, float]:  # fmt: skip
    """How often a token uses each routed fixed linear, on average over tokens.

    A trial run says how many rows the experts of a stack get together for a token (k); each has
    its part of them as calibration saw it, or an equal part.

    Args:
        model: CANONICAL or QUANTISED.
        shapes: value name -> its shapes at trial runs (`pfmc.distill.shapes.probe_shapes`).
        seen: layer -> rows that calibration saw; empty without calibration.
        positions: of a model of fixed size (`pfmc.targets.fabric.work.fixed_positions`).

    Returns:
        layer -> share of the tokens, for routed layers only.
    """
    inputs = {str(n.name): n.inputs[0] for n in vocabulary.fixed_linears(model)}
    shares: dict[str, float] = {}
    for names in groups(model):
        probes = [shapes[str(v.name)][-1] for n in names if (v := inputs[n]) is not None]
        rows = sum(math.prod(p.shape[:-1]) for p in probes)
        together = rows / (positions or probes[0].positions)
        total = sum(seen.get(n, 0) for n in names)
        for name in names:
            part = seen.get(name, 0) / total if total else 1.0 / len(names)
            shares[name] = together * part
    return shares
