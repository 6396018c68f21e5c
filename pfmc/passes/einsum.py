"""Writes Einsum as the Transpose, Unsqueeze, MatMul and Mul that it stands for."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from pfmc.ir import matcher
from pfmc.ir.shapes import Shapes

Named = tuple[ir.Value, str]
"""A value and the labels of its axes."""


def spell(node: ir.Node, known: Shapes) -> list[ir.Node] | str:
    """The nodes that compute ``Einsum(a, b, …)``, the last of them its output, or why not.

    Two operands at a time, from the left: labels of both that stay are batch axes, labels of both
    that go are one contraction (``MatMul``; none: ``Mul``), all else is broadcast.
    """
    terms = _terms(node, known)
    if terms is None:
        return "an equation with an ellipsis on operands of unknown rank, or that does not fit them"
    *operands, result = terms
    if not set(result) <= set("".join(operands)):
        return "a result with labels that no operand has"
    if any(len(set(t)) != len(t) for t in terms):
        return "a label twice in one operand (a diagonal)"
    if _stretches(node, operands, result, known):
        return "a label that is summed over and broadcast"
    assert node.graph is not None
    work = _Work(node.graph, f"{node.outputs[0].name}:einsum")
    values = [v for v in node.inputs if v is not None]
    current: Named = (values[0], operands[0])
    for i, value in enumerate(values[1:], start=1):
        later = set(result).union(*operands[i + 1 :])
        current = work.pair(current, (value, operands[i]), later)
    current = work.order(work.total(current, set(result)), result)
    if not work.nodes:
        work.add("Identity", [current[0]])
    return work.nodes


def _stretches(node: ir.Node, operands: list[str], result: str, known: Shapes) -> bool:
    """Whether a label that the result lacks is of length one in one operand, of more in another."""
    lengths: dict[str, set[bool]] = {}
    for labels, value in zip(operands, node.inputs, strict=True):
        for label, dim in zip(labels, known.shape(value) or (), strict=False):
            if label not in result:
                lengths.setdefault(label, set()).add(dim == 1)
    return any(len(found) > 1 for found in lengths.values())


def _terms(node: ir.Node, known: Shapes) -> list[str] | None:
    """The labels of every operand and of the result, the axes of an ellipsis named afresh."""
    given = matcher.attribute(node, "equation", "")
    equation = str(given.decode() if isinstance(given, bytes) else given).replace(" ", "")
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    if len(terms) != len(node.inputs):
        return None
    free = "".join(c for c in string.printable[:62] if c not in equation)
    widest = ""
    for i, (term, value) in enumerate(zip(terms, node.inputs, strict=True)):
        if "..." in term:
            dims = known.shape(value)
            count = -1 if dims is None else len(dims) - len(term) + 3
            if not 0 <= count < len(free):
                return None
            own = free[len(free) - count :]
            widest = max(widest, own, key=len)
            terms[i] = term.replace("...", own)
    if not arrow:
        counts = Counter(left.replace(".", "").replace(",", ""))
        result = "..." * ("..." in left) + "".join(sorted(c for c, n in counts.items() if n == 1))
    return [*terms, result.replace("...", widest)]


class _Work:
    def __init__(self, graph: ir.Graph, stem: str) -> None:
        self.graph, self.stem = graph, stem
        self.nodes: list[ir.Node] = []

    def add(self, op_type: str, inputs: Sequence[ir.Value], **options: object) -> ir.Value:
        """One node more; its output."""
        self.nodes.append(matcher.fresh(op_type, inputs, options))
        return self.nodes[-1].outputs[0]

    def _axes(self, axes: Sequence[int]) -> ir.Value:
        return matcher.add_array(self.graph, f"{self.stem}:axes", np.asarray(axes, np.int64))

    def order(self, operand: Named, labels: str) -> Named:
        """`operand` with its axes in the order `labels`."""
        value, own = operand
        if own == labels:
            return operand
        perm = tuple(own.index(c) for c in labels)
        return self.add("Transpose", [value], perm=perm), labels

    def total(self, operand: Named, kept: set[str]) -> Named:
        """`operand` summed over the axes that are not `kept`."""
        value, labels = operand
        gone = [i for i, c in enumerate(labels) if c not in kept]
        if not gone:
            return operand
        summed = self.add("ReduceSum", [value, self._axes(gone)], keepdims=0)
        return summed, "".join(c for c in labels if c in kept)

    def _spread(self, operand: Named, layout: Sequence[str]) -> ir.Value:
        """`operand` with its axes as in `layout`, where ``""`` is an axis of length one."""
        value, _ = self.order(operand, "".join(layout))
        ones = [i for i, c in enumerate(layout) if not c]
        return self.add("Unsqueeze", [value, self._axes(ones)]) if ones else value

    def pair(self, a: Named, b: Named, later: set[str]) -> Named:
        """The product of two operands; labels that nobody reads `later` are summed over."""
        a, b = self.total(a, later | set(b[1])), self.total(b, later | set(a[1]))
        both = [c for c in a[1] if c in b[1]]
        batch, inner = [c for c in both if c in later], [c for c in both if c not in later]
        own = [c for c in a[1] if c not in both]
        other = [c for c in b[1] if c not in both]
        if not inner:
            left = self._spread(a, [*batch, *own, *[""] * len(other)])
            right = self._spread(b, [*batch, *[""] * len(own), *other])
            return self.add("Mul", [left, right]), "".join(batch + own + other)
        outer, last = other[:-1], other[-1:]
        rows = own or [""]
        left = self._spread(a, [*batch, *[""] * len(outer), *rows, *inner])
        right = self._spread(b, [*batch, *outer, *[""] * (len(rows) - 1), *(last or [""]), *inner])
        if len(inner) > 1:
            left, right = (self._flat(v, n, len(inner)) for v, n in (
                (left, len(batch) + len(outer) + len(rows)),
                (right, len(batch) + len(outer) + len(rows)),
            ))  # fmt: skip
        rank = len(batch) + len(outer) + len(rows) + 1
        swap = (*range(rank - 2), rank - 1, rank - 2)
        product = self.add("MatMul", [left, self.add("Transpose", [right], perm=swap)])
        gone = ([] if own else [rank - 2]) + ([] if last else [rank - 1])
        if gone:
            product = self.add("Squeeze", [product, self._axes(gone)])
        return product, "".join(batch + outer + own + last)

    def _flat(self, value: ir.Value, kept: int, joined: int) -> ir.Value:
        """The last `joined` axes as one."""
        target = np.asarray([0] * kept + [-1], np.int64)
        return self.add(
            "Reshape", [value, matcher.add_array(self.graph, f"{self.stem}:to", target)]
        )
