"""Makes smaller models of a model: some of its nodes, smaller sizes, fewer weights, less text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from pfmc.errors import PfmcError

Constant = Callable[[str], npt.NDArray[Any] | None]
Types = Mapping[str, onnx.TypeProto]
Read = Callable[[onnx.TensorProto], npt.NDArray[Any]]

KEPT_WEIGHTS = 64
"""Floating-point weights of up to so many elements stay in a model without weights."""
_FILLED = 1 << 24  # elements that are written as zeros, at most
_SMALL = 64  # integers of a constant that may be sizes


def no_constant(_: str) -> None:
    """Every cut value becomes a graph input."""


def subset(
    model: onnx.ModelProto, keep: Sequence[int], types: Types, constant: Constant = no_constant
) -> onnx.ModelProto | None:
    """The model of the nodes `keep` alone.

    What they need and nothing kept makes becomes a graph input, or the constant that `constant`
    gives for it; what nobody takes any more becomes a graph output.

    Args:
        model: a model without sparse initialisers.
        keep: indices of nodes, in order.
        types: value name -> type.
        constant: value name -> array, or None for a graph input.

    Returns:
        None if nothing is left, or if the type of a cut value is unknown.
    """
    nodes = [model.graph.node[i] for i in keep]
    made = {o for n in nodes for o in n.output if o}
    used = dict.fromkeys(name for n in nodes for name in _taken(n))
    results = [o for o in model.graph.output if o.name in made]
    loose = _loose(nodes, {*used, *(o.name for o in results)}, types)
    if not nodes or loose is None or not (results or loose):
        return None
    cut = _without_graph(model)
    cut.graph.node.extend(nodes)
    cut.graph.output.extend([*results, *(_value(n, types[n]) for n in loose)])
    needed = [n for n in used if n not in made]
    return cut if _define(cut.graph, model.graph, needed, types, constant) else None


def _taken(node: onnx.NodeProto) -> Iterator[str]:
    """Values that a node takes, also from outside into its subgraphs."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for graph in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
            inside = {v.name for v in graph.input} | {t.name for t in graph.initializer}
            inside |= {o for n in graph.node for o in n.output}
            asked = [name for n in graph.node for name in _taken(n)]
            yield from (n for n in (*asked, *(o.name for o in graph.output)) if n not in inside)


def _loose(nodes: list[onnx.NodeProto], taken: set[str], types: Types) -> list[str] | None:
    """One output of each node none of whose outputs is taken; None if its type is unknown."""
    loose = []
    for node in nodes:
        if not any(o in taken for o in node.output):
            known = [o for o in node.output if o in types]
            if not known:
                return None
            loose.append(known[0])
    return loose


def _without_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    bare = onnx.ModelProto(ir_version=model.ir_version, producer_name=model.producer_name)
    bare.opset_import.extend(model.opset_import)
    bare.functions.extend(model.functions)
    bare.graph.name = model.graph.name or "graph"
    foreign = {o for n in model.graph.node if n.domain for o in n.output}
    bare.graph.value_info.extend(v for v in model.graph.value_info if v.name in foreign)
    return bare


def _define(
    graph: onnx.GraphProto, old: onnx.GraphProto, needed: list[str], types: Types,
    constant: Constant,
) -> bool:  # fmt: skip
    """Gives `graph` the inputs and initialisers `needed`; False if a type is unknown."""
    inputs = {v.name: v for v in old.input}
    weights = {t.name: t for t in old.initializer}
    for name in needed:
        array = None if name in weights or name in inputs else constant(name)
        if name in weights:
            graph.initializer.append(weights[name])
        if name in inputs:
            graph.input.append(inputs[name])
        elif array is not None:
            graph.initializer.append(numpy_helper.from_array(array, name))
        elif name in types and name not in weights:
            graph.input.append(_value(name, types[name]))
        elif name not in weights:
            return False
    return True


def _value(name: str, kind: onnx.TypeProto) -> onnx.ValueInfoProto:
    value = onnx.ValueInfoProto(name=name)
    value.type.CopyFrom(kind)
    return value


def ancestors(model: onnx.ModelProto, index: int) -> list[int]:
    """The node `index` and all that it needs."""
    nodes = model.graph.node
    makers = {o: i for i, n in enumerate(nodes) for o in n.output if o}
    found, waiting = {index}, [index]
    while waiting:
        before = {makers[n] for n in _taken(nodes[waiting.pop()]) if n in makers} - found
        found |= before
        waiting.extend(before)
    return sorted(found)


def bypasses(
    model: onnx.ModelProto, index: int, types: Types
) -> Iterator[onnx.ModelProto]:
    """The models in which node `index` is replaced by one of its inputs of equal type."""
    node = model.graph.node[index]
    if len(node.output) != 1 or node.output[0] not in types:
        return
    output = node.output[0]
    for name in dict.fromkeys(node.input):
        if name in types and _alike(types[name], types[output]):
            bare = onnx.ModelProto()
            bare.CopyFrom(model)
            del bare.graph.node[index]
            for other in bare.graph.node:
                other.input[:] = [name if i == output else i for i in other.input]
            keep = range(len(bare.graph.node))
            cut = subset(bare, keep, types)
            if cut is not None:
                yield cut


def _alike(one: onnx.TypeProto, other: onnx.TypeProto) -> bool:
    a, b = one.tensor_type, other.tensor_type
    return a.elem_type == b.elem_type and (
        not (a.HasField("shape") and b.HasField("shape"))
        or len(a.shape.dim) == len(b.shape.dim)
    )


def fewer_outputs(model: onnx.ModelProto) -> Iterator[onnx.ModelProto]:
    """The models with one graph output less."""
    for index in reversed(range(len(model.graph.output))):
        if len(model.graph.output) > 1:
            bare = onnx.ModelProto()
            bare.CopyFrom(model)
            del bare.graph.output[index]
            yield bare


# -- weights and sizes -----------------------------------------------------------------------------


def weights(model: onnx.ModelProto) -> list[str]:
    """Floating-point and narrow initialisers that are large enough to be in the way."""
    return [t.name for t in model.graph.initializer if _is_weight(t)]


def _is_weight(tensor: onnx.TensorProto) -> bool:
    shape_like = tensor.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
    return not shape_like and int(np.prod(tensor.dims, dtype=object)) > KEPT_WEIGHTS


def as_inputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """The model with the initialisers `names` as graph inputs, without data."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    held = [t for t in model.graph.initializer if t.name not in names]
    del bare.graph.initializer[:]
    bare.graph.initializer.extend(held)
    declared = {v.name for v in model.graph.input}
    for tensor in model.graph.initializer:
        if tensor.name in names and tensor.name not in declared:
            bare.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    return bare


def sizes(model: onnx.ModelProto) -> list[int]:
    """The sizes above one of weights and inputs, largest first."""
    found = {int(d) for t in model.graph.initializer for d in t.dims}
    for value in model.graph.input:
        found |= {d.dim_value for d in value.type.tensor_type.shape.dim}
    return sorted((n for n in found if n > 1), reverse=True)


def resized(
    model: onnx.ModelProto, size: int, smaller: int, read: Read = numpy_helper.to_array
) -> onnx.ModelProto:
    """The model with `smaller` in place of `size`: in weights, inputs, outputs and constants.

    `read` gives the array of a tensor; what was outside the file is inside once it is cut.
    """
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    for tensor in bare.graph.initializer:
        _resize(tensor, size, smaller, read)
    for node in bare.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.HasField("t"):
                _resize(attribute.t, size, smaller, read)
    for value in (*bare.graph.input, *bare.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_value") and dim.dim_value == size:
                dim.dim_value = smaller
    return bare


def _resize(tensor: onnx.TensorProto, size: int, smaller: int, read: Read) -> None:
    shape_like = tensor.data_type == onnx.TensorProto.INT64 and len(tensor.dims) <= 1
    if size not in tensor.dims and not shape_like:
        return
    try:
        array = read(tensor)
    except (PfmcError, ValueError, TypeError):
        return  # data that cannot be had stays as it is
    if shape_like and array.size <= _SMALL:
        array = np.where(array == size, smaller, array).astype(array.dtype)
    else:
        array = array[tuple(slice(smaller if d == size else d) for d in array.shape)]
    name = tensor.name
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array.reshape(array.shape)), name))


def emptied(
    model: onnx.ModelProto, name: str, read: Read = numpy_helper.to_array
) -> onnx.ModelProto | None:
    """The model with zeros in initialiser `name`; None if it is all zeros, or too large."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    tensor = next(t for t in bare.graph.initializer if t.name == name)
    if int(np.prod(tensor.dims, dtype=object)) > _FILLED:
        return None
    try:
        array = read(tensor)
    except (PfmcError, ValueError, TypeError):
        return None
    if not array.astype(bool).any():
        return None
    tensor.CopyFrom(numpy_helper.from_array(np.zeros_like(array), name))
    return bare


def attributes(model: onnx.ModelProto) -> list[tuple[int, int]]:
    """Where attributes stand: index of the node, index of the attribute, the last first."""
    nodes = model.graph.node
    return [(i, k) for i, n in enumerate(nodes) for k in reversed(range(len(n.attribute)))]


def without_attribute(model: onnx.ModelProto, place: tuple[int, int]) -> onnx.ModelProto:
    """The model with one attribute of a node less."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.node[place[0]].attribute[place[1]]
    return bare


def cleaned(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without texts, notes and functions that nothing needs."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    bare.ClearField("doc_string")
    bare.graph.ClearField("doc_string")
    del bare.metadata_props[:], bare.graph.metadata_props[:], bare.graph.quantization_annotation[:]
    for body in (bare.graph, *bare.functions):
        for node in body.node:
            node.ClearField("doc_string")
            del node.metadata_props[:]
    _drop_functions(bare)
    _drop_opsets(bare)
    return bare


def _drop_functions(model: onnx.ModelProto) -> None:
    known = {(f.domain, f.name): f for f in model.functions}
    waiting = [(n.domain, n.op_type) for n in model.graph.node]
    wanted: set[tuple[str, str]] = set()
    while waiting:
        key = waiting.pop()
        if key in known and key not in wanted:
            wanted.add(key)
            waiting.extend((n.domain, n.op_type) for n in known[key].node)
    kept = [f for f in model.functions if (f.domain, f.name) in wanted]
    del model.functions[:]
    model.functions.extend(kept)


def _drop_opsets(model: onnx.ModelProto) -> None:
    used = {n.domain for body in (model.graph, *model.functions) for n in body.node} | {""}
    kept = [o for o in model.opset_import if o.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
