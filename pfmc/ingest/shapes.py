"""Infers the shapes and types of all values from the operators, and refuses contradictions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import numpy as np
import onnx
from onnx import checker, shape_inference

from pfmc.errors import InputError
from pfmc.ingest.limits import bounded
from pfmc.ingest.order import in_order
from pfmc.ingest.tensors import DTYPES

TOO_LONG = "Its shapes cannot be inferred: a vector of integers is far too long for a shape"
_LONGEST, _TO_THE_END = 1 << 20, ((1 << 31) - 1, 1 << 31)
_LENGTHENERS = frozenset({
    "ConstantOfShape", "Expand", "OneHot", "Pad", "Range", "Reshape", "Resize", "Tile", "Upsample",
})  # fmt: skip
_ARITHMETIC = frozenset({
    "Abs", "Add", "Cast", "Concat", "Div", "Gather", "Identity", "Max", "Min", "Mul", "Neg",
    "Squeeze", "Sub", "Unsqueeze",
})  # fmt: skip
_LIKE = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
_INTEGERS: dict[int, np.dtype[np.signedinteger]] = {
    onnx.TensorProto.INT64: np.dtype("<i8"), onnx.TensorProto.INT32: np.dtype("<i4"),
}  # fmt: skip
_SMALL_BYTES = 1 << 12  # constants up to here take part (axes, target shapes); larger only by shape
_INVENTED_DIM = re.compile(r"^unk__\d+$")


def infer(proto: onnx.ModelProto, file: str) -> None:
    """Fills in ``proto.graph.value_info`` from a strict shape and type inference, in place.

    Raises:
        InputError: operands do not fit each other; the message names the node, the error's notes
            name all further ones.
    """
    bare = _skeleton(proto)
    try:
        with bounded(room(bare.ByteSize())):
            known = shape_inference.infer_shapes(
                bare, check_type=True, strict_mode=True, data_prop=not _vast(bare)
            )
    except MemoryError as error:
        raise InputError(TOO_LONG, where=file) from error
    except checker.ValidationError as error:  # functions that call each other too deep
        raise InputError(str(error).partition("\n")[0], where=file) from error
    except (shape_inference.InferenceError, LookupError, ValueError, RuntimeError) as error:
        first, *others = reasons(str(error))
        refusal = InputError(first, where=file, mend=_mend())
        for other in others:
            refusal.add_note(other)
        raise refusal from error
    _drop_odd_notes(proto.graph)
    noted = {v.name: v for v in (*proto.graph.value_info, *proto.graph.output)}
    given = {v.name: v for v in proto.graph.input}
    for value in proto.graph.output:
        if value.name in given:  # an output that is an input is what the input is
            value.type.CopyFrom(given[value.name].type)
    for value in (*known.graph.value_info, *known.graph.output):
        if value.name in given:
            continue
        if value.name in noted:
            _correct(noted[value.name].type.tensor_type, value.type.tensor_type)
        else:
            _forget_invented(value)
            proto.graph.value_info.append(value)


def room(size: int) -> int:
    """Bytes that the inference of a graph of `size` bytes may take."""
    return (1 << 28) + 16 * size


def known_types(proto: onnx.ModelProto) -> dict[str, onnx.TypeProto]:
    """Value name -> type and shape, as far as they can be told; contradictions are passed over."""
    bare = _skeleton(proto)
    try:
        with bounded(room(bare.ByteSize())):
            known = shape_inference.infer_shapes(bare, data_prop=not _vast(bare)).graph
    except (shape_inference.InferenceError, checker.ValidationError, MemoryError, LookupError,
            ValueError, RuntimeError):  # fmt: skip
        known = proto.graph
    inferred = (*known.input, *known.output, *known.value_info)
    for value in inferred:
        _forget_invented(value)
    found: dict[str, onnx.TypeProto] = {}
    for value in (*inferred, *proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        kind = value.type.tensor_type
        if kind.elem_type and (kind.HasField("shape") or value.name not in found):
            found[value.name] = value.type
    return found


def _vast(bare: onnx.ModelProto) -> bool:
    """Whether a constant may make a vector so long that writing it out takes all memory.

    onnx's propagation of data writes out every element of such a vector, and when an allocation
    fails on the way it may end the process instead of raising. The ends of int32 and int64 only
    say "to the end" in slices.
    """
    graph = bare.graph
    nodes = [*graph.node, *(n for f in bare.functions for n in f.node)]
    calls = {f.name for f in bare.functions}  # they may hand numbers on to Constants
    held = [n for n in nodes if n.op_type == "Constant" or n.op_type in calls]
    constants = [a.t for n in held for a in n.attribute]
    plain = (v for n in held for a in n.attribute for v in (a.i, *a.ints))
    if any(map(is_vast, plain)):
        return True
    if any(is_vast(d.dim_value) for v in graph.input for d in v.type.tensor_type.shape.dim
           if len(v.type.tensor_type.shape.dim) == 1):  # fmt: skip
        return True
    if any(_holds_vast(t) for t in (*graph.initializer, *constants)):
        return True
    small = {t.name for t in graph.initializer if not _holds(t, _is_stride)}
    if _leaps(graph.node, small) or any(_leaps(f.node, set()) for f in bare.functions):
        return True
    ends = {t.name for t in graph.initializer if _holds(t, _is_end)}
    return any(_reaches(body.node, ends, calls) for body in (graph, *bare.functions))


def _reaches(nodes: Iterable[onnx.NodeProto], ends: set[str], calls: set[str]) -> bool:
    """Whether an end of int32, one of `ends` or a Constant, may become a length."""
    ends = set(ends)
    for node in nodes:
        if node.op_type == "Constant":
            plain = (v for a in node.attribute for v in (a.i, *a.ints))
            if any(map(_is_end, plain)) or any(_holds(a.t, _is_end) for a in node.attribute):
                ends.update(node.output)
        elif not ends.isdisjoint(node.input):
            if node.op_type in _LENGTHENERS or node.op_type in calls:
                return True
            if node.op_type in _ARITHMETIC:
                ends.update(node.output)
    return False


def _leaps(nodes: Iterable[onnx.NodeProto], small: set[str]) -> bool:
    """Whether the steps of a Slice may be beyond int32: onnx 1.23 then walks out of the vector.

    All that is taken for sure are the initialisers `small`, Constants, and their like.
    """
    small = set(small)
    for node in nodes:
        if node.op_type == "Slice" and len(node.input) > 4 and node.input[4]:
            if node.input[4] not in small:
                return True
        elif node.op_type == "Constant":
            plain = (v for a in node.attribute for v in (a.i, *a.ints))
            if not any(map(_is_stride, plain)) and not any(
                a.ref_attr_name or _holds(a.t, _is_stride) for a in node.attribute
            ):
                small.update(node.output)
        elif node.op_type in _LIKE and node.input and node.input[0] in small:
            small.update(node.output)
    return False


def _is_stride(number: int) -> bool:
    return abs(number) >= _LONGEST


def _is_end(number: int) -> bool:
    return abs(number) in _TO_THE_END


def is_vast(number: int) -> bool:
    """Whether a vector of so many elements is too long to be written out."""
    return _LONGEST <= abs(number) < 1 << 62 and abs(number) not in _TO_THE_END


def _holds_vast(tensor: onnx.TensorProto) -> bool:
    return _holds(tensor, is_vast)


def _holds(tensor: onnx.TensorProto, fits: Callable[[int], bool]) -> bool:
    """Whether a number of a small vector of integers fits."""
    kind = _INTEGERS.get(tensor.data_type)
    if kind is None:
        return False
    if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.ByteSize() > _SMALL_BYTES:
        return False
    raw = np.frombuffer(tensor.raw_data[: len(tensor.raw_data) // 8 * 8], kind)
    return any(map(fits, (*map(int, raw), *tensor.int64_data, *tensor.int32_data)))


def _drop_odd_notes(graph: onnx.GraphProto) -> None:
    """Notes on values of no or of a strange type say nothing."""
    kept = [v for v in graph.value_info if v.type.tensor_type.elem_type in DTYPES]
    if len(kept) < len(graph.value_info):
        del graph.value_info[:]
        graph.value_info.extend(kept)


def _correct(noted: onnx.TypeProto.Tensor, found: onnx.TypeProto.Tensor) -> None:
    """Brings a note of the file into line with what was inferred, which is right.

    The note wins where it only adds a symbol ("batch") to an unknown dimension.
    """
    noted.elem_type = found.elem_type or noted.elem_type
    if not found.HasField("shape"):
        return
    old, new = noted.shape.dim, found.shape.dim
    if not noted.HasField("shape") or len(old) != len(new):
        noted.shape.CopyFrom(found.shape)
        for dim in noted.shape.dim:
            _forget(dim)
        return
    for mine, theirs in zip(old, new, strict=True):
        if theirs.HasField("dim_value") and mine.dim_value != theirs.dim_value:
            mine.dim_value = theirs.dim_value


def _skeleton(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its large weights replaced by graph inputs of the same shape."""
    bare = onnx.ModelProto(ir_version=proto.ir_version)
    bare.opset_import.extend(proto.opset_import)
    bare.functions.extend(proto.functions)
    graph, old = bare.graph, proto.graph
    graph.name = old.name or "graph"
    graph.node.extend(in_order(old.node))
    for output in old.output:
        kind = output.type.tensor_type.elem_type
        graph.output.append(onnx.helper.make_tensor_value_info(output.name, kind, None))
    graph.value_info.extend(_notes_of_foreign(old))
    graph.input.extend(old.input)
    declared = {v.name for v in old.input}
    for tensor in old.initializer:
        inside = tensor.data_location != onnx.TensorProto.EXTERNAL
        if inside and tensor.ByteSize() <= _SMALL_BYTES:
            graph.initializer.append(tensor)
        elif tensor.name not in declared:
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            graph.input.append(value)
    return bare


def _notes_of_foreign(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """The file's notes on the outputs of operators that have no standard schema."""
    outputs = {o for n in graph.node if n.domain not in ("", "ai.onnx") for o in n.output}
    return [v for v in graph.value_info if v.name in outputs] if outputs else []


def _forget_invented(value: onnx.ValueInfoProto) -> None:
    for dim in value.type.tensor_type.shape.dim:
        _forget(dim)


def _forget(dim: onnx.TensorShapeProto.Dimension) -> None:
    """A dimension that the inference could only number is unknown."""
    if _INVENTED_DIM.match(dim.dim_param):
        dim.ClearField("dim_param")


def reason(text: str) -> str:
    """What onnx's shape inference found first, in one line."""
    return reasons(text)[0]


def reasons(text: str) -> list[str]:
    """All that onnx's shape inference found, a line an operation; at least one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    useful = [line for line in lines if "op_type:" in line] or lines[-1:] or [text]
    return [f"Shapes or types do not fit: {line[:400]}" for line in useful]


def _mend() -> str:
    return "export the model again; the tensors do not belong to this graph"
