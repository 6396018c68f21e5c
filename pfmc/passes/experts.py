"""Stacks of weights: one fixed linear for each expert or head, and rows sent to the right one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from pfmc.ir import matcher, vocabulary
from pfmc.ir.matcher import Constant, Match, Op, Var
from pfmc.passes.rules import Rule
from pfmc.passes.weights import (
    bias_vector,
    derived,
    kind_of,
    linear,
    shape_of,
    slices,
    transposed,
    zeros,
)

_MOST = 4096


class StackOnTheLeft(Rule):
    """Product with a constant stack on the left, such as the learnt queries of a pooling head.

    ``MatMul(W[n, out, in], x[..., in, S])`` -> ``Transpose(MatMul(Transpose(x), Wᵀ))``
    """

    patterns = (Op("MatMul", (Constant("weight"), Var("x"))),)

    def check(self, found: Match) -> str:
        """Checks that W is a stack and the rank of x known."""
        shape, rank = shape_of(found["weight"]), matcher.rank(found["x"])
        on_the_left = matcher.see_through(found.root.inputs[0]) is found["weight"]
        if len(shape) != 3 or not on_the_left or matcher.is_constant(found["x"]):
            return "no product with a stack of matrices on the left"
        return "" if rank is not None and rank >= 2 else "a product of unknown rank"

    def rewrite(self, graph: ir.Graph, found: Match) -> None:
        """Turns both factors and the product."""
        count, rows, columns = shape_of(found["weight"])
        turned = derived(
            graph, found["weight"], (count, columns, rows), lambda a: a.transpose(0, 2, 1)
        )
        rank = matcher.rank(found["x"]) or 3
        made = _Nodes(graph, found)
        x = made.add("Transpose", found["x"], perm=_last_two(rank))
        lengths = found["x"].shape
        if lengths is not None:
            made.nodes[-1].outputs[0].shape = ir.Shape([lengths[i] for i in _last_two(rank)])
        product = made.add("MatMul", x, turned)
        made.add("Transpose", product, perm=_last_two(max(rank, 3)))
        matcher.replace(found, made.nodes)


def _last_two(rank: int) -> tuple[int, ...]:
    return (*range(rank - 2), rank - 1, rank - 2)


class StackedProduct(Rule):
    """Product with a constant stack of matrices, one for each head or expert.

    ``MatMul(x[..., n, S, in], W[n, in, out])`` -> ``Concat(FixedLinear(x[..., i, :, :], W[i]))``

    An x of one matrix goes through all linears. Axes of length one in W, as in
    ``MatMul(x[n, ..., S, in], W[n, 1, in, out])``, say which axis of x counts.
    """

    patterns = (Op("MatMul", (Var("x"), Constant("weight"))),)

    def check(self, found: Match) -> str:
        """Checks that W is a stack and that x has as many matrices."""
        shape, rank = shape_of(found["weight"]), matcher.rank(found["x"])
        stack = _stack(shape)
        if stack is None or matcher.is_constant(found["x"]):
            return "no product with a stack of matrices"
        count, distance = stack
        if 0 in shape:
            return "a product with a stack without elements"
        if rank is None or rank < (2 if len(shape) == 3 else len(shape)):
            return "a product with a stack of matrices of unknown rank"
        here = matcher.static_dim(found["x"], rank - distance) if rank > 2 else 1
        if count > 1 and here not in (1, count):
            return f"a product of an unknown number of matrices with a stack of {count}"
        return "" if count <= _MOST else f"a stack of {count} matrices"

    def rewrite(self, graph: ir.Graph, found: Match) -> None:
        """Splits x, applies the linears, joins their outputs."""
        x, weight = found["x"], found["weight"]
        rank = matcher.rank(x) or 2
        *_, height, width = shape_of(weight)
        count, distance = _stack(shape_of(weight)) or (1, 3)
        if len(shape_of(weight)) > 3:
            stack = (count, height, width)
            weight = derived(graph, weight, stack, lambda a: a.reshape(stack))
        made = _Nodes(graph, found)
        if rank == 2:
            x, rank = made.add("Unsqueeze", x, made.ints(0)), 3
        axis = rank - distance
        parts = [x] * count
        if count > 1 and matcher.rank(found["x"]) != 2 and matcher.static_dim(x, axis) == count:
            options = {"axis": axis, "num_outputs": count}
            made.nodes.append(matcher.fresh("Split", [x], options, outputs=count))
            parts = list(made.nodes[-1].outputs)
        nothing = zeros(graph, str(found.output.name), width, kind_of(weight))
        linears = [
            _inner(part, matrix, nothing, found)
            for part, matrix in zip(parts, slices(graph, weight), strict=True)
        ]
        made.nodes.extend(linears)
        made.add("Concat", *(n.outputs[0] for n in linears), axis=axis)
        matcher.replace(found, made.nodes)


def _stack(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """How many matrices W holds, and the axis that counts them, from the end; None: no stack."""
    places = [i for i, n in enumerate(shape[:-2]) if n != 1]
    if len(shape) < 3 or len(places) > 1:
        return None
    place = places[0] if places else len(shape) - 3
    return shape[place], len(shape) - place


def _inner(x: ir.Value, matrix: ir.Value, bias: ir.Value, found: Match) -> ir.Node:
    """A fixed linear that holds no whole value of the source file."""
    node = linear(x, matrix, bias, found.output, found.root)
    node.metadata_props.pop(vocabulary.KEY_VALUE, None)
    return node


def _gathered(name: str) -> tuple[Op, ...]:
    """The matrices of a stack, one for each row, as exporters gather them."""
    parts = (Constant(name), Var("which"))
    return (
        Op("GatherND", parts, name=f"{name}_rows", shared=True),
        Op("Gather", parts, name=f"{name}_rows", shared=True),
    )


class GatheredExperts(Rule):
    """Expert weights gathered anew for every row, as ``batched_mm`` exports do.

    ``MatMul(W[which], x[n, in, 1])`` or ``MatMul(x[n, 1, in], W[which])``, and the bias gathered
    alike behind it -> the rows of expert i go to ``FixedLinear(., W[i], b[i])``, for every i, and
    back to their places. The weights stay where they are; the rows travel.
    """

    patterns = tuple(
        Op("MatMul", order)
        for gather in _gathered("stack")
        for order in ((gather, Var("x")), (Var("x"), gather))
    )

    def check(self, found: Match) -> str:
        """Checks that one matrix of a stack is gathered for each row."""
        maker = found["stack_rows"].producer()
        assert maker is not None
        shape, rank = shape_of(found["stack"]), matcher.rank(found["which"])
        wanted = 2 if maker.op_type == "GatherND" else 1
        if len(shape) != 3 or rank != wanted or matcher.rank(found["x"]) != 3:
            return "weights gathered at run time that are no stack of matrices with one for a row"
        if matcher.attribute(maker, "batch_dims", 0) or matcher.attribute(maker, "axis", 0):
            return "weights gathered at run time along another axis than the first"
        if wanted == 2 and matcher.static_dim(found["which"], 1) != 1:
            return "weights gathered at run time by more than one index"
        single = 2 if _is_left(found) else 1
        if matcher.static_dim(found["x"], single) != 1:
            return "gathered weights that meet more than one row each"
        if (matcher.static_dim(found["x"], 0) == 1) != (matcher.static_dim(found["which"], 0) == 1):
            return "gathered weights that are broadcast over the rows, or rows over them"
        if 0 in shape:
            return "a stack of experts without elements"
        return "" if shape[0] <= _MOST else f"a stack of {shape[0]} experts"

    def rewrite(self, graph: ir.Graph, found: Match) -> None:
        """Sends the rows through one fixed linear for each expert."""
        left = _is_left(found)
        axis = 2 if left else 1
        made = _Nodes(graph, found)
        matrices = slices(graph, found["stack"])
        if left:
            matrices = [transposed(graph, m) for m in matrices]
        x = made.add("Squeeze", found["x"], made.ints(axis))
        which = found["which"]
        if matcher.rank(which) == 2:
            flat = made.add("Squeeze", which, made.ints(1))
            flat.type, which = which.type, flat
        tail = _bias_behind(found, axis)
        biases = _biases(graph, tail, matrices, str(found.output.name))
        y = _route(made, x, which, matrices, biases)
        if tail is None:
            made.add("Unsqueeze", y, made.ints(axis))
            matcher.replace(found, made.nodes)
        else:
            add, _ = tail
            old = [*found.nodes, *_between(add, found.root)]
            matcher.substitute(add, old, made.nodes, add.outputs[0], y)


def _is_left(found: Match) -> bool:
    """Whether the gathered matrices are the left factor."""
    return matcher.see_through(found.root.inputs[0]) is found["stack_rows"]


def _between(node: ir.Node, root: ir.Node) -> list[ir.Node]:
    """`node` and the nodes from it back to `root`."""
    path = [node]
    for use in tuple(root.outputs[0].uses()):
        if use.node is not node:
            path.append(use.node)
    return path


def _bias_behind(found: Match, axis: int) -> tuple[ir.Node, ir.Value] | None:
    """The Add of biases gathered by the same index behind ``Squeeze(product)``, and their stack."""
    squeeze = _only_reader(found.output, "Squeeze")
    if squeeze is None or matcher.integers(squeeze.inputs[1]) not in ((axis,), (axis - 3,)):
        return None
    add = _only_reader(squeeze.outputs[0], "Add")
    if add is None:
        return None
    other = next((v for v in add.inputs if v is not squeeze.outputs[0]), None)
    for kind in ("GatherND", "Gather"):
        maker = matcher.producer(other, kind)
        if maker is None or not matcher.is_constant(maker.inputs[0]):
            continue
        stack, which = (matcher.see_through(v) for v in maker.inputs[:2])
        of_rows = not any(matcher.attribute(maker, n, 0) for n in ("axis", "batch_dims"))
        if of_rows and stack is not None and which is found["which"] and _one_each(found, stack):
            return add, stack
    return None


def _one_each(found: Match, biases: ir.Value) -> bool:
    """Whether `biases` are one row for each matrix of the stack, as wide as its result."""
    count, *sides = shape_of(found["stack"])
    width = sides[0 if _is_left(found) else 1]
    return shape_of(biases) == (count, width)


def _only_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    uses = tuple(value.uses())
    fits = len(uses) == 1 and not value.is_graph_output() and uses[0].node.op_type == op_type
    return uses[0].node if fits else None


def _biases(
    graph: ir.Graph, tail: tuple[ir.Node, ir.Value] | None, matrices: Sequence[ir.Value], name: str
) -> list[ir.Value]:
    width = shape_of(matrices[0])[1]
    if tail is None:
        return [zeros(graph, name, width, kind_of(matrices[0]))] * len(matrices)
    rows = slices(graph, tail[1])
    found = [bias_vector(graph, row, width) for row in rows]
    return [b for b in found if b is not None]


def _route(
    made: _Nodes, x: ir.Value, which: ir.Value, matrices: list[ir.Value], biases: list[ir.Value]
) -> ir.Value:
    """``y[n, out]``: row r of ``x[n, in]`` through the matrix ``which[r]``."""
    rows, results = [], []
    for i, (matrix, bias) in enumerate(zip(matrices, biases, strict=True)):
        hit = made.add("Equal", which, made.number(i, which))
        rows.append(made.add("Squeeze", made.add("NonZero", hit), made.ints(0)))
        part = made.add("Gather", x, rows[-1], axis=0)
        node = _inner(part, matrix, bias, made.found)
        made.nodes.append(node)
        results.append(node.outputs[0])
    place = made.add("Unsqueeze", made.add("Concat", *rows, axis=0), made.ints(1))
    count = made.add("Shape", which)
    shape = made.add("Concat", count, made.ints(shape_of(matrices[0])[1]), axis=0)
    zero = ir.tensor(np.zeros(1, kind_of(matrices[0]).numpy()))
    empty = made.add("ConstantOfShape", shape, value=zero)
    return made.add("ScatterND", empty, place, made.add("Concat", *results, axis=0))


class _Nodes:
    """New nodes in order, and their small constants."""

    def __init__(self, graph: ir.Graph, found: Match) -> None:
        self.graph, self.found = graph, found
        self.nodes: list[ir.Node] = []

    def add(self, op_type: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        """One node; its first output."""
        self.nodes.append(matcher.fresh(op_type, list(inputs), attributes))
        return self.nodes[-1].outputs[0]

    def ints(self, *numbers: int) -> ir.Value:
        """A constant vector."""
        return self._constant(np.asarray(numbers, np.int64))

    def number(self, number: int, like: ir.Value) -> ir.Value:
        """A constant scalar of the type of `like`."""
        kind = like.dtype
        return self._constant(np.asarray(number, kind.numpy() if kind is not None else np.int64))

    def _constant(self, array: np.ndarray) -> ir.Value:
        return matcher.add_array(self.graph, f"{self.found.output.name}:expert", array)
