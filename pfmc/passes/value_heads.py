"""Finds the fixed linears before and behind an attention's values, where nothing else looks on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from pfmc.ir import matcher, vocabulary
from pfmc.ir.vocabulary import DOMAIN
from pfmc.passes import weights
from pfmc.passes.residual import Refused, told


@dataclass(frozen=True)
class Heads:
    """The values of one attention.

    Attributes:
        maker: the fixed linear that makes the values.
        start: first of its outputs that is a value.
        held: KV heads; groups: query heads that share one; size: numbers of a head.
        reader: the fixed linear that reads all query heads' results.
    """

    maker: ir.Node
    start: int
    held: int
    groups: int
    size: int
    reader: ir.Node

    @property
    def stop(self) -> int:
        """One behind the last of the maker's outputs that is a value."""
        return self.start + self.held * self.size


def value_heads(graph: ir.Graph) -> Iterator[Heads | Refused]:
    """The values of every attention of a CANONICAL graph, in its order."""
    for node in list(graph):
        if vocabulary.is_op(node, "Attention"):
            found = _heads(node)
            yield Refused(str(node.name), found) if isinstance(found, str) else found


def _heads(attention: ir.Node) -> Heads | str:
    value = attention.inputs[2] if len(attention.inputs) > 2 else None
    made = _source(value)
    if isinstance(made, str):
        return made
    maker, start, held, size = made
    reader = _reader(attention.outputs[0])
    if isinstance(reader, str):
        return reader
    width = _shape(reader)[0]
    if width % (held * size):
        return f"{told(reader)} reads {width} numbers, no multiple of {held} heads of {size}"
    return Heads(maker, start, held, width // (held * size), size, reader)


def _source(value: ir.Value | None) -> tuple[ir.Node, int, int, int] | str:
    """``Transpose(Reshape([Split](Reshape*(maker))))``: maker, first output, heads, their size."""
    node = _alone(value, "Transpose")
    if node is None or list(matcher.attribute(node, "perm", ())) != [0, 2, 1, 3]:
        return "the values are not heads of a fixed linear"
    node = _alone(node.inputs[0], "Reshape")
    to = None if node is None else matcher.integers(node.inputs[1])
    if node is None or to is None or len(to) != 4 or to[3] <= 0:
        return "the values are not heads of a known size"
    value, start, length = node.inputs[0], 0, 0
    split = None if value is None else value.producer()
    if split is not None and split.op_type == "Split":
        parts = _part(split, value)
        if parts is None:
            return f"{told(split)} does not split the last axis into parts of known lengths"
        start, length = parts
        value = split.inputs[0]
    while (node := _alone(value, "Reshape")) is not None:
        if matcher.static_dim(node.inputs[0], -1) != matcher.static_dim(node.outputs[0], -1):
            break
        value = node.inputs[0]
    maker = None if value is None else value.producer()
    if maker is None or not vocabulary.is_op(maker, vocabulary.FIXED_LINEAR, DOMAIN):
        return "the values are not made by a fixed linear"
    if value is not None and (len(value.uses()) != 1 or value.is_graph_output()):
        return f"others read {told(value)} too"
    length = length or _shape(maker)[1]
    if length % to[3]:
        return f"{length} values are no whole number of heads of {to[3]}"
    return maker, start, length // to[3], to[3]


def _part(split: ir.Node, value: ir.Value | None) -> tuple[int, int] | None:
    """Where on the last axis the output `value` of a Split lies, and how long it is."""
    axis = matcher.attribute(split, "axis", 0)
    rank = matcher.rank(split.inputs[0])
    lengths = [matcher.static_dim(v, -1) for v in split.outputs]
    known = [n for n in lengths if n is not None]
    if value is None or len(value.uses()) != 1 or len(known) < len(lengths):
        return None
    if axis != -1 and (rank is None or axis != rank - 1):
        return None
    at = value.index()
    return None if at is None else (sum(known[:at]), known[at])


def _alone(value: ir.Value | None, kind: str) -> ir.Node | None:
    """The `kind` that makes `value`, if `value` has one reader."""
    node = None if value is None else value.producer()
    if node is None or value is None or not vocabulary.is_op(node, kind):
        return None
    return node if len(value.uses()) == 1 and not value.is_graph_output() else None


def _reader(value: ir.Value) -> ir.Node | str:
    """``reader(Reshape*(Transpose(value)))``, each the only reader."""
    turned = False
    while not value.is_graph_output() and len(uses := list(value.uses())) == 1:
        node = uses[0].node
        if vocabulary.is_op(node, vocabulary.FIXED_LINEAR, DOMAIN) and turned:
            return node
        if node.op_type == "Transpose" and not turned:
            turned = list(matcher.attribute(node, "perm", ())) == [0, 2, 1, 3]
        elif node.op_type != "Reshape" or not turned:
            break
        if not turned:
            break
        value = node.outputs[0]
    return "what attention gives is read otherwise than by one fixed linear"


def _shape(linear: ir.Node) -> tuple[int, ...]:
    assert linear.inputs[1] is not None
    return weights.shape_of(linear.inputs[1])
