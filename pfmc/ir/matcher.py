"""Finding patterns in a graph: indexed by operator, commutative, careful about other readers.

A pattern is a small tree of `Var`, `Scalar`, `Constant`, `Op` and `Either`, written in the order
of the graph. `find` walks the nodes of the root's operator only, so a rule costs time linear in
their number. Identity, and Cast to the type its input already has, are looked through.

    >>> silu = Op("Mul", (Var("x"), Op("Sigmoid", (Var("x"),))))
    >>> [m["x"].name for m in find(graph, silu)]            # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pfmc.ir import vocabulary
from pfmc.ir.rewriting import add_array as add_array
from pfmc.ir.rewriting import add_initialiser as add_initialiser
from pfmc.ir.rewriting import fresh as fresh
from pfmc.ir.rewriting import inherit as inherit
from pfmc.ir.rewriting import make_way as make_way
from pfmc.ir.rewriting import remove_dead as remove_dead
from pfmc.ir.rewriting import substitute as substitute
from pfmc.ir.rewriting import take_place as take_place
from pfmc.ir.rewriting import unique_name as unique_name

COMMUTATIVE = frozenset({"Add", "Mul", "And", "Or", "Xor", "Max", "Min", "Equal"})

Array: TypeAlias = npt.NDArray[Any]
Bindings: TypeAlias = dict[str, ir.Value]


@dataclass(frozen=True)
class Var:
    """Any value, called `name`; the same name twice means the same value."""

    name: str


@dataclass(frozen=True)
class Constant:
    """A constant of any shape, called `name`."""

    name: str


@dataclass(frozen=True)
class Scalar:
    """A constant of one element; `value` if given must equal it to a relative 1e-4."""

    value: float | None = None
    name: str = ""


@dataclass(frozen=True)
class Op:
    """A node: operator, inputs, and attributes that must be equal.

    Attributes:
        op_type: operator of domain `domain`.
        inputs: patterns of the inputs; more inputs may follow in the graph only if `more`.
        name: binds the node's first output.
        attributes: name -> value it must have (absent attributes count as unequal).
        shared: whether other nodes may read this node's output too.
        output: which output of the node the pattern reads.
    """

    op_type: str
    inputs: tuple[Pattern, ...]
    name: str = ""
    attributes: tuple[tuple[str, object], ...] = ()
    shared: bool = False
    more: bool = False
    domain: str = ""
    output: int = 0

    @cached_property
    def heads(self) -> tuple[frozenset[str] | None, ...]:
        """For each input the operators one of which must make it, `HELD` for a constant."""
        return tuple(map(_heads, self.inputs))


@dataclass(frozen=True)
class Either:
    """The first of several patterns that leads to a match."""

    choices: tuple[Pattern, ...]


Pattern: TypeAlias = "Var | Constant | Scalar | Op | Either"

HELD = ""
"""Stands among operators for a constant, which no operator makes."""


def _heads(pattern: Pattern) -> frozenset[str] | None:
    """The operators that may make what `pattern` fits; None if it may be any value."""
    if isinstance(pattern, Op):
        return frozenset({pattern.op_type})
    if isinstance(pattern, Either):
        parts = [_heads(choice) for choice in pattern.choices]
        known = [p for p in parts if p is not None]
        return frozenset().union(*known) if len(known) == len(parts) else None
    return None if isinstance(pattern, Var) else frozenset({HELD})


@dataclass(frozen=True)
class Match:
    """A place where a pattern fits.

    Attributes:
        root: the node whose output the pattern describes.
        values: pattern name -> value.
        nodes: the matched nodes, root included, and the nodes looked through.
        private: the matched nodes whose outputs nobody else may read.
    """

    root: ir.Node
    values: Mapping[str, ir.Value]
    nodes: tuple[ir.Node, ...]
    private: tuple[ir.Node, ...] = field(repr=False, default=())

    def __getitem__(self, name: str) -> ir.Value:
        return self.values[name]

    def __contains__(self, name: str) -> bool:
        return name in self.values

    @property
    def output(self) -> ir.Value:
        """The root's first output."""
        return self.root.outputs[0]


# ---------------------------------------------------------------- reading values


def constant(value: ir.Value | None) -> Array | None:
    """The array behind `value` if it is an initialiser that is not also a graph input."""
    source = see_through(value)
    if source is None or source.const_value is None or source.is_graph_input():
        return None
    return source.const_value.numpy()


def is_constant(value: ir.Value | None) -> bool:
    """Whether `value` is an initialiser that is not also a graph input; reads no data."""
    source = see_through(value)
    return source is not None and source.const_value is not None and not source.is_graph_input()


def scalar(value: ir.Value | None) -> float | None:
    """The number behind `value` if it is a constant of one element."""
    source = see_through(value)
    if source is None or source.const_value is None or source.is_graph_input():
        return None
    if source.const_value.size != 1:
        return None
    return float(np.asarray(source.const_value.numpy()).reshape(()))


def integers(value: ir.Value | None) -> tuple[int, ...] | None:
    """The integers behind `value` if it is a constant of at most 64 of them."""
    source = see_through(value)
    if source is None or source.const_value is None or source.is_graph_input():
        return None
    tensor = source.const_value
    if not tensor.dtype.is_integer() or tensor.size > 64:
        return None
    return tuple(int(i) for i in np.asarray(tensor.numpy()).reshape(-1))


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The value of attribute `name`, else `default`."""
    found = node.attributes.get(name)
    return default if found is None else found.value


_ALIASES = frozenset({"Identity", "Cast"})


def _is_transparent(node: ir.Node) -> bool:
    if node.op_type not in _ALIASES or not vocabulary.is_op(node, node.op_type):
        return False
    if node.op_type == "Identity":
        return True
    kind = _kind(node.inputs[0])
    return kind is not None and attribute(node, "to") == kind


def _kind(value: ir.Value | None) -> ir.DataType | None:
    """The element type of `value`, if need be of what Identity made it of; no recursion."""
    while value is not None and value.dtype is None:
        node = value.producer()
        if node is None or node.op_type not in _ALIASES or not vocabulary.is_op(node, node.op_type):
            return None
        if node.op_type == "Cast":
            return ir.DataType(attribute(node, "to"))
        value = node.inputs[0]
    return None if value is None else value.dtype


def see_through(value: ir.Value | None) -> ir.Value | None:
    """`value`, or the value that Identity and same-type Cast made it of."""
    while value is not None:
        node = value.producer()
        if node is None or not _is_transparent(node):
            return value
        value = node.inputs[0]
    return None


def producer(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    """The node that makes `value` (looking through Identity) if it is an `op_type`."""
    source = see_through(value)
    node = source.producer() if source is not None else None
    return node if node is not None and vocabulary.is_op(node, op_type, domain) else None


def rank(value: ir.Value | None) -> int | None:
    """The number of dimensions of `value` if it is known."""
    return None if value is None or value.shape is None else len(value.shape)


def static_dim(value: ir.Value | None, axis: int) -> int | None:
    """The length of `axis` of `value` if it is known and fixed."""
    if value is None or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    length = value.shape[axis]
    return length if isinstance(length, int) else None


# ---------------------------------------------------------------- matching

_State: TypeAlias = tuple[Bindings, tuple[ir.Node, ...], tuple[ir.Node, ...]]


def _bind(name: str, value: ir.Value, state: _State) -> Iterator[_State]:
    bindings, nodes, private = state
    if not name:
        yield state
    elif name not in bindings:
        yield {**bindings, name: value}, nodes, private
    elif bindings[name] is value:
        yield state


def _match(pattern: Pattern, value: ir.Value | None, state: _State) -> Iterator[_State]:
    if value is None:
        return
    if isinstance(pattern, Either):
        for choice in pattern.choices:
            yield from _match(choice, value, state)
        return
    source = see_through(value)
    if source is None:
        return
    if isinstance(pattern, Var):
        yield from _bind(pattern.name, source, state)
    elif isinstance(pattern, Constant):
        if is_constant(source):
            yield from _bind(pattern.name, source, state)
    elif isinstance(pattern, Scalar):
        if _scalar_fits(pattern, source):
            yield from _bind(pattern.name, source, state)
    else:
        yield from _match_op(pattern, value, source, state)


def _scalar_fits(pattern: Scalar, value: ir.Value) -> bool:
    number = scalar(value)
    if number is None:
        return False
    return pattern.value is None or bool(np.isclose(number, pattern.value, rtol=1e-4, atol=0.0))


def _between(value: ir.Value, source: ir.Value) -> tuple[ir.Node, ...]:
    """The nodes looked through from `value` back to `source`."""
    passed: list[ir.Node] = []
    while value is not source:
        node = value.producer()
        assert node is not None
        passed.append(node)
        source_of = node.inputs[0]
        assert source_of is not None
        value = source_of
    return tuple(passed)


def _match_op(pattern: Op, value: ir.Value, source: ir.Value, state: _State) -> Iterator[_State]:
    node = source.producer()
    if node is None or source.index() != pattern.output:
        return
    bindings, nodes, private = state
    passed = _between(value, source)
    mine = () if pattern.shared else (node, *passed)
    inner = bindings, (*nodes, node, *passed), (*private, *mine)
    yield from _match_node(pattern, node, inner)


def _match_node(pattern: Op, node: ir.Node, state: _State) -> Iterator[_State]:
    if not vocabulary.is_op(node, pattern.op_type, pattern.domain):
        return
    if any(attribute(node, key) != wanted for key, wanted in pattern.attributes):
        return
    inputs = tuple(node.inputs)
    count = len(pattern.inputs)
    if len(inputs) < count or (len(inputs) > count and not pattern.more):
        return
    orders = [inputs]
    if count == 2 and pattern.op_type in COMMUTATIVE:
        orders.append((inputs[1], inputs[0]))
    for order in orders:
        if not all(map(_may_fit, pattern.heads, order)):
            continue
        for found in _match_all(pattern.inputs, order, state):
            yield from _bind(pattern.name, node.outputs[pattern.output], found)


def _may_fit(heads: frozenset[str] | None, value: ir.Value | None) -> bool:
    """A quick look at what makes `value`, before all its sources are compared."""
    if heads is None:
        return True
    source = see_through(value)
    if source is None:
        return False
    node = source.producer()
    return (node is not None and node.op_type in heads) or (
        HELD in heads and source.const_value is not None
    )


def _match_all(
    patterns: Sequence[Pattern], values: Sequence[ir.Value | None], state: _State
) -> Iterator[_State]:
    if not patterns:
        yield state
        return
    for found in _match(patterns[0], values[0], state):
        yield from _match_all(patterns[1:], values[1:], found)


def match(pattern: Op, node: ir.Node) -> Match | None:
    """The first way in which `pattern` fits at `node` with no foreign reader inside."""
    for bindings, nodes, private in _match_node(pattern, node, ({}, (), ())):
        found = Match(node, bindings, (node, *nodes), private)
        if not foreign_readers(found):
            return found
    return None


def foreign_readers(found: Match) -> list[ir.Value]:
    """The inner values of a match that other nodes, or the graph's outputs, read."""
    members = set(found.nodes)
    return [
        value
        for node in found.private
        for value in node.outputs
        if value.is_graph_output() or any(use.node not in members for use in value.uses())
    ]


def index(graph: ir.Graph) -> dict[str, list[ir.Node]]:
    """The nodes of `graph` by operator, each list in graph order."""
    table: dict[str, list[ir.Node]] = {}
    for node in graph:
        table.setdefault(node.op_type, []).append(node)
    return table


def find(graph: ir.Graph, *patterns: Op) -> Iterator[Match]:
    """Every match of one of `patterns`, in graph order; the graph may be rewritten between two."""
    roots: dict[str, list[Op]] = {}
    for pattern in patterns:
        roots.setdefault(pattern.op_type, []).append(pattern)
    table: dict[str, list[ir.Node]] = {op_type: [] for op_type in roots}
    for node in graph:
        if (op_type := node.op_type) in table:
            table[op_type].append(node)
    for op_type, choices in roots.items():
        for node in table[op_type]:
            found = _first_match(graph, node, choices)
            if found is not None:
                yield found


def _first_match(graph: ir.Graph, node: ir.Node, patterns: Sequence[Op]) -> Match | None:
    if node.graph is not graph:
        return None
    matches = (match(p, node) for p in patterns if vocabulary.is_op(node, p.op_type, p.domain))
    return next((found for found in matches if found is not None), None)


def replace(found: Match, new: Sequence[ir.Node], output: ir.Value | None = None) -> None:
    """Puts the nodes `new` where the match's root stood; see `substitute`."""
    substitute(found.root, found.nodes, new, found.output, output)
