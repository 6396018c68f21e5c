"""Finds residual streams by following the data: who writes onto one, who reads it.

A stream is a set of values joined by operators that treat all numbers of a position alike: sums,
moves of positions, products with one number for a position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from pfmc.ir import matcher, vocabulary
from pfmc.ir.vocabulary import DOMAIN
from pfmc.passes import weights

RMS, LAYER = "RMSNormalization", "LayerNormalization"
_NORMS = frozenset({RMS, LAYER})
_SHAPES = frozenset({"Shape", "Size"})
_MOVES = frozenset({"Identity", "Reshape", "Transpose", "Slice", "Gather", "Unsqueeze", "Squeeze",
                    "Expand"})  # fmt: skip
_SUMS = frozenset({"Add", "Sub"})


@dataclass(frozen=True)
class Reader:
    """A fixed linear that reads a stream: behind `norm`, or straight if that is None."""

    linear: ir.Node
    norm: ir.Node | None


@dataclass(frozen=True)
class Stream:
    """A residual stream that may be rotated.

    Attributes:
        width: numbers of a position.
        norms: the norms that read it, of one kind, over the last axis.
        readers: the fixed linears that read it.
        writers: the fixed linears that write onto it.
        tables: the Gathers of constant tables that write onto it.
        constants: (node, input) of every constant that is added to it or joined with it.
    """

    width: int
    norms: tuple[ir.Node, ...]
    readers: tuple[Reader, ...]
    writers: tuple[ir.Node, ...]
    tables: tuple[ir.Node, ...]
    constants: tuple[tuple[ir.Node, int], ...]

    @property
    def centred(self) -> bool:
        """Whether its norms subtract the mean."""
        return self.norms[0].op_type == LAYER


@dataclass(frozen=True)
class Refused:
    """A stream that must stay as it is, by the name of its first norm, and why."""

    where: str
    reason: str


def streams(graph: ir.Graph) -> Iterator[Stream | Refused]:
    """Every residual stream of a CANONICAL graph, in the order of the graph.

    Values that norms read but that no sum makes are no stream.
    """
    seen: set[ir.Value] = set()
    for norm in list(graph):
        x = norm.inputs[0] if _is_norm(norm) else None
        if x is None or x in seen:
            continue
        walk = _Walk(_width(x))
        reason = walk.from_value(x)
        seen |= walk.seen
        if not walk.sums:
            continue
        found = reason or _finished(walk)
        yield Refused(str(norm.name), found) if isinstance(found, str) else found


def _is_norm(node: ir.Node) -> bool:
    return node.op_type in _NORMS and node.domain in ("", "ai.onnx")


def _width(value: ir.Value | None) -> int:
    """The length of the last axis; 0 if unknown."""
    if value is not None and value.const_value is not None:
        shape = weights.shape_of(value)
        return shape[-1] if shape else 0
    return matcher.static_dim(value, -1) or 0


def told(value: ir.Value | ir.Node) -> str:
    """A value or node as an error names it."""
    if isinstance(value, ir.Node):
        return f"{value.op_type} {value.name!r}"
    return repr(value.name)


# -- the walk --------------------------------------------------------------------------------------


@dataclass
class _Walk:
    """What is known of a stream of `width` numbers while its values are visited."""

    width: int
    seen: set[ir.Value] = field(default_factory=set)
    sums: int = 0
    norms: dict[ir.Node, None] = field(default_factory=dict)
    readers: dict[ir.Node, None] = field(default_factory=dict)
    writers: dict[ir.Node, None] = field(default_factory=dict)
    tables: dict[ir.Node, None] = field(default_factory=dict)
    constants: dict[tuple[ir.Node, int], None] = field(default_factory=dict)

    def from_value(self, start: ir.Value) -> str:
        """Visits all values joined with `start`; the first reason why they may not be rotated."""
        waiting, reason = [start], ""
        while waiting:
            value = waiting.pop()
            if value in self.seen:
                continue
            self.seen.add(value)
            if _width(value) != self.width or not self.width:
                reason = reason or f"the width of {told(value)} is not known to be the stream's"
                continue
            for step in (self._made_by, self._read_by):
                more = step(value)
                if isinstance(more, str):
                    reason = reason or more
                else:
                    waiting += more
        return reason

    def _made_by(self, value: ir.Value) -> list[ir.Value] | str:
        node = value.producer()
        if node is None:
            return f"{told(value)} is an input of the model"
        if _is_linear(node):
            self.writers[node] = None
        elif _reads_table(node):
            self.tables[node] = None
        elif _is_norm(node):
            return f"{told(node)} writes onto the stream itself, so its gain cannot be folded"
        else:
            return self._joined(node)
        return []

    def _read_by(self, value: ir.Value) -> list[ir.Value] | str:
        if value.is_graph_output():
            return f"{told(value)} is an output of the model"
        found: list[ir.Value] = []
        for use in value.uses():
            node = use.node
            if _is_linear(node) and use.idx == 0:
                self.readers[node] = None
            elif _is_norm(node) and use.idx == 0:
                self.norms[node] = None
            elif node.op_type not in _SHAPES:
                joined = self._joined(node)
                if isinstance(joined, str):
                    return joined
                if value not in joined:
                    return f"{told(node)} reads {told(value)} otherwise than as a sum"
                found.append(node.outputs[0])
        return found

    def _joined(self, node: ir.Node) -> list[ir.Value] | str:
        """The inputs of `node` that belong to the stream its output belongs to."""
        places = _places(node, self.width)
        if places is None:
            return f"{told(node)} stands on the stream, and a rotation does not pass through it"
        self.sums += node.op_type in _SUMS
        found = []
        for place in places:
            value = node.inputs[place]
            if value is None or _width(value) != self.width:
                return f"{told(node)} adds something of another width to the stream"
            if matcher.is_constant(value) and value.producer() is None:
                self.constants[node, place] = None
            else:
                found.append(value)
        return found


def _is_linear(node: ir.Node) -> bool:
    return vocabulary.is_op(node, vocabulary.FIXED_LINEAR, DOMAIN)


def _reads_table(node: ir.Node) -> bool:
    if not vocabulary.is_op(node, "Gather") or matcher.attribute(node, "axis", 0) != 0:
        return False
    table = node.inputs[0]
    return table is not None and matcher.is_constant(table) and len(weights.shape_of(table)) == 2


def _places(node: ir.Node, width: int) -> list[int] | None:
    """Which inputs are on the stream if the output is; None if no rotation passes through."""
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type in _SUMS:
        return [0, 1]
    if node.op_type in ("Mul", "Div"):
        return _scaled(node)
    if node.op_type == "Concat":
        places = list(range(len(node.inputs)))
        return None if _last(node.inputs[0], matcher.attribute(node, "axis")) else places
    if node.op_type in _MOVES and _keeps_rows(node, width):
        return [0]
    return None


def _scaled(node: ir.Node) -> list[int] | None:
    """The stream's side of a product whose other side is one number for a position."""
    for other in (1, 0) if node.op_type == "Mul" else (1,):
        value = node.inputs[other]
        if value is not None and (matcher.rank(value) == 0 or _width(value) == 1):
            return [1 - other]
        if value is not None and value.const_value is not None and value.const_value.size == 1:
            return [1 - other]
    return None


def _last(value: ir.Value | None, axis: int | None) -> bool:
    """Whether `axis` is, or might be, the last of `value`."""
    rank = matcher.rank(value)
    if value is not None and value.const_value is not None:
        rank = len(weights.shape_of(value))
    return axis is None or rank is None or axis % max(rank, 1) == rank - 1


def _keeps_rows(node: ir.Node, width: int) -> bool:
    """Whether a move leaves every position's `width` numbers together and in order."""
    x, y = node.inputs[0], node.outputs[0]
    if _width(x) != width or _width(y) != width:
        return False
    if node.op_type == "Transpose":
        order = matcher.attribute(node, "perm")
        return order is not None and order[-1] == len(order) - 1
    if node.op_type == "Gather":
        return not _last(x, matcher.attribute(node, "axis", 0))
    if node.op_type == "Slice":
        axes = matcher.integers(node.inputs[3]) if len(node.inputs) > 3 else None
        return axes is not None and not any(_last(x, axis) for axis in axes)
    return True


# -- behind the norms ------------------------------------------------------------------------------


def _finished(walk: _Walk) -> Stream | str:
    kinds = {norm.op_type for norm in walk.norms}
    if len(kinds) > 1:
        return "norms of two kinds read the stream"
    if kinds == {LAYER} and walk.readers:
        reader = next(iter(walk.readers))
        return f"{told(reader)} reads the mean that the layer norms beside it take away"
    readers = [Reader(node, None) for node in walk.readers]
    for norm in walk.norms:
        found = _behind(norm, walk.width)
        if isinstance(found, str):
            return found
        readers += found
    linears = [r.linear for r in readers]
    if len(set(linears)) < len(linears):
        return "a fixed linear reads the stream twice"
    return Stream(
        walk.width, tuple(walk.norms), tuple(readers), tuple(walk.writers), tuple(walk.tables),
        tuple(walk.constants),
    )  # fmt: skip


def _behind(norm: ir.Node, width: int) -> list[Reader] | str:
    """The fixed linears that read `norm`, if nothing else does."""
    if not _plain(norm, width):
        return f"{told(norm)} is not over the last axis with one constant gain"
    found: list[Reader] = []
    waiting = [norm.outputs[0]]
    while waiting:
        value = waiting.pop()
        if value.is_graph_output():
            return f"{told(value)}, what {told(norm)} gives, is an output of the model"
        for use in value.uses():
            node = use.node
            if _is_linear(node) and use.idx == 0:
                found.append(Reader(node, norm))
            elif node.op_type in _MOVES and use.idx == 0 and _keeps_rows(node, width):
                waiting.append(node.outputs[0])
            elif node.op_type not in _SHAPES:
                return f"{told(node)} reads what {told(norm)} gives, and is no fixed linear"
    return found


def _plain(norm: ir.Node, width: int) -> bool:
    axis = matcher.attribute(norm, "axis", -1)
    vectors = [v for v in norm.inputs[1:] if v is not None]
    constant: Callable[[ir.Value], bool] = lambda v: (  # noqa: E731
        matcher.is_constant(v) and v.const_value is not None and weights.shape_of(v) == (width,)
    )
    return (
        (axis == -1 or _last(norm.inputs[0], axis)) and len(vectors) > 0
        and all(map(constant, vectors)) and all(not o.uses() for o in norm.outputs[1:])
    )  # fmt: skip
