"""Brings a graph to one plain form: without functions, Constants, Identities, dead nodes."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, RemoveUnusedNodesPass, ShapeInferencePass

from pfmc.errors import InputError
from pfmc.ingest import shapes
from pfmc.ingest.limits import bounded
from pfmc.ir.vocabulary import is_op

_NUMBERS = {
    "value_int": np.int64,
    "value_ints": np.int64,
    "value_float": np.float32,
    "value_floats": np.float32,
}


def inline_functions(model: ir.Model) -> None:
    """Replaces every call of a local function by its body; the guard has bounded the growth."""
    if not model.functions:
        return
    for function in model.functions.values():
        function.opset_imports.clear()
        function.opset_imports.update(model.graph.opset_imports)
        _part_outputs(function)
    for body in (model.graph, *model.functions.values()):
        for node in body:
            called = model.functions.get(node.op_identifier())
            if called is not None and len(node.outputs) < len(called.outputs):
                node.resize_outputs(len(called.outputs))  # a call may leave the last ones out
    try:
        InlinePass()(model)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"A function cannot be put in the place of its calls: {error}", where="the functions",
            mend="see whether a call leaves out an input that its function hands on",
        ) from error  # fmt: skip
    model.functions.clear()


def _part_outputs(body: ir.Function) -> None:
    """Outputs of a function that are its inputs, or one value twice, get values of their own.

    Inlined as they are, they would rename what the call was given.
    """
    seen = set(body.inputs)
    taken = {v.name for v in (*body.inputs, *(o for n in body for o in n.outputs))}
    for index, value in enumerate(body.outputs):
        if value in seen:
            copy = ir.node("Identity", [value])
            stem = f"{value.name}_output_{index}"
            names = itertools.chain([stem], (f"{stem}_{i}" for i in itertools.count(1)))
            name = next(n for n in names if n not in taken)
            taken.add(name)
            copy.outputs[0].name = name
            body.append(copy)
            body.outputs[index] = copy.outputs[0]
        seen.add(value)


def plain_inputs(graph: ir.Graph) -> None:
    """Graph inputs that have a default value (IR 3 style) become plain initialisers."""
    kept = [v for v in graph.inputs if v.name not in graph.initializers]
    if len(kept) != len(graph.inputs):
        graph.inputs.clear()
        graph.inputs.extend(kept)


def name_everything(graph: ir.Graph) -> None:
    """Gives a unique, non-empty name to each node and each value that lacks one."""
    taken = {v.name for v in all_values(graph) if v.name}
    fresh = (f"value_{i}" for i in itertools.count())
    for value in all_values(graph):
        if not value.name and (value.uses() or value.is_graph_output()):
            value.name = next(n for n in fresh if n not in taken)
    seen: set[str] = set()
    for index, node in enumerate(graph):
        name = node.name or f"{node.op_type}_{index}"
        while name in seen:
            name = f"{name}_{index}"
        node.name = name
        seen.add(name)


def all_values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Inputs, initialisers and node outputs of `graph`."""
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def lift_constants(graph: ir.Graph) -> None:
    """Every ``Constant`` node becomes an initialiser of the same name."""
    taken = {v.name for v in all_values(graph)}
    constants = [n for n in graph if is_op(n, "Constant")]
    outputs: dict[ir.Value, ir.Value] = {}
    for node in constants:
        old = node.outputs[0]
        tensor = _constant(node)
        fresh = ir.Value(
            name=old.name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
            metadata_props=dict(old.metadata_props),
        )
        if old.is_graph_output():
            outputs[old] = _keep_output(graph, node, fresh, taken)
            continue
        ir.convenience.replace_all_uses_with(old, fresh)
        if fresh.name:  # a call may leave an output of its function out
            graph.initializers.add(fresh)
    if outputs:  # all at once: each look at the graph's outputs walks through them
        kept = [outputs.get(v, v) for v in graph.outputs]
        graph.outputs.clear()
        graph.outputs.extend(kept)
    for old, new in outputs.items():
        ir.convenience.replace_all_uses_with(old, new)
    graph.remove(constants, safe=True)
    for old, new in outputs.items():
        new.name = old.name


def _keep_output(
    graph: ir.Graph, node: ir.Node, fresh: ir.Value, taken: set[str | None]
) -> ir.Value:
    """What takes the place of a constant output: an Identity of an initialiser of another name."""
    old = node.outputs[0]
    names = (f"{old.name}_constant{n or ''}" for n in itertools.count())
    fresh.name = next(n for n in names if n not in taken)
    taken.add(fresh.name)
    identity = ir.node("Identity", [fresh], name=node.name, metadata_props=node.metadata_props)
    graph.insert_before(node, identity)
    graph.initializers.add(fresh)
    return identity.outputs[0]


def _constant(node: ir.Node) -> ir.TensorProtocol:
    name, attribute = next(iter(node.attributes.items()), ("nothing", None))
    if attribute is not None and name == "value":
        return attribute.as_tensor()
    if attribute is None or name not in _NUMBERS:
        raise InputError(
            f"A Constant holds {name!r}, which no target can use",
            where=f"node {node.name!r}",
            mend="export the model without strings and sparse constants",
        )
    return ir.tensor(np.array(attribute.value, dtype=_NUMBERS[name]), name=node.outputs[0].name)


def drop_identities(graph: ir.Graph) -> None:
    """Removes ``Identity`` nodes (and inference-time ``Dropout``, already turned into them)."""
    for node in [n for n in graph if is_op(n, "Identity")]:
        source, alias = node.inputs[0], node.outputs[0]
        assert source is not None
        if alias.is_graph_output():
            if source.producer() is None or source.is_graph_output():
                continue
            _take_name(graph, node)
        else:
            if source.shape is None and alias.shape is not None:
                source.shape, source.type = alias.shape, alias.type
            ir.convenience.replace_all_uses_with(alias, source)
        graph.remove(node, safe=True)


def _take_name(graph: ir.Graph, node: ir.Node) -> None:
    """The source of an output's Identity becomes that output, under the output's name."""
    source, alias = node.inputs[0], node.outputs[0]
    assert source is not None
    name, alias_shape, alias_type = alias.name, alias.shape, alias.type
    ir.convenience.replace_all_uses_with(alias, source, replace_graph_outputs=True)
    alias.name = None
    source.name = name
    source.shape = alias_shape if alias_shape is not None else source.shape
    source.type = alias_type if alias_type is not None else source.type


def infer_shapes(model: ir.Model) -> None:
    """Fills in the shapes of values that a lowering or an upgrade made.

    Raises:
        InputError: the operands of what an operator was lowered to do not fit each other.
    """
    if any(v.shape is None for n in model.graph for v in n.outputs if v.name):
        heard = _Heard()
        log = logging.getLogger(ShapeInferencePass.__module__)
        log.addHandler(heard)
        was, log.propagate = log.propagate, False
        try:
            with bounded(shapes.room(len(list(model.graph)) << 10)):
                ShapeInferencePass(data_prop=not _vast(model.graph))(model)
        finally:
            log.removeHandler(heard)
            log.propagate = was
        heard.complain()


def _vast(graph: ir.Graph) -> bool:
    """Whether a constant may make a vector too long to be written out; see `shapes.infer`."""
    small = (v.const_value for v in graph.initializers.values())
    numbers = (t.numpy() for t in small if t is not None and t.dtype in _WHOLE and t.size < 512)
    return any(shapes.is_vast(n) for array in numbers for n in array.reshape(-1).tolist())


_WHOLE = (ir.DataType.INT32, ir.DataType.INT64)


class _Heard(logging.Handler):
    """Keeps the error that the inference pass only writes to the log."""

    error: BaseException | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            self.error = record.exc_info[1]

    def complain(self) -> None:
        if isinstance(self.error, MemoryError):
            raise InputError(shapes.TOO_LONG, where="the graph") from self.error
        if self.error is not None:
            what = shapes.reason(str(self.error))
            raise InputError(what, where="the graph, after rewriting its dialects") from self.error


_LEAST_RANK = {
    "AveragePool": 3, "BatchNormalization": 2, "Conv": 3, "ConvTranspose": 3, "DepthToSpace": 4,
    "GlobalAveragePool": 3, "GlobalMaxPool": 3, "GroupNormalization": 3,
    "InstanceNormalization": 3, "LRN": 3, "MaxPool": 3, "SpaceToDepth": 4, "Trilu": 2,
}  # fmt: skip
"""Least rank of the first input of operators whose schema names axes without checking them."""


def check_ranks(graph: ir.Graph) -> None:
    """Refuses inputs that lack axes which the operator names.

    Raises:
        InputError: names the node.
    """
    for node in graph:
        least = _LEAST_RANK.get(node.op_type, 0) if node.domain == "" else 0
        shape = node.inputs[0].shape if least and node.inputs[0] is not None else None
        if shape is not None and len(shape) < least:
            raise InputError(
                f"Shapes or types do not fit: {node.op_type} of an input of {len(shape)} axes; "
                f"it needs {least}", where=f"node {node.name!r}",
            )  # fmt: skip
        if node.domain == "" and node.op_type in _OF_ONE_RANK:
            _check_operands(node, _OF_ONE_RANK[node.op_type])


_OF_ONE_RANK = {"Attention": 3, "Conv": 2, "ConvTranspose": 2}
"""How many first inputs have one rank, where the schema does not say so."""


def _check_operands(node: ir.Node, count: int) -> None:
    shapes = [v.shape for v in node.inputs[:count] if v is not None]
    ranks = {len(s) for s in shapes if s is not None}
    if len(ranks) > 1:
        raise InputError(
            f"Shapes or types do not fit: {node.op_type} of operands of {sorted(ranks)} axes",
            where=f"node {node.name!r}",
        )


def numeric_dims(graph: ir.Graph) -> None:
    """Dimensions spelled as numbers (``"32"``) become integers, impossible ones unknown."""
    for value in all_values(graph):
        shape = value.shape
        if shape is None or not any(_odd(d) for d in shape.dims):
            continue
        value.shape = ir.Shape([_plain(d) for d in shape.dims])


def _odd(dim: int | ir.SymbolicDim) -> bool:
    if isinstance(dim, int):
        return dim < 0
    if dim.value is None:
        return False
    return (dim.value.isascii() and dim.value.isdecimal()) or dim.value.startswith("unk__")


def _plain(dim: int | ir.SymbolicDim) -> int | ir.SymbolicDim | None:
    if not _odd(dim):
        return dim
    text = "" if isinstance(dim, int) else str(dim.value)
    return int(text) if text.isdecimal() and len(text) < 19 else None


def sort(graph: ir.Graph) -> None:
    """Puts the nodes into an order in which every value is made before it is used."""
    done: set[ir.Node] = set()
    for node in graph:
        makers = (v.producer() for v in node.inputs if v is not None)
        if any(m is not None and m not in done for m in makers):
            graph.sort()
            return
        done.add(node)


def drop_dead(model: ir.Model) -> None:
    """Removes nodes and initialisers that no graph output depends on."""
    RemoveUnusedNodesPass()(model)
