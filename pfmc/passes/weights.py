"""Constants made of constants without copying them, and the node of a fixed linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pfmc.ir import matcher, provenance, stored, vocabulary

Array = npt.NDArray[Any]

KEY_PERM = "pfmc.perm"
"""On a fixed linear: the source value equals the linear's output transposed by this."""

TRANSPOSE_OF = "pfmc.transpose_of"
"""In the ``meta`` of a lazy transpose: the tensor that it is the transpose of."""


_VIEW = "pfmc.view"
SLICE = "pfmc.slice"
"""In the ``meta`` of a lazy constant: which slice of a stack of weights it is, an expert's say."""


def derived(
    graph: ir.Graph, source: ir.Value, shape: tuple[int, ...], of: Callable[[Array], Array]
) -> ir.Value:
    """A lazy constant of `shape`, made of `source` by `of` at every reading; nothing is copied now.

    It keeps the weight name of `source`; its own name is that of `source` with ``:lazy``. What is
    derived of something derived reads the first source and copies once, at the end: a slice of a
    stack of weights reads no more than the slice.
    """
    assert source.const_value is not None
    tensor, chain = source.meta.get(_VIEW, (source.const_value, ()))
    chain = (*chain, of)
    kind, name = source.const_value.dtype, matcher.unique_name(graph, f"{source.name}:lazy")

    def read() -> ir.TensorProtocol:
        array = tensor.numpy()
        for step in chain:
            array = step(array)
        return ir.Tensor(np.ascontiguousarray(array), dtype=kind, name=name)

    lazy = ir.LazyTensor(read, kind, ir.Shape(shape), name=name)
    value = matcher.add_initialiser(graph, name, lazy, source.metadata_props)
    value.meta[_VIEW] = (tensor, chain)
    base = stored.source(source)
    stored.remember(value, lambda: of(base()))
    if SLICE in source.meta:
        value.meta[SLICE] = source.meta[SLICE]
    return value


def slices(graph: ir.Graph, source: ir.Value) -> list[ir.Value]:
    """The matrices ``[rows, columns]`` of a constant stack ``[n, rows, columns]``, lazily."""
    count, *rest = shape_of(source)
    made = [derived(graph, source, tuple(rest), lambda a, i=i: a[i]) for i in range(count)]  # type: ignore[misc]
    for i, value in enumerate(made):
        value.meta[SLICE] = i
    return made


def transposed(graph: ir.Graph, source: ir.Value) -> ir.Value:
    """The lazy transpose of a constant matrix."""
    rows, columns = shape_of(source)
    value = derived(graph, source, (columns, rows), lambda a: a.T)
    value.meta[TRANSPOSE_OF] = source.const_value
    return value


def zeros(graph: ir.Graph, name: str, length: int, kind: ir.DataType) -> ir.Value:
    """A bias of nothing."""
    return matcher.add_array(graph, f"{name}:zeros", np.zeros(length, kind.numpy()))


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """The shape of a constant."""
    assert value.const_value is not None
    return tuple(value.const_value.shape.numpy())


def kind_of(value: ir.Value) -> ir.DataType:
    """The element type of a constant."""
    assert value.const_value is not None
    return value.const_value.dtype


def bias_vector(graph: ir.Graph, value: ir.Value, length: int) -> ir.Value | None:
    """`value` as a constant ``[length]`` if that is what it broadcasts to along the last axis."""
    shape = shape_of(value)
    if shape == (length,):
        return value
    if any(n != 1 for n in shape[:-1]) or (shape and shape[-1] not in (1, length)):
        return None
    return derived(graph, value, (length,), lambda a: np.broadcast_to(a.reshape(-1), (length,)))


def linear(x: ir.Value, weight: ir.Value, bias: ir.Value, source: ir.Value, at: ir.Node) -> ir.Node:
    """A fixed linear whose output equals the value called `source` in the source file."""
    node = matcher.fresh(vocabulary.FIXED_LINEAR, [x, weight, bias], domain=vocabulary.DOMAIN)
    if not str(source.name).startswith(vocabulary.SYNTHETIC):
        node.metadata_props[vocabulary.KEY_VALUE] = str(source.name)
    if scope := provenance.scope(at):
        node.metadata_props[vocabulary.KEY_SCOPE] = scope
    return node
