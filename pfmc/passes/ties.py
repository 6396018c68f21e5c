"""Tied weights: an embedding table that is also the weight of a head, found by value."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pfmc.ir import matcher, provenance, vocabulary
from pfmc.passes.base import Context, Pass, PassResult
from pfmc.passes.weights import ORIGIN, TRANSPOSE_OF, kind_of, shape_of

KEY_TIED = "pfmc.tied"
"""On an embedding's Gather and on a fixed linear: the weight they share, the table's name."""

KEY_TURNED = "pfmc.tied_transposed"
"""On a tied fixed linear: ``"1"`` if its weight is the transpose of the table."""

_ROWS = 4096
_SAMPLE = 16


@dataclass(frozen=True)
class Ties(Pass):
    """Marks embeddings and fixed linears of equal weights, so that hardware holds them once.

    Exporters store a tied pair twice, so values are compared: shapes, then a sample of rows, then
    all of it, a block of rows at a time. The graph itself stays as it is.
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
    if kind_of(table) != kind_of(weight) or _array(table).dtype != _array(weight).dtype:
        return None
    for turned, shape in ((True, (columns, rows)), (False, (rows, columns))):
        if shape_of(weight) == shape and known.of(table, False) == known.of(weight, turned):
            return turned if _equal(table, weight, turned) else None
    return None


class _Samples:
    """Digests of a sample of rows (or of columns), each read once."""

    def __init__(self) -> None:
        self._known: dict[tuple[ir.Value, bool], bytes] = {}

    def of(self, value: ir.Value, turned: bool) -> bytes:
        """The digest of a sample of rows of the matrix, or of its transpose."""
        key = (value, turned)
        if key not in self._known:
            array = _array(value).T if turned else _array(value)
            places = np.linspace(0, len(array) - 1, min(_SAMPLE, len(array))).astype(int)
            rows = np.ascontiguousarray(array[places])
            self._known[key] = hashlib.sha256(rows.tobytes()).digest()
        return self._known[key]


def _equal(table: ir.Value, weight: ir.Value, turned: bool) -> bool:
    left, right = _array(table), _array(weight)
    right = right.T if turned else right
    return all(
        np.array_equal(left[at : at + _ROWS], right[at : at + _ROWS])
        for at in range(0, len(left), _ROWS)
    )


def _array(value: ir.Value) -> npt.NDArray[Any]:
    """The numbers as they are stored, so that a lazily widened matrix is not made for a look."""
    stored: ir.TensorProtocol | None = value.meta.get(ORIGIN, value.const_value)
    assert stored is not None
    return stored.numpy()
