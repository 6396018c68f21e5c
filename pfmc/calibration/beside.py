"""The correction in the graph: put behind every fixed linear, found there again, taken away.

``y = QuantisedLinear(x)`` -> ``SidePath(x, Trim(y, gain, offset), down, up)``. The path reads what
the layer's own input converter gives, so it needs no converter of its own, unless those codes are
wider than 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from pfmc.distill.side import TOP, Side
from pfmc.ir import matcher, provenance, vocabulary
from pfmc.ir.vocabulary import DOMAIN

KEY = "pfmc.correction"
"""Metadata of every node of a correction: the layer's name."""


def put(model: ir.Model, sides: Mapping[str, Side]) -> None:
    """Puts corrections, already rounded to what is stored, beside the layers of `model`."""
    tokens = token_tops(model)
    for linear in vocabulary.fixed_linears(model):
        name = str(linear.name)
        if name in sides:
            _put_one(model.graph, linear, sides[name], tokens[name])
    vocabulary.install(model)


def _put_one(graph: ir.Graph, linear: ir.Node, side: Side, token_top: float) -> None:
    y, x = linear.outputs[0], linear.inputs[0]
    assert x is not None
    users = [u for u in y.uses()]
    trim = _node(graph, linear, vocabulary.TRIM, [y], {"gain": side.gain, "offset": side.offset})
    graph.insert_after(linear, trim)
    last = trim
    if side.rank:
        if token_top:
            rounding = matcher.fresh(
                vocabulary.QUANTISE_TOKEN, [x], {"top": token_top}, domain=DOMAIN
            )
            _name(graph, rounding, linear, "codes", x)
            graph.insert_after(last, rounding)
            last, x = rounding, rounding.outputs[0]
        factors = {"down": side.down, "up": side.up}
        path = _node(graph, linear, vocabulary.SIDE_PATH, [x, trim.outputs[0]], factors)
        graph.insert_after(last, path)
        last = path
    _hand_over(graph, y, last.outputs[0], [(u.node, u.idx) for u in users])


def _node(
    graph: ir.Graph, linear: ir.Node, kind: str, inputs: list[ir.Value],
    constants: Mapping[str, np.ndarray],
) -> ir.Node:  # fmt: skip
    """A node of a correction, with its constants as initialisers."""
    held = []
    for part, array in constants.items():
        name = matcher.unique_name(graph, f"{linear.name}:{part}")
        value = np.ascontiguousarray(array, np.float32)
        held.append(matcher.add_initialiser(graph, name, ir.tensor(value, name=name)))
    node = matcher.fresh(kind, [*inputs, *held], domain=DOMAIN)
    _name(graph, node, linear, "trimmed" if kind == vocabulary.TRIM else "corrected",
          linear.outputs[0])  # fmt: skip
    return node


def _name(graph: ir.Graph, node: ir.Node, linear: ir.Node, what: str, like: ir.Value) -> None:
    node.name = f"{linear.name}:{what}"
    node.metadata_props[KEY] = node.metadata_props[vocabulary.KEY_SCOPE] = str(linear.name)
    provenance.union_sources(node, [linear])
    out = node.outputs[0]
    out.name = matcher.unique_name(graph, f"{linear.name}:{what}")
    out.shape, out.type = like.shape, like.type


def _hand_over(
    graph: ir.Graph, old: ir.Value, new: ir.Value, users: list[tuple[ir.Node, int]]
) -> None:
    """`users` and the graph's outputs read `new`, not `old`; an output keeps its name."""
    for node, index in users:
        node.replace_input_with(index, new)
    for index, value in enumerate(graph.outputs):
        if value is old:
            graph.outputs[index] = new
            name = str(old.name)
            old.name = matcher.unique_name(graph, f"{name}:frozen")
            new.name = name


def take(model: ir.Model) -> dict[str, Side]:
    """Takes every correction out of `model`; returns them by layer."""
    found: dict[str, Side] = {}
    for linear in vocabulary.fixed_linears(model):
        mine = [n for n in model.graph if n.metadata_props.get(KEY) == str(linear.name)]
        if mine:
            found[str(linear.name)] = _side(linear, mine)
            _remove(model.graph, linear.outputs[0], mine)
    vocabulary.install(model)
    return found


def _side(linear: ir.Node, nodes: list[ir.Node]) -> Side:
    held = {n.op_type: [matcher.constant(v) for v in n.inputs] for n in nodes}
    gain, offset = held[vocabulary.TRIM][1:]
    assert gain is not None
    assert offset is not None
    none = Side.none(_inputs(linear), gain.size)
    down, up = held.get(vocabulary.SIDE_PATH, [None, None, none.down, none.up])[2:]
    return Side(*(np.array(v, np.float32) for v in (gain, offset, down, up)))


def _inputs(linear: ir.Node) -> int:
    codes = linear.inputs[1]
    assert codes is not None
    assert codes.const_value is not None
    return int(codes.const_value.shape.numpy()[0])


def _remove(graph: ir.Graph, y: ir.Value, nodes: list[ir.Node]) -> None:
    last = nodes[-1].outputs[0]
    constants = [v for n in nodes for v in n.inputs if v is not None and v.const_value is not None]
    _hand_over(graph, last, y, [(u.node, u.idx) for u in last.uses()])
    graph.remove(nodes[::-1], safe=True)
    for value in constants:
        if not value.uses():
            graph.initializers.pop(str(value.name), None)


def token_tops(model: ir.Model) -> dict[str, float]:
    """Largest code of the path's own input converter by layer; 0 where it reads the layer's."""
    return {str(n.name): _token_top(n) for n in vocabulary.fixed_linears(model)}


def _token_top(linear: ir.Node) -> float:
    maker = linear.inputs[0].producer() if linear.inputs[0] is not None else None
    top = None if maker is None else maker.attributes.get("top")
    return 0.0 if top is not None and float(top.value) <= TOP else TOP
