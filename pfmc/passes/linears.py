"""Fixed linears: every product with a constant matrix becomes ``pfmc::FixedLinear``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from pfmc.ir import check, matcher, provenance, vocabulary
from pfmc.ir.matcher import Constant, Match, Op, Var
from pfmc.passes import patches, unfold
from pfmc.passes.base import Context, Declined, Pass, PassResult
from pfmc.passes.experts import GatheredExperts, StackedProduct, StackOnTheLeft
from pfmc.passes.rules import Rule, apply_rules, where
from pfmc.passes.weights import (
    KEY_PERM,
    SLICE,
    bias_vector,
    derived,
    kind_of,
    linear,
    shape_of,
    transposed,
    zeros,
)


def _bias_reader(value: ir.Value, length: int, rank: int | None) -> tuple[ir.Node, ir.Value] | None:
    """The one Add that reads `value`, and its constant, if that is a bias of `length`."""
    uses = tuple(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    node = uses[0].node
    if not vocabulary.is_op(node, "Add"):
        return None
    other = matcher.see_through(node.inputs[1 - uses[0].idx])
    if other is None or not matcher.is_constant(other):
        return None
    shape = shape_of(other)
    if not shape or shape[-1] != length or any(n != 1 for n in shape[:-1]):
        return None
    return (node, other) if len(shape) <= (rank or 1) else None


def _finish(
    graph: ir.Graph, found: Match, x: ir.Value, weight: ir.Value, bias: ir.Value | None
) -> None:
    """Replaces the match by a fixed linear, together with the bias that is added behind it."""
    length = shape_of(weight)[1]
    at, output, old = found.root, found.output, list(found.nodes)
    rank = matcher.rank(x) or matcher.rank(output)
    if bias is None and (added := _bias_reader(output, length, rank)) is not None:
        at, output = added[0], added[0].outputs[0]
        old.append(at)
        bias = bias_vector(graph, added[1], length)
    if bias is None:
        bias = zeros(graph, str(output.name), length, kind_of(weight))
    node = linear(x, weight, bias, output, found.root)
    if SLICE in weight.meta:  # an expert: which rows reach it is decided at run time
        node.metadata_props.pop(vocabulary.KEY_VALUE, None)
    matcher.substitute(at, old, [node], output)


class MatMulRight(Rule):
    """Product with a constant matrix on the right, and the bias behind it.

    ``MatMul(x, W) [+ b]`` -> ``FixedLinear(x, W, b or 0)``
    """

    patterns = (Op("MatMul", (Var("x"), Constant("weight"))),)

    def check(self, found: Match) -> str:
        """Checks that W is a matrix and x is not constant too."""
        return _check(found)

    def rewrite(self, graph: ir.Graph, found: Match) -> None:
        """Puts a fixed linear in place."""
        _finish(graph, found, found["x"], found["weight"], None)


class MatMulLeft(Rule):
    """Product with a constant matrix on the left.

    ``MatMul(W, x[..., in, n])`` -> ``Transpose(FixedLinear(Transpose(x), Wᵀ, 0))``

    ``pfmc.value`` then names the transpose of the linear's output (``pfmc.perm``).
    """

    patterns = (Op("MatMul", (Constant("weight"), Var("x"))),)

    def check(self, found: Match) -> str:
        """Checks that W is a matrix and the rank of x known and at least two."""
        rank = matcher.rank(found["x"])
        if rank is None or rank < 2:
            return "constant left factor of a product whose right factor has no known rank"
        return _check(found)

    def rewrite(self, graph: ir.Graph, found: Match) -> None:
        """Puts transposes around a fixed linear."""
        rank = matcher.rank(found["x"])
        assert rank is not None
        perm = (*range(rank - 2), rank - 1, rank - 2)
        turned = matcher.fresh("Transpose", [found["x"]], {"perm": perm})
        weight = transposed(graph, found["weight"])
        nothing = zeros(graph, str(found.output.name), shape_of(weight)[1], kind_of(weight))
        node = linear(turned.outputs[0], weight, nothing, found.output, found.root)
        node.metadata_props[KEY_PERM] = " ".join(map(str, perm))
        back = matcher.fresh("Transpose", [node.outputs[0]], {"perm": perm})
        matcher.replace(found, [turned, node, back])


def _check(found: Match) -> str:
    if not kind_of(found["weight"]).is_floating_point():
        return "a product of integers"
    if matcher.is_constant(found["x"]):
        return "both factors are constant"
    if len(shape_of(found["weight"])) != 2:
        return f"constant factor of rank {len(shape_of(found['weight']))}, not a matrix"
    if 0 in shape_of(found["weight"]):
        return "a constant matrix without elements"
    return ""


class OuterProduct(Rule):
    """Product with a constant over a dimension of one, such as a table of angles.

    ``MatMul(W[..., n, 1], x[..., 1, m])`` or ``MatMul(x[..., n, 1], W[..., 1, m])`` -> ``Mul``
    """

    patterns = (
        Op("MatMul", (Constant("weight"), Var("x"))),
        Op("MatMul", (Var("x"), Constant("weight"))),
    )

    def check(self, found: Match) -> str:
        """Checks that one number is summed and that both factors keep their axes."""
        left = matcher.see_through(found.root.inputs[0]) is found["weight"]
        shape, rank = shape_of(found["weight"]), matcher.rank(found["x"])
        if rank is None or min(rank, len(shape)) < 2 or shape[-1 if left else -2] != 1:
            return "no outer product"
        return ""

    def rewrite(self, graph: ir.Graph, found: Match) -> None:
        """Multiplies by broadcasting."""
        matcher.replace(found, [matcher.fresh("Mul", list(found.root.inputs))])


class Gemm(Rule):
    """General matrix product with a constant second factor.

    ``alpha * A' @ B' + beta * C`` -> ``FixedLinear(A', alpha B', beta C)``

    transA becomes a Transpose; transB, alpha and beta are folded lazily. A C that is not a
    constant row stays a separate Add.
    """

    patterns = (Op("Gemm", (Var("x"), Constant("weight")), more=True),)

    def check(self, found: Match) -> str:
        """Checks that the first factor is not constant too, and that the second has elements."""
        return _check(found)

    def rewrite(self, graph: ir.Graph, found: Match) -> None:
        """Puts a fixed linear in place."""
        node = found.root
        weight = _scaled(graph, found["weight"], matcher.attribute(node, "alpha", 1.0))
        if matcher.attribute(node, "transB", 0):
            weight = transposed(graph, weight)
        x, before = found["x"], []
        if matcher.attribute(node, "transA", 0):
            before = [matcher.fresh("Transpose", [x], {"perm": (1, 0)})]
            x = before[0].outputs[0]
        bias = _gemm_bias(graph, node, shape_of(weight)[1])
        if bias is not None or len(node.inputs) < 3 or node.inputs[2] is None:
            if before:
                matcher.inherit(before[0], [node], node)
                before[0].outputs[0].name = matcher.unique_name(graph, f"{x.name}:Transpose")
                graph.insert_before(node, before)
            _finish(graph, found, x, weight, bias)
            return
        self._keep_addend(graph, found, x, weight, before)

    def _keep_addend(
        self, graph: ir.Graph, found: Match, x: ir.Value, weight: ir.Value, before: list[ir.Node]
    ) -> None:
        addend, beta = found.root.inputs[2], matcher.attribute(found.root, "beta", 1.0)
        nothing = zeros(graph, str(found.output.name), shape_of(weight)[1], kind_of(weight))
        node = linear(x, weight, nothing, found.output, found.root)
        node.metadata_props.pop(vocabulary.KEY_VALUE, None)
        scaled: list[ir.Node] = []
        if beta != 1.0:
            factor = np.asarray(beta, kind_of(weight).numpy())
            constant = matcher.add_array(graph, f"{found.output.name}:beta", factor)
            scaled = [matcher.fresh("Mul", [addend, constant])]
            addend = scaled[0].outputs[0]
        add = matcher.fresh("Add", [node.outputs[0], addend])
        matcher.replace(found, [*before, node, *scaled, add])


def _scaled(graph: ir.Graph, value: ir.Value, factor: float) -> ir.Value:
    if factor == 1.0:
        return value
    return derived(graph, value, shape_of(value), lambda a: (a * factor).astype(a.dtype))


def _gemm_bias(graph: ir.Graph, node: ir.Node, length: int) -> ir.Value | None:
    """The constant row that a Gemm adds; None if there is none or it is something else."""
    addend = matcher.see_through(node.inputs[2]) if len(node.inputs) > 2 else None
    if addend is None or not matcher.is_constant(addend):
        return None
    row = bias_vector(graph, addend, length)
    return None if row is None else _scaled(graph, row, matcher.attribute(node, "beta", 1.0))


@dataclass(frozen=True)
class Linears(Pass):
    """Turns products with constants into fixed linears and names them by module scope."""

    name: ClassVar[str] = "linears"

    def apply(self, model: ir.Model, context: Context) -> PassResult:
        """Applies the rules of this file and of `patches`, then names every fixed linear."""
        graph = model.graph
        outer, _, products = apply_rules(graph, (OuterProduct(),), self.name)
        of_stacks = (StackOnTheLeft(), StackedProduct(), GatheredExperts())
        stacks, _, stacked = apply_rules(graph, of_stacks, self.name)
        rules = (MatMulRight(), MatMulLeft(), Gemm())
        changed, declined, counts = apply_rules(graph, rules, self.name)
        convolutions = (patches.PatchEmbedding(), patches.Patches(), unfold.Unfolded())
        windows, _, unfolded = apply_rules(graph, convolutions, self.name)
        name_layers(graph)
        vocabulary.install(model)
        left = _left_over(graph, self.name)
        reasons = tuple(dict.fromkeys((*declined, *left)))
        total = outer + stacks + changed + windows
        return PassResult(model, total, reasons, {**products, **stacked, **counts, **unfolded})


def _left_over(graph: ir.Graph, pass_name: str) -> tuple[Declined, ...]:
    """Convolutions that are no linears, and products with weights gathered at run time."""
    found: list[Declined] = []
    for node in graph:
        if vocabulary.is_op(node, "Conv"):
            found.append(Declined(pass_name, where(node), unfold.reason(node)))
        elif vocabulary.is_op(node, "MatMul") and any(map(check.gathered_weights, node.inputs)):
            reason = "weights gathered at run time: export with one product for each expert"
            found.append(Declined(pass_name, where(node), reason))
    return tuple(found)


def name_layers(graph: ir.Graph) -> None:
    """Names every fixed linear by its module scope, else its weight, made unique with ``.1`` …"""
    taken: set[str] = set()
    for node in graph:
        if not vocabulary.is_op(node, vocabulary.FIXED_LINEAR, vocabulary.DOMAIN):
            continue
        stem = layer_name(node)
        name, number = stem, 0
        while name in taken:
            number += 1
            name = f"{stem}.{number}"
        taken.add(name)
        node.name = name


def layer_name(node: ir.Node) -> str:
    """The module that owns the weight of a fixed linear: scope, else weight name, else value."""
    weight = node.inputs[1]
    assert weight is not None
    owner, _, part = provenance.weight(weight).split(" ")[0].rpartition(".")
    if owner and SLICE in weight.meta:
        return f"{owner}.{weight.meta[SLICE]}.{part}"
    scope = provenance.scope(node)
    name = str(weight.name).partition(":")[0]
    own = "" if provenance.invented(name) else name.rpartition(".")[0]
    if scope and owner.endswith(scope):
        return owner
    return scope or owner or own or str(node.outputs[0].name)
