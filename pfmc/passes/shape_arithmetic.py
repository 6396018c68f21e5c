"""Shape arithmetic: what a shape computation gives is said by constants or by graph inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from pfmc.ir import matcher, shapes
from pfmc.ir.shapes import Dim, Dims, Shapes
from pfmc.passes.base import Context, Pass, PassResult


@dataclass(frozen=True)
class ShapeArithmetic(Pass):
    """Reads every shape as a polynomial in the input dimensions and writes it in short.

    A Reshape whose target is known up to one dimension gets a constant target (0 keeps a
    dimension); a Reshape or Expand to the shape that it already has goes, and so do reshapes that
    are undone; integer values are
    made afresh from ``Shape(graph input)``, so that no activation is read for its shape alone;
    missing shapes and element types are filled in.
    """

    name: ClassVar[str] = "shape-arithmetic"

    def apply(self, model: ir.Model, context: Context) -> PassResult:
        """One sweep of reading, one of writing."""
        work = _Work(model.graph)
        notes: dict[str, float | int | str] = {"filled": shapes.fill_in(model.graph, work.shapes)}
        for node in list(model.graph):
            work.visit(node)
        work.drop_dead()
        return PassResult(model, work.changed, (), {**notes, **work.counts})


class _Work:
    def __init__(self, graph: ir.Graph) -> None:
        self.graph, self.shapes = graph, Shapes(graph)
        self.homes = shapes.homes(graph)
        self.made: dict[Dim, ir.Value] = {}
        self.said: dict[tuple[bool, Dims], ir.Value] = {}
        self.changed = 0
        self.counts: dict[str, int] = {}
        self.first = next(iter(graph), None)
        self.touched: list[ir.Node] = []

    def _count(self, what: str) -> None:
        self.changed += 1
        self.counts[what] = self.counts.get(what, 0) + 1

    def visit(self, node: ir.Node) -> None:
        if node.graph is not self.graph:
            return
        if node.op_type == "Reshape":
            self._reshape(node)
        elif node.op_type == "Expand":
            self._expand(node)
        for position, value in enumerate(node.inputs):
            if value is not None and self._is_frontier(node, value):
                self._restate(node, position, value)

    def _is_frontier(self, node: ir.Node, value: ir.Value) -> bool:
        """A computed integer of known content, read by a node whose own content is not known."""
        maker = value.producer()
        return (
            maker is not None
            and value.const_value is None
            and self.shapes.content(value) is not None
            and self.shapes.content(node.outputs[0]) is None
        )

    def _reshape(self, node: ir.Node) -> None:
        dims, result = self.shapes.shape(node.inputs[0]), self.shapes.shape(node.outputs[0])
        if result is None or self._drop_idle(node, dims, result):
            return
        if (before := self._undone(node, result)) is not None:
            output = node.outputs[0]
            output.replace_all_uses_with(before)
            self.touched.append(node)
            self._count("idle")
            return
        target = _target(dims, result)
        old = matcher.integers(node.inputs[1])
        if target is None or old == tuple(target):
            return
        array = np.asarray(target, np.int64)
        self._set_input(node, 1, matcher.add_array(self.graph, f"{node.outputs[0].name}:to", array))
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
        self._count("reshapes")

    def _undone(self, node: ir.Node, result: Dims) -> ir.Value | None:
        """The value that a chain of reshapes, `node` the last of them, gives back."""
        if node.outputs[0].is_graph_output():
            return None
        value = node.inputs[0]
        while (maker := value.producer() if value is not None else None) is not None:
            if maker.op_type not in _RESHAPES:
                return None
            value = maker.inputs[0]
            if value is not None and self.shapes.shape(value) == result:
                return value
        return None

    def _expand(self, node: ir.Node) -> None:
        dims, result = self.shapes.shape(node.inputs[0]), self.shapes.shape(node.outputs[0])
        if self.shapes.content(node.inputs[1]) is not None and result is not None:
            self._drop_idle(node, dims, result)

    def _drop_idle(self, node: ir.Node, dims: Dims | None, result: Dims) -> bool:
        """Lets the readers of a node that keeps the shape read its input."""
        source, output = node.inputs[0], node.outputs[0]
        if source is None or dims != result or output.is_graph_output():
            return False
        maker = source.producer()
        if maker is not None:
            matcher.inherit(maker, [node], maker)
        output.replace_all_uses_with(source)
        self.touched.append(node)
        self._count("idle")
        return True

    def _restate(self, node: ir.Node, position: int, value: ir.Value) -> None:
        content, dims = self.shapes.content(value), self.shapes.shape(value)
        if content is None or dims is None or value.dtype not in (None, ir.DataType.INT64):
            return
        if not self._is_sayable(content) or self._is_short(value):
            return
        self._set_input(node, position, self._say(content, len(dims), value))
        self._count("restated")

    def _set_input(self, node: ir.Node, position: int, value: ir.Value) -> None:
        old = node.inputs[position]
        node.replace_input_with(position, value)
        maker = old.producer() if old is not None else None
        if maker is not None:
            matcher.inherit(node, [maker], node)
            self.touched.append(maker)

    def _is_short(self, value: ir.Value) -> bool:
        """Whether `value` is read from the graph input that its symbol is at home in."""
        node = value.producer()
        if node is not None and node.op_type == "Squeeze" and node.inputs[0] is not None:
            node = node.inputs[0].producer()
        if node is None or node.op_type != "Shape" or node.inputs[0] is None:
            return False
        span = matcher.attribute(node, "start", 0), matcher.attribute(node, "end")
        places = [self.homes.get(s) for s in shapes.symbols_of(self.shapes.content(value) or ())]
        return any(p == (node.inputs[0], span[0]) and span[1] == span[0] + 1 for p in places if p)

    def _is_sayable(self, content: Dims) -> bool:
        return all(s in self.homes for s in shapes.symbols_of(content))

    def _say(self, content: Dims, rank: int, instead: ir.Value) -> ir.Value:
        """A value of `content`, computed at the head of the graph, made once."""
        key = (rank > 0, content)
        if key in self.said:
            return self.said[key]
        if all(isinstance(d, int) for d in content):
            array = np.asarray(content, np.int64).reshape((len(content),) if rank else ())
            value = matcher.add_array(self.graph, f"{instead.name}:known", array)
        else:
            value = self._compute(content, rank, instead)
        self.said[key] = value
        return value

    def _compute(self, content: Dims, rank: int, instead: ir.Value) -> ir.Value:
        parts = [self._element(dim, instead) for dim in content]
        value = parts[0] if len(parts) == 1 else self._node("Concat", parts, instead, {"axis": 0})
        if rank:
            return value
        axis = matcher.add_array(self.graph, f"{instead.name}:axis", np.zeros(1, np.int64))
        return self._node("Squeeze", [value, axis], instead)

    def _element(self, dim: Dim, instead: ir.Value) -> ir.Value:
        """The vector ``[dim]``."""
        if dim in self.made:
            return self.made[dim]
        if isinstance(dim, int):
            value = self._number(dim, instead)
        else:
            total: ir.Value | None = None
            for names, factor in dim.terms:
                term = self._term(names, factor, instead)
                total = term if total is None else self._node("Add", [total, term], instead)
            assert total is not None
            value = total
        self.made[dim] = value
        return value

    def _number(self, number: int, instead: ir.Value) -> ir.Value:
        return matcher.add_array(
            self.graph, f"{instead.name}:number", np.asarray([number], np.int64)
        )

    def _term(self, names: tuple[str, ...], factor: int, instead: ir.Value) -> ir.Value:
        value: ir.Value | None = None
        for name in names:
            length = self._length(name, instead)
            value = length if value is None else self._node("Mul", [value, length], instead)
        if value is None:
            return self._number(factor, instead)
        if factor == 1:
            return value
        return self._node("Mul", [value, self._number(factor, instead)], instead)

    def _length(self, name: str, instead: ir.Value) -> ir.Value:
        key = shapes.symbol(name)
        if key not in self.made:
            source, axis = self.homes[name]
            span = {"start": axis, "end": axis + 1}
            self.made[key] = self._node("Shape", [source], instead, span)
        return self.made[key]

    def _node(
        self,
        op_type: str,
        inputs: list[ir.Value],
        instead: ir.Value,
        attributes: dict[str, int] | None = None,
    ) -> ir.Value:
        node = matcher.fresh(op_type, inputs, attributes)
        maker = instead.producer()
        assert maker is not None
        assert self.first is not None
        matcher.inherit(node, [maker], maker)
        output = node.outputs[0]
        output.name = matcher.unique_name(self.graph, f"{instead.name}:{op_type}")
        output.type = ir.TensorType(ir.DataType.INT64)
        self.graph.insert_before(self.first, [node])
        return output

    def drop_dead(self) -> None:
        """Removes the arithmetic that nobody reads any more."""
        removed = matcher.remove_dead(self.graph, self.touched)
        if removed:
            self.counts["dead"] = removed
            self.changed += removed


_RESHAPES = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten"})


def _target(dims: Dims | None, result: Dims) -> list[int] | None:
    """A constant Reshape target that gives `result`; None if two dimensions stay open."""
    target: list[int] = []
    for axis, dim in enumerate(result):
        if isinstance(dim, int) and dim != 0:
            target.append(dim)
        elif dims is not None and axis < len(dims) and dims[axis] == dim:
            target.append(0)
        else:
            target.append(-1)
    return target if target.count(-1) <= 1 else None
