"""Tied weights: an embedding table that is also the weight of a head, found by value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from pfmc.ir import matcher, provenance, stored, vocabulary
from pfmc.passes.base import Context, Pass, PassResult
from pfmc.passes.weights import TRANSPOSE_OF, kind_of, shape_of

KEY_TIED = "pfmc.tied"
"""On an embedding's Gather and on a fixed linear: the weight they share, the table's name."""

KEY_TURNED = "pfmc.tied_transposed"
"""On a tied fixed linear: ``"1"`` if its weight is the transpose of the table."""

_ROWS, _COLUMNS = 4096, 256


@dataclass(frozen=True)
class Ties(Pass):
    """Marks embeddings and fixed linears of equal weights, so that hardware holds them once.

    Exporters store a tied pair twice, so values are compared as they are stored: shapes, then a
    few numbers, then all of them, a tile at a time. The graph itself stays as it is.
    """

    name: ClassVar[str] = "ties"

    def apply(self, model: ir.Model, context: Context) -> PassResult:
        """Compares every table with every fixed linear of fitting shape."""
        tables = [n for n in model.graph if _is_embedding(n)]
        linears = vocabulary.fixed_linears(model)
        known = _Samples()
        changed = sum(_mark(table, linear, known) for table in tables for linear in linears)
        return PassResult(model, changed, (), {"tied": changed})


def _is_embedding(node: ir.Node) -> bool:
    if not vocabulary.is_op(node, "Gather") or matcher.attribute(node, "axis", 0) != 0:
        return False
    table = node.inputs[0]
    return table is not None and matcher.is_constant(table) and len(shape_of(table)) == 2


def _mark(embedding: ir.Node, linear: ir.Node, known: _Samples) -> bool:
    table, weight = embedding.inputs[0], linear.inputs[1]
    assert table is not None
    assert weight is not None
    turned = _relation(table, weight, known)
    if turned is None:
        return False
    tag = (provenance.weight(table) or str(table.name)).split(" ")[0]
    for node in (embedding, linear):
        node.metadata_props[KEY_TIED] = tag
    linear.metadata_props[KEY_TURNED] = str(int(turned))
    return True


def _relation(table: ir.Value, weight: ir.Value, known: _Samples) -> bool | None:
    """True if the weight is the table's transpose, False if it is the table, None if neither."""
    if weight.const_value is table.const_value:
        return False
    if weight.meta.get(TRANSPOSE_OF) is table.const_value:
        return True
    rows, columns = shape_of(table)
    for turned, shape in ((True, (columns, rows)), (False, (rows, columns))):
        if shape_of(weight) == shape and kind_of(table) == kind_of(weight):
            alike = known.of(table, False) == known.of(weight, turned)
            if alike and _equal(table, weight, turned):
                return turned
    return None


class _Samples:
    """A few numbers of each matrix, each read once."""

    def __init__(self) -> None:
        self._known: dict[tuple[ir.Value, bool], tuple[str, bytes]] = {}

    def of(self, value: ir.Value, turned: bool) -> tuple[str, bytes]:
        """The type and some numbers of the matrix, or of its transpose."""
        key = (value, turned)
        if key not in self._known:
            array = stored.numbers(value)
            self._known[key] = stored.sample(array.T if turned else array)
        return self._known[key]


def _equal(table: ir.Value, weight: ir.Value, turned: bool) -> bool:
    """Whether every number is equal; of mapped files one tile at a time is in memory."""
    left, right = stored.numbers(table), stored.numbers(weight)
    right = right.T if turned else right
    rows, columns = left.shape
    for row in range(0, rows, _ROWS):
        for column in range(0, columns, _COLUMNS):
            here = slice(row, row + _ROWS), slice(column, column + _COLUMNS)
            if not np.array_equal(left[here], right[here]):
                return False
            stored.release(left[here])
            stored.release(right[here])
    return True
