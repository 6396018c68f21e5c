"""Symbolic shapes: every dimension as a polynomial in the dimensions of the graph's inputs.

Exporters spend a third of a graph on shape arithmetic, and older ones leave all inner shapes
out. `Shapes` runs through the graph once with two facts per value: its shape, and, for short
integer vectors, their contents, both as polynomials. What is not understood is unknown (None),
or an opaque symbol of its own; nothing is guessed.
"""

from __future__ import annotations

import re
from typing import Any

import onnx_ir as ir

from pfmc.errors import InputError
from pfmc.ir import matcher, types
from pfmc.ir.lengths import Dim as Dim
from pfmc.ir.lengths import Dims as Dims
from pfmc.ir.lengths import Poly as Poly
from pfmc.ir.lengths import add as add
from pfmc.ir.lengths import broadcast as broadcast
from pfmc.ir.lengths import divide as divide
from pfmc.ir.lengths import multiply as multiply
from pfmc.ir.lengths import parse as parse
from pfmc.ir.lengths import product as product
from pfmc.ir.lengths import same as same
from pfmc.ir.lengths import symbol as symbol
from pfmc.ir.lengths import symbols_of as symbols_of
from pfmc.ir.lengths import value_at as value_at
from pfmc.ir.shape_rules import CONTENTS, RULES


class Shapes:
    """Symbolic shapes and integer contents of the values of a graph.

    Attributes:
        graph: the graph read; later changes of it are not seen.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._shapes: dict[ir.Value, Dims] = {}
        self._contents: dict[ir.Value, Dims] = {}
        for value in graph.inputs:
            self._enter(value)
        for node in graph:
            self._visit(node)

    def shape(self, value: ir.Value | None) -> Dims | None:
        """The shape of `value`, None if its rank is unknown."""
        if value is None:
            return None
        if value not in self._shapes and value.const_value is not None:
            self._shapes[value] = tuple(value.const_value.shape.numpy())
        return self._shapes.get(value)

    def content(self, value: ir.Value | None) -> Dims | None:
        """The elements of an integer scalar or vector, None if unknown."""
        if value is None:
            return None
        if value not in self._contents and value.const_value is not None:
            found = matcher.integers(value)
            if found is not None and len(value.const_value.shape) <= 1:
                self._contents[value] = found
        return self._contents.get(value)

    def learn(self, value: ir.Value, dims: Dims) -> None:
        """Enters the shape of a value made after the reading."""
        self._shapes[value] = dims

    def _enter(self, value: ir.Value) -> None:
        if value.shape is not None:
            self._shapes[value] = tuple(
                dim if (dim := parse(d)) is not None else symbol(f"{value.name}[{axis}]")
                for axis, d in enumerate(value.shape)
            )

    def _visit(self, node: ir.Node) -> None:
        try:
            self._learn(node)
        except (ArithmeticError, LookupError, ValueError) as error:
            raise InputError(
                f"The shapes around {node.op_type} contradict each other: {error}",
                where=f"node {node.name!r} ({node.op_type})",
                mend="export the model again",
            ) from error

    def _learn(self, node: ir.Node) -> None:
        rule = RULES.get(node.op_type)
        found = rule(self, node) if rule is not None else None
        if found is not None:
            for value, shape in zip(node.outputs, found, strict=False):
                if shape is not None:
                    self._shapes[value] = tuple(
                        d if _is_plain(d) else symbol(f"{value.name}[{axis}]")
                        for axis, d in enumerate(shape)
                    )
        for value in node.outputs:
            if value not in self._shapes:
                self._believe(value)
        content = CONTENTS.get(node.op_type)
        if content is not None and (dims := content(self, node)) is not None:
            whole = self._shapes.get(node.outputs[0])
            if (whole is None or len(whole) <= 1) and all(map(_is_plain, dims)):
                self._contents[node.outputs[0]] = dims

    def _believe(self, value: ir.Value) -> None:
        """Takes the shape that the file gives, where every dimension has a number or a name."""
        if value.shape is None:
            return
        dims = [parse(d) for d in value.shape]
        self._shapes[value] = tuple(
            symbol(f"{value.name}[{axis}]") if d is None or _is_foreign(d) else d
            for axis, d in enumerate(dims)
        )


_HIGHEST_DEGREE, _MOST_TERMS = 64, 64


def _is_plain(dim: Dim) -> bool:
    """Whether a length is one that int64 holds, and not a product or a sum without end."""
    terms = dim.terms if isinstance(dim, Poly) else (((), dim),)
    return len(terms) <= _MOST_TERMS and all(
        len(names) <= _HIGHEST_DEGREE and abs(factor) < 1 << 62 for names, factor in terms
    )


def _is_foreign(dim: Dim) -> bool:
    """Names with operators in them, as exporters write, are not taken for symbols."""
    return any(not re.match(r"^\w+$", name) for name in symbols_of([dim]))


def fill_in(graph: ir.Graph, shapes: Shapes) -> int:
    """Writes the shapes found into the values that lack one, or a dimension; returns how many.

    Element types that follow from the operators are written too.
    """
    filled = 0
    for node in graph:
        types.note(node)
        for value in node.outputs:
            dims = shapes.shape(value)
            if dims is None or not _lacks(value, dims):
                continue
            value.shape = ir.Shape([d if isinstance(d, int) else _written(d) for d in dims])
            filled += 1
    return filled


def _written(dim: Poly) -> str | None:
    text = str(dim)
    return None if "[" in text else text


def _lacks(value: ir.Value, dims: Any) -> bool:
    if value.shape is None or len(value.shape) != len(dims):
        return True
    return any(
        not isinstance(old, int) and (isinstance(new, int) or parse(old) is None)
        for old, new in zip(value.shape, dims, strict=True)
    )


def homes(graph: ir.Graph) -> dict[str, tuple[ir.Value, int]]:
    """Where each symbol can be read: a graph input, and axis, that is this symbol alone.

    Masks come last: they may be longer than the sequence once there is a KV memory.
    """
    homes: dict[str, tuple[ir.Value, int]] = {}
    for value in sorted(graph.inputs, key=lambda v: "mask" in str(v.name)):
        for axis, raw in enumerate(value.shape or ()):
            dim = parse(raw)
            name = f"{value.name}[{axis}]"
            if dim is None:
                homes.setdefault(name, (value, axis))
            elif isinstance(dim, Poly) and len(dim.terms) == 1:
                (names, factor), *_ = dim.terms
                if factor == 1 and len(names) == 1:
                    homes.setdefault(names[0], (value, axis))
    return homes
