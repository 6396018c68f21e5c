"""Brings attention that runs on flattened heads ``[B * H, S, T]`` into four dimensions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from pfmc.ir import matcher, shapes
from pfmc.ir.shapes import Dim, Dims, Shapes

_BINARY = frozenset({"Add", "Sub", "Mul", "Div", "Where"})
_PASSED = frozenset({"Identity", "Dropout", "Cast"})
_FAR = 8


def lift(softmax: ir.Node, known: Shapes) -> ir.Node | None:
    """Rewrites the products around `softmax` from three to four dimensions where that is needed.

    ``Reshape(a3 @ b3 + c3)`` becomes ``Reshape(a3) @ Reshape(b3) + Reshape(c3)``, on both sides of
    the softmax (BLOOM, OPT, DeBERTa, torch's MultiheadAttention): the same numbers, with batch
    and heads apart. Returns the softmax ``[B, H, S, T]``, or None if nothing changed.
    """
    graph, dims = softmax.graph, known.shape(softmax.outputs[0])
    if graph is None or dims is None or len(dims) not in (3, 4):
        return None
    if len(dims) == 3:
        return _lift_flat(softmax, dims, known)
    if not isinstance(dims[1], int):
        return None
    work = _Lift(graph, known, dims[0], dims[1])
    changed = [work.below(softmax), work.above(softmax)]
    return softmax if any(changed) else None


def _lift_flat(softmax: ir.Node, dims: Dims, known: Shapes) -> ir.Node | None:
    """A softmax ``[N, S, T]`` between two products, and both of them, as ``[B, H, S, T]``."""
    graph, split = softmax.graph, _split_before(softmax, dims, known) or _batch_and_heads(dims[0])
    last = matcher.attribute(softmax, "axis", -1) in (-1, 2)
    product = _between_products(softmax, known)
    if graph is None or split is None or not last or product is None:
        return None
    work = _Lift(graph, known, *split)
    source, values = softmax.inputs[0], product.inputs[1]
    assert source is not None
    assert values is not None
    new: list[ir.Node] = []
    middle = matcher.fresh("Softmax", [work.split(source, new)], {"axis": -1})
    new.append(middle)
    known.learn(middle.outputs[0], (*split, *dims[1:]))
    passed = [use.node for use in softmax.outputs[0].uses() if use.node is not product]
    work.multiply(middle.outputs[0], values, dims, new)
    matcher.substitute(product, [product, *passed, softmax], new, product.outputs[0])
    work.above(middle)
    return middle


def _split_before(softmax: ir.Node, dims: Dims, known: Shapes) -> tuple[Dim, int] | None:
    """B and H that the file itself joined, in front of a product or of the softmax."""
    value = softmax.inputs[0]
    for _ in range(_FAR):
        node = value.producer() if value is not None else None
        if node is None:
            return None
        value = node.inputs[2 if node.op_type == "Where" else 0]
        four = known.shape(value) if node.op_type == "Reshape" else None
        if four is not None and len(four) == 4 and isinstance(heads := four[1], int):
            return (four[0], heads) if shapes.multiply(four[0], heads) == dims[0] else None
    return None


def _batch_and_heads(rows: Dim) -> tuple[Dim, int] | None:
    """B and H of ``B * H``: a batch of one if it is a number, else the number before the symbol."""
    if isinstance(rows, int):
        return (1, rows) if rows else None
    for name in sorted(shapes.symbols_of([rows])):
        heads = shapes.divide(rows, shapes.symbol(name))
        if isinstance(heads, int):
            batch: Dim = shapes.symbol(name)
            return batch, heads
    return None


def _between_products(softmax: ir.Node, known: Shapes) -> ir.Node | None:
    """The product behind a softmax that lies between two products of three dimensions."""
    value = softmax.inputs[0]
    for _ in range(8):
        node = value.producer() if value is not None else None
        if node is None or node.op_type == "MatMul":
            break
        place = 2 if node.op_type == "Where" else 0
        value = node.inputs[place] if len(node.inputs) > place else None
    else:
        return None
    after = _reader(softmax.outputs[0])
    if node is None or after is None or after.op_type != "MatMul":
        return None
    both = all(_multiplies_rows(n, known) for n in (node, after))
    return after if both else None


def _multiplies_rows(product: ir.Node, known: Shapes) -> bool:
    """Whether both factors are of three dimensions and neither is broadcast over the first."""
    dims = [known.shape(v) or () for v in product.inputs]
    rows = [d[0] for d in dims if len(d) == 3]
    return len(rows) == 2 and (rows[0] == 1) == (rows[1] == 1)


def _reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads `value` as its first input, seen through copies."""
    uses = tuple(value.uses())
    while len(uses) == 1 and uses[0].node.op_type in _PASSED and not value.is_graph_output():
        to = matcher.attribute(uses[0].node, "to", value.dtype)
        if to != value.dtype:
            return None
        value = uses[0].node.outputs[0]
        uses = tuple(value.uses())
    if len(uses) != 1 or uses[0].idx != 0 or value.is_graph_output():
        return None
    return uses[0].node


@dataclass
class _Lift:
    """Moves reshapes between ``[B * H, ...]`` and ``[B, H, ...]`` over products and sums."""

    graph: ir.Graph
    known: Shapes
    batch: Dim
    heads: int

    def above(self, softmax: ir.Node) -> bool:
        """Moves the reshape of the scores up to the operands of their product."""
        changed, value = False, softmax.inputs[0]
        for _ in range(12):
            node = value.producer() if value is not None else None
            if value is None or node is None or node.op_type == "MatMul":
                break
            if node.op_type == "Reshape":
                moved = self._push(node)
                if moved is None:
                    break
                changed, value = True, moved
            elif node.op_type in _BINARY or node.op_type in _PASSED:
                value = self._towards_product(node)
            else:
                break
        return changed

    def _towards_product(self, node: ir.Node) -> ir.Value | None:
        """The operand that holds the scores: the one behind which a reshape or product lies."""
        operands = node.inputs[1:] if node.op_type == "Where" else node.inputs
        for value in operands:
            maker = value.producer() if value is not None else None
            if maker is not None and maker.op_type in ("Reshape", "MatMul", *_BINARY):
                dims = self.known.shape(value)
                out = self.known.shape(node.outputs[0])
                if dims is not None and out is not None and dims[1:] == out[1:]:
                    return value
        return None

    def _push(self, reshape: ir.Node) -> ir.Value | None:
        """``Reshape(f(a, b))`` -> ``f(Reshape(a), Reshape(b))``; the new value, or None."""
        source, output = reshape.inputs[0], reshape.outputs[0]
        maker = source.producer() if source is not None else None
        wide = self.known.shape(output)
        if source is None or maker is None or wide is None or len(wide) != 4:
            return None
        readers = [use.node for use in source.uses() if use.node.op_type != "Shape"]
        if len(readers) != 1 or source.is_graph_output():
            return None
        new: list[ir.Node] = []
        if maker.op_type == "MatMul" and (
            self._splits(source, wide) and _multiplies_rows(maker, self.known)
        ):
            inputs = [self.split(v, new) for v in maker.inputs if v is not None]
        elif maker.op_type in _BINARY:
            like = self._like(maker, source)
            if like is None:
                return None
            inputs = [self._follow(v, like, reshape, new) for v in maker.inputs if v is not None]
        elif maker.op_type == "Reshape" and self.known.shape(maker.inputs[0]) == wide:
            before = maker.inputs[0]
            assert before is not None
            return self._forget(reshape, before)
        else:
            return None
        options = {n: a.value for n, a in maker.attributes.items()}
        new.append(matcher.fresh(maker.op_type, inputs, options))
        matcher.substitute(reshape, [maker], new, output)
        self.known.learn(new[-1].outputs[0], wide)
        return new[-1].outputs[0]

    def _forget(self, reshape: ir.Node, before: ir.Value) -> ir.Value:
        """Drops a pair of reshapes that leaves `before` as it was."""
        same = matcher.fresh("Identity", [before])
        output, dims = reshape.outputs[0], self.known.shape(before)
        maker = reshape.inputs[0].producer() if reshape.inputs[0] is not None else None
        matcher.substitute(reshape, [maker] if maker is not None else [], [same], output)
        if dims is not None:
            self.known.learn(same.outputs[0], dims)
        return same.outputs[0]

    def below(self, softmax: ir.Node) -> bool:
        """Moves the reshape of the weights down behind their product with the values."""
        reshape = _reader(softmax.outputs[0])
        if reshape is None or reshape.op_type != "Reshape":
            return False
        product = _reader(reshape.outputs[0])
        if product is None or product.op_type != "MatMul":
            return False
        weights, values = reshape.inputs[0], product.inputs[1]
        flat = self.known.shape(reshape.outputs[0])
        wide = self.known.shape(softmax.outputs[0])
        if flat is None or wide is None or values is None or weights is None:
            return False
        if len(self.known.shape(values) or ()) != 3 or flat[1:] != wide[2:]:
            return False
        new: list[ir.Node] = []
        self.multiply(weights, values, flat, new)
        matcher.substitute(product, [product, reshape], new, product.outputs[0])
        return True

    def multiply(
        self, weights: ir.Value, values: ir.Value, flat: Dims, new: list[ir.Node]
    ) -> ir.Value:
        """``weights[B, H, S, T] @ values[B * H, T, D]`` as ``[B * H, S, D]``."""
        held = self.known.shape(values)
        assert held is not None
        product = self._add("MatMul", [weights, self.split(values, new)], new)
        self.known.learn(product, (self.batch, self.heads, flat[1], held[2]))
        return self.join(product, (flat[0], flat[1], held[2]), new)

    def _splits(self, source: ir.Value, wide: Dims) -> bool:
        dims = self.known.shape(source)
        return dims is not None and len(dims) == 3 and (
            dims[1:] == wide[2:] and wide[1] == self.heads
        )  # fmt: skip

    def _like(self, maker: ir.Node, source: ir.Value) -> ir.Value | None:
        """An operand that has the shape of the result."""
        dims = self.known.shape(source)
        if dims is None:
            return None
        ready = (dims, (shapes.multiply(self.batch, self.heads), *dims[1:]))
        fits = (v for v in maker.inputs if v is not None and self.known.shape(v) in ready)
        return next(fits, None)

    def _follow(
        self, value: ir.Value, source: ir.Value, reshape: ir.Node, new: list[ir.Node]
    ) -> ir.Value:
        """An operand of what was reshaped, reshaped alike; one number stays as it is."""
        dims, wide = self.known.shape(value), self.known.shape(reshape.outputs[0])
        assert wide is not None
        if value.const_value is not None and value.const_value.size == 1:
            return value
        like = self.known.shape(source)
        if dims is not None and like is not None and len(dims) == len(like) == 3 and (
            dims[0] == like[0] and wide[1] == self.heads
        ):  # fmt: skip
            return self.split(value, new)
        if dims != like:
            size = self._add("Shape", [source], new)
            value = self._add("Expand", [value, size], new)
        target = reshape.inputs[1]
        assert target is not None
        made = self._add("Reshape", [value, target], new, allowzero=_allowzero(reshape))
        self.known.learn(made, wide)
        return made

    def split(self, value: ir.Value, new: list[ir.Node], far: int = _FAR) -> ir.Value:
        """``[B * H, s, t]`` as ``[B, H, s, t]``; `new` takes the nodes."""
        dims = self.known.shape(value)
        assert dims is not None
        wide: Dims = (self.batch, self.heads, *dims[1:])
        node = value.producer()
        if node is not None and node.op_type == "Reshape" and (
            self.known.shape(node.inputs[0]) == wide and node.inputs[0] is not None
        ):  # fmt: skip
            return node.inputs[0]
        if node is not None and node.op_type in ("Mul", "Div") and far:
            inside, number = node.inputs[:2]
            if matcher.scalar(number) is not None and inside is not None and (
                self.known.shape(inside) == dims
            ):  # fmt: skip
                inner = self.split(inside, new, far - 1)
                made = self._add(node.op_type, [inner, number], new)
                self.known.learn(made, wide)
                return made
        rest = self._add("Shape", [value], new, start=1)
        front = self._numbers([self.batch if isinstance(self.batch, int) else -1, self.heads])
        target = self._add("Concat", [front, rest], new, axis=0)
        made = self._add("Reshape", [value, target], new)
        self.known.learn(made, wide)
        return made

    def join(self, value: ir.Value, dims: Dims, new: list[ir.Node]) -> ir.Value:
        """``[B, H, s, t]`` as ``[B * H, s, t]``."""
        rest = self._add("Shape", [value], new, start=2)
        front = self._numbers([dims[0] if isinstance(dims[0], int) else -1])
        target = self._add("Concat", [front, rest], new, axis=0)
        made = self._add("Reshape", [value, target], new)
        self.known.learn(made, dims)
        return made

    def _add(
        self, op_type: str, inputs: list[ir.Value | None], new: list[ir.Node], **options: object
    ) -> ir.Value:
        new.append(matcher.fresh(op_type, inputs, options))
        return new[-1].outputs[0]

    def _numbers(self, numbers: list[int]) -> ir.Value:
        return matcher.add_array(self.graph, "heads:shape", np.asarray(numbers, np.int64))


def _allowzero(node: ir.Node) -> int:
    return int(matcher.attribute(node, "allowzero", 0))
