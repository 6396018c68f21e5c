"""Element types of values that a file leaves out, from the operators that make them."""

from __future__ import annotations

import onnx_ir as ir

from pfmc.ir import matcher

_TO_BOOL = frozenset(
    [
        "Equal",
        "Greater",
        "GreaterOrEqual",
        "Less",
        "LessOrEqual",
        "And",
        "Or",
        "Not",
        "Xor",
        "IsNaN",
        "IsInf",
    ]
)
_TO_INT64 = frozenset({"Shape", "Size", "NonZero", "ArgMax", "ArgMin"})
_LIKE_SECOND = frozenset({"Where", "DequantizeLinear"})


def infer(node: ir.Node) -> ir.DataType | None:
    """The element type of the first output of `node`; None if its input's type is unknown."""
    if node.op_type == "Cast":
        return ir.DataType(matcher.attribute(node, "to"))
    if node.op_type in _TO_BOOL:
        return ir.DataType.BOOL
    if node.op_type in _TO_INT64:
        return ir.DataType.INT64
    if node.op_type == "ConstantOfShape":
        value = matcher.attribute(node, "value")
        return ir.DataType.FLOAT if value is None else ir.DataType(value.dtype)
    position = 1 if node.op_type in _LIKE_SECOND else 0
    source = node.inputs[position] if len(node.inputs) > position else None
    return None if source is None else source.dtype


def note(node: ir.Node) -> None:
    """Gives the outputs of `node` that have no type the one that follows from the inputs."""
    if node.outputs[0].dtype is not None or (kind := infer(node)) is None:
        return
    whole = node.op_type in ("Split", "Attention")
    for value in node.outputs if whole else node.outputs[:1]:
        if value.dtype is None:
            value.type = ir.TensorType(kind)
