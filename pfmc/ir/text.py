"""The readable form of a model: one line a node, for golden tests, dumps and explanations.

%y: f32[batch,seq,64] = pfmc.FixedLinear(%x, @w[64,64], @b[64])  # n12 model.layers.0.mlp
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from pfmc.ir import provenance
from pfmc.ir.vocabulary import DOMAIN

_SHORT = {
    "FLOAT": "f32", "FLOAT16": "f16", "BFLOAT16": "bf16", "DOUBLE": "f64", "BOOL": "bool",
    "INT64": "i64", "INT32": "i32", "INT8": "i8", "UINT8": "u8", "INT4": "i4", "UINT4": "u4",
}  # fmt: skip
_INLINE = 8  # constants of at most so many elements are written out


def model_text(model: ir.Model, comments: bool = True) -> str:
    """The whole graph as text, ending in a newline.

    Args:
        model: at any stage; no weight is read, only constants of at most 8 elements.
        comments: whether source ids and scopes follow each line.
    """
    return "\n".join([*_lines(model.graph, comments)]) + "\n"


def _lines(graph: ir.Graph, comments: bool) -> Iterator[str]:
    inputs = ", ".join(_typed(v) for v in graph.inputs)
    yield f"graph({inputs}) {{"
    for node in graph:
        yield "  " + node_text(node, comments)
    yield "  return " + ", ".join(_typed(v) for v in graph.outputs)
    yield "}"


def node_text(node: ir.Node, comments: bool = True) -> str:
    """One node as one line."""
    left = ", ".join(_typed(v) for v in node.outputs)
    name = f"{DOMAIN}.{node.op_type}" if node.domain == DOMAIN else node.op_type
    if node.domain not in ("", "ai.onnx", DOMAIN):
        name = f"{node.domain}.{node.op_type}"
    line = f"{left} = {name}({', '.join(_operand(v) for v in node.inputs)})"
    if node.attributes:
        line += " {" + ", ".join(_attribute(a) for a in _sorted(node)) + "}"
    return line + (_comment(node) if comments else "")


def _sorted(node: ir.Node) -> list[ir.Attr]:
    return [node.attributes[name] for name in sorted(node.attributes)]


def _comment(node: ir.Node) -> str:
    parts = [*provenance.sources(node), provenance.scope(node)]
    words = " ".join(p for p in parts if p)
    return f"  # {words}" if words else ""


def type_text(value: ir.Value) -> str:
    """``f32[batch,64]``; ``?`` for what is unknown."""
    kind = "?" if value.dtype is None else _kind(value.dtype)
    return kind + ("[?]" if value.shape is None else _dims(tuple(value.shape)))


def _kind(kind: ir.DataType) -> str:
    return _SHORT.get(kind.name, kind.name.lower())


def _dims(dims: tuple[object, ...]) -> str:
    words = [str(d.value) if isinstance(d, ir.SymbolicDim) else str(d) for d in dims]
    return "[" + ",".join("?" if w == "None" else w for w in words) + "]"


def _typed(value: ir.Value) -> str:
    if value.const_value is not None:
        return _operand(value)
    return f"%{value.name}: {type_text(value)}"


def _operand(value: ir.Value | None) -> str:
    if value is None:
        return "_"
    tensor = value.const_value
    if tensor is None or value.is_graph_input():
        return f"%{value.name}"
    if 0 < tensor.size <= _INLINE and tensor.dtype.name in ("FLOAT", "INT64", "INT32", "BOOL"):
        return _literal(tensor)
    kind = "" if tensor.dtype is ir.DataType.FLOAT else f":{_kind(tensor.dtype)}"
    return f"@{value.name}{kind}{_dims(tuple(tensor.shape))}"


def _literal(tensor: ir.TensorProtocol) -> str:
    array = np.asarray(tensor.numpy())
    words = [_number(n) for n in array.reshape(-1).tolist()]
    return words[0] if array.ndim == 0 else "[" + ", ".join(words) + "]"


def _number(number: object) -> str:
    return f"{number:.9g}" if isinstance(number, float) else str(number)


def _attribute(attribute: ir.Attr) -> str:
    return f"{attribute.name}={_attribute_value(attribute)}"


def _attribute_value(attribute: ir.Attr) -> str:
    if attribute.is_ref():
        return f"@{attribute.ref_attr_name}"
    value = attribute.value
    match attribute.type:
        case ir.AttributeType.TENSOR:
            return f"{_kind(value.dtype)}{_dims(tuple(value.shape))}"
        case ir.AttributeType.GRAPH | ir.AttributeType.GRAPHS:
            return "graph"
        case ir.AttributeType.FLOATS | ir.AttributeType.INTS | ir.AttributeType.STRINGS:
            return "[" + ", ".join(_number(v) for v in value) + "]"
    return _number(value)


def histogram(model: ir.Model) -> dict[str, int]:
    """Operators of the graph and how many there are, sorted by name; ours as ``pfmc.Name``."""
    counts: dict[tuple[str, str], int] = {}
    for node in model.graph:
        key = node.domain, node.op_type
        counts[key] = counts.get(key, 0) + 1
    return named_counts(counts)


def named_counts(counts: Mapping[tuple[str, str], int]) -> dict[str, int]:
    """The same of counts by (domain, operator)."""
    named: dict[str, int] = {}
    for (domain, op_type), count in counts.items():
        name = op_type if domain in ("", "ai.onnx") else f"{domain}.{op_type}"
        named[name] = named.get(name, 0) + count
    return dict(sorted(named.items()))
