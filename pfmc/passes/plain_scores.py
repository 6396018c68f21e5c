"""Makes attention scores plainer: no floor under them, no scale of its own for each head."""

from __future__ import annotations

import onnx_ir as ir

from pfmc.ir import matcher
from pfmc.ir.shapes import Shapes

_SUMS = frozenset({"Add", "Reshape", "Identity", "Where"})
_FAR = 8
_FLOOR = -1e30


def tidy(softmax: ir.Node, known: Shapes) -> int:
    """Changes what lies in front of `softmax`; returns how often.

    ``max(s, lowest)``, a guard against overflow in half precision (XGLM), becomes ``s``.
    ``(q @ k) * c[H, 1, 1]`` becomes ``(q * c) @ k`` (Swin V2).
    """
    value, changed = softmax.inputs[0], 0
    for _ in range(_FAR):
        node = value.producer() if value is not None else None
        if node is None:
            break
        if node.op_type == "Mul":
            return changed + _push(node, known)
        rest = _above_floor(node) if node.op_type == "Max" else None
        if rest is not None and known.shape(rest) == known.shape(node.outputs[0]):
            node.outputs[0].replace_all_uses_with(rest)
            matcher.inherit(softmax, [node], softmax)
            if node.graph is not None:
                matcher.remove_dead(node.graph, [node])
            value, changed = rest, changed + 1
        elif node.op_type in _SUMS:
            value = node.inputs[2 if node.op_type == "Where" else 0]
        else:
            break
    return changed


def _above_floor(node: ir.Node) -> ir.Value | None:
    """x of ``Max(x, lowest)``."""
    if len(node.inputs) != 2 or node.outputs[0].is_graph_output():
        return None
    for low, inner in ((1, 0), (0, 1)):
        number = matcher.scalar(node.inputs[low])
        if number is not None and number <= _FLOOR:
            return node.inputs[inner]
    return None


def _push(node: ir.Node, known: Shapes) -> bool:
    for inner, other in ((0, 1), (1, 0)):
        product, scale = matcher.producer(node.inputs[inner], "MatMul"), node.inputs[other]
        shape = known.shape(scale)
        if product is None or scale is None or shape is None or matcher.scalar(scale) is not None:
            continue
        if any(len(known.shape(v) or ()) < 2 for v in product.inputs):
            continue
        if not matcher.is_constant(scale) or shape[-2:] != (1, 1) or len(shape) > 4:
            continue
        if len(product.outputs[0].uses()) != 1:
            continue
        q, k = product.inputs
        assert q is not None
        scaled = matcher.fresh("Mul", [q, scale])
        again = matcher.fresh("MatMul", [scaled.outputs[0], k])
        dims, whole = known.shape(q), known.shape(node.outputs[0])
        matcher.substitute(node, [node, product], [scaled, again], node.outputs[0])
        if dims is not None:
            known.learn(scaled.outputs[0], dims)
        if whole is not None:
            known.learn(again.outputs[0], whole)
        return True
    return False
