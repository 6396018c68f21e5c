"""Writes operators that stand for several plainer ones, such as Einsum and Resize."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from pfmc.ir import matcher, shapes, vocabulary
from pfmc.ir.shapes import Shapes
from pfmc.passes import einsum, plain_activations, resample
from pfmc.passes.base import Context, Declined, Pass, PassResult
from pfmc.passes.fold import Fold
from pfmc.passes.rules import where


@dataclass(frozen=True)
class PlainOperators(Pass):
    """Writes operators by plainer ones.

    ``Einsum`` becomes Transpose, Unsqueeze and MatMul (or Mul); ``Resize`` to a known size becomes
    Gather and weighted sums along each axis; ``GroupNormalization`` becomes InstanceNormalization
    of the groups; a Softmax between Flatten and Reshape, as opsets before 13 need it, becomes one
    along the last axis; ``SplitToSequence`` whose parts are read by ``SequenceAt`` becomes Split;
    rarer activations (PRelu, Selu, Mish, HardSwish …) become arithmetic. What then
    is computed of constants alone is folded.
    """

    name: ClassVar[str] = "plain-operators"

    def apply(self, model: ir.Model, context: Context) -> PassResult:
        """Rewrites every such node that can be."""
        nodes = [n for n in model.graph if n.op_type in _SPELL and vocabulary.is_op(n, n.op_type)]
        known = Shapes(model.graph) if nodes else None
        declined: list[Declined] = []
        counts: dict[str, int] = {}
        for node in nodes:
            assert known is not None
            new = _SPELL[node.op_type](node, known)
            if isinstance(new, str):
                if new:
                    declined.append(Declined(self.name, where(node), f"{node.op_type} of {new}"))
                continue
            if new:
                dims = known.shape(node.outputs[0])
                matcher.substitute(node, [node], new, node.outputs[0])
                if dims is not None:
                    known.learn(new[-1].outputs[0], dims)
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
        if counts:
            Fold().apply(model, context)
            shapes.fill_in(model.graph, Shapes(model.graph))
        return PassResult(model, sum(counts.values()), tuple(declined), {**counts})


def _group_norm(node: ir.Node, known: Shapes) -> list[ir.Node] | str:
    """``GroupNormalization(x, scale, bias)`` (opset 21) by InstanceNormalization of the groups."""
    x, scale, bias = node.inputs
    dims = known.shape(x)
    groups = int(matcher.attribute(node, "num_groups"))
    if dims is None or x is None or not isinstance(dims[1], int) or not dims[1]:
        return "an input of unknown rank or channels"
    epsilon = float(matcher.attribute(node, "epsilon", 1e-5))
    if groups < 1 or dims[1] % groups:
        return f"{dims[1]} channels in {groups} groups"
    if groups == dims[1]:
        return [matcher.fresh("InstanceNormalization", [x, scale, bias], {"epsilon": epsilon})]
    assert node.graph is not None
    graph, stem = node.graph, f"{node.outputs[0].name}:groups"
    kind = x.dtype.numpy() if x.dtype is not None else np.dtype(np.float32)
    new: list[ir.Node] = []

    def add(op_type: str, inputs: list[ir.Value | None], **options: object) -> ir.Value:
        new.append(matcher.fresh(op_type, inputs, options))
        return new[-1].outputs[0]

    def array(numbers: object, dtype: object) -> ir.Value:
        return matcher.add_array(graph, stem, np.asarray(numbers, dtype))  # type: ignore[call-overload]

    apart = add("Reshape", [x, array([0, groups, -1], np.int64)])
    plain = [array([1.0] * groups, kind), array([0.0] * groups, kind)]
    even = add("InstanceNormalization", [apart, *plain], epsilon=epsilon)
    whole = add("Reshape", [even, add("Shape", [x])])
    axes = array(range(1, len(dims) - 1), np.int64)
    wide = [add("Unsqueeze", [v, axes]) for v in (scale, bias)]
    add("Add", [add("Mul", [whole, wide[0]]), wide[1]])
    return new


def _flat_softmax(node: ir.Node, known: Shapes) -> list[ir.Node] | str:
    """``Reshape(Softmax(Flatten(x)), Shape(x))`` -> ``Softmax(x)`` where only the last axis stays.

    Takes the place of the Reshape.
    """
    flat = matcher.producer(node.inputs[0], "Flatten")
    uses = tuple(node.outputs[0].uses())
    if flat is None or len(uses) != 1 or uses[0].node.op_type != "Reshape" or uses[0].idx:
        return ""
    x, back = flat.inputs[0], uses[0].node
    dims = known.shape(x)
    last = matcher.attribute(node, "axis", -1) in (-1, 1)
    if dims is None or not last or matcher.attribute(flat, "axis", 1) not in (-1, len(dims) - 1):
        return ""
    shape = matcher.producer(back.inputs[1], "Shape")
    whole = shape is not None and not shape.attributes and shape.inputs[0] is x
    if known.shape(back.outputs[0]) != dims and not whole:
        return ""
    new = matcher.fresh(node.op_type, [x], {"axis": -1})
    matcher.substitute(back, [back, node, flat], [new], back.outputs[0])
    known.learn(new.outputs[0], dims)
    return []


_MOST_PARTS = 4096


def _sequence(node: ir.Node, known: Shapes) -> list[ir.Node] | str:
    """``SequenceAt(SplitToSequence(x, sizes), i)`` for every i -> ``Split(x, sizes)``."""
    x, axis = node.inputs[0], int(matcher.attribute(node, "axis", 0))
    dims, readers = known.shape(x), [u.node for u in node.outputs[0].uses()]
    places = [matcher.scalar(n.inputs[1]) for n in readers if n.op_type == "SequenceAt"]
    if x is None or dims is None or len(places) != len(readers) or None in places:
        return "a sequence that is not read by SequenceAt alone"
    if not matcher.attribute(node, "keepdims", 1) and len(node.inputs) < 2:
        return "parts without the axis"
    length, widths = dims[axis], node.inputs[1] if len(node.inputs) > 1 else None
    given = known.content(widths) if widths is not None else (1,)
    if not isinstance(length, int) or given is None or not all(isinstance(n, int) for n in given):
        return "parts of unknown sizes"
    sizes = [n for n in given if isinstance(n, int)]
    if widths is None or known.shape(widths) == ():
        if length > _MOST_PARTS * sizes[0]:
            return f"more than {_MOST_PARTS} parts"
        sizes = [min(sizes[0], length - at) for at in range(0, length, sizes[0])]
    if any(p is None or not -len(sizes) <= p < len(sizes) for p in places):
        return "a place that the sequence does not have"
    assert node.graph is not None
    held = matcher.add_array(node.graph, f"{node.outputs[0].name}:sizes", np.asarray(sizes))
    parts = matcher.fresh("Split", [x, held], {"axis": axis}, outputs=len(sizes))
    matcher.inherit(parts, [node, *readers], node)
    for i, output in enumerate(parts.outputs):
        output.name = matcher.unique_name(node.graph, f"{node.outputs[0].name}:{i}")
        known.learn(output, (*dims[:axis], sizes[i], *dims[axis % len(dims) + 1 :]))
    node.graph.insert_before(node, [parts])
    for place, reader in zip(places, readers, strict=True):
        assert place is not None
        matcher.take_place(node.graph, reader.outputs[0], parts.outputs[int(place)])
    matcher.remove_dead(node.graph, readers)
    return []


_SPELL: dict[str, Callable[[ir.Node, Shapes], list[ir.Node] | str]] = {
    "Einsum": einsum.spell,
    "GroupNormalization": _group_norm,
    "LogSoftmax": _flat_softmax,
    "Resize": resample.spell,
    "Softmax": _flat_softmax,
    "SplitToSequence": _sequence,
    **plain_activations.SPELL,
}
