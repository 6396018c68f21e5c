"""Half-precision files become float32 graphs: weights are widened lazily, never copied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pfmc.ir import stored, vocabulary
from pfmc.passes.base import Context, Pass, PassResult

_HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


@dataclass(frozen=True)
class Widen(Pass):
    """float16 and bfloat16 values -> float32, so that one arithmetic runs everywhere.

    Weights keep their stored numbers exactly; only the arithmetic between them gains bits. Graph
    inputs and outputs become float32 too. A lone number that is the lowest of its half-precision
    type, which exporters write for "hidden" into masks, becomes the lowest of float32. Casts
    between float types that thereby do nothing are left to `fold`.
    """

    name: ClassVar[str] = "widen"

    def apply(self, model: ir.Model, context: Context) -> PassResult:
        """Widens every half-precision initialiser, value type and cast."""
        graph = model.graph
        changed = sum(_widen_weight(v) for v in list(graph.initializers.values()))
        for node in graph:
            changed += _widen_attributes(node)
        values = [*graph.inputs, *(o for n in graph for o in n.outputs)]
        changed += sum(_widen_type(v) for v in values)
        return PassResult(model, changed, (), {"widened": changed})


def _widen_weight(value: ir.Value) -> int:
    tensor = value.const_value
    if tensor is None or tensor.dtype not in _HALVES:
        return 0
    value.const_value = _widened(tensor)
    if tensor.size > 1:
        stored.remember(value, tensor.numpy)
    value.type = ir.TensorType(ir.DataType.FLOAT)
    return 1


def _widened(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    def read() -> ir.TensorProtocol:
        return ir.Tensor(_float32(tensor.numpy()), name=tensor.name)

    shape = ir.Shape([int(d) for d in tensor.shape.numpy()])
    return ir.LazyTensor(read, ir.DataType.FLOAT, shape, name=tensor.name)


def _float32(array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    lowest = ml_dtypes.finfo(array.dtype).min  # type: ignore[no-untyped-call]
    if array.size == 1 and array.reshape(()) == lowest:
        return np.full(array.shape, np.finfo(np.float32).min, np.float32)
    return array.astype(np.float32)


def _widen_attributes(node: ir.Node) -> int:
    changed = 0
    for key, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.INT and _is_type(node, key):
            if attribute.as_int() in _HALVES:
                node.attributes[key] = ir.AttrInt64(key, ir.DataType.FLOAT)
                changed += 1
        elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in _HALVES:
            node.attributes[key] = ir.AttrTensor(
                key, ir.Tensor(_float32(attribute.value.numpy()))
            )
            changed += 1
    return changed


def _is_type(node: ir.Node, key: str) -> bool:
    """Whether attribute `key` of `node` names an element type."""
    return (key == "to" and vocabulary.is_op(node, "Cast")) or key in (
        "dtype", "output_dtype", "stash_type", "softmax_precision",
    )  # fmt: skip


def _widen_type(value: ir.Value) -> int:
    if value.type is None or value.type.dtype not in _HALVES:
        return 0
    value.type = ir.TensorType(ir.DataType.FLOAT)
    return 1
