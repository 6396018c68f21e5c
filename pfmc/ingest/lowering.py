"""What the lowering of a dialect operator works with: checked inputs, attributes, a builder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from pfmc.errors import InputError
from pfmc.ingest.rewrite import Builder
from pfmc.ir import provenance


@dataclass
class Lowering:
    """One node of a dialect on its way to standard operators.

    `shared` holds values that several layers can use (rotary tables), by a key.
    """

    node: ir.Node
    build: Builder = field(repr=False)
    shared: dict[tuple[object, ...], tuple[ir.Value, ir.Value]] = field(repr=False)

    def refuse(self, why: str, mend: str = "export with standard operators") -> InputError:
        """The error of a node that has no equal in standard operators."""
        name = f"{self.node.domain or 'ai.onnx'}::{self.node.op_type}"
        return InputError(f"{name}: {why}", where=f"node {self.node.name!r}", mend=mend)

    def input(self, index: int) -> ir.Value | None:
        """Optional input `index`."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def need(self, index: int, name: str) -> ir.Value:
        """Required input `index`."""
        value = self.input(index)
        if value is None:
            raise self.refuse(f"the input {name!r} is missing")
        return value

    def forbid(self, **inputs: int) -> None:
        """Refuses inputs (name = index) that have no equal."""
        for name, index in inputs.items():
            if self.input(index) is not None:
                raise self.refuse(f"the input {name!r} is not supported")

    def integer(self, name: str, default: int = 0) -> int:
        """An integer attribute."""
        attribute = self.node.attributes.get(name)
        if attribute is None:
            return default
        if attribute.type != ir.AttributeType.INT:
            raise self.refuse(f"the attribute {name!r} is no integer")
        return attribute.as_int()

    def number(self, name: str, default: float) -> float:
        """A floating-point attribute."""
        attribute = self.node.attributes.get(name)
        if attribute is None:
            return default
        if attribute.type != ir.AttributeType.FLOAT:
            raise self.refuse(f"the attribute {name!r} is no number")
        return attribute.as_float()

    def zero(self, *names: str) -> None:
        """Refuses nodes in which one of the attributes `names` is set."""
        for name in names:
            attribute = self.node.attributes.get(name)
            if attribute is not None and attribute.value not in (0, 0.0, -1, None):
                raise self.refuse(f"{name} = {attribute.value} is not supported")

    def positive(self, name: str) -> int:
        """An integer attribute that must be above zero."""
        found = self.integer(name)
        if found <= 0:
            raise self.refuse(f"the attribute {name!r} must be positive, not {found}")
        return found

    def positive_or(self, name: str, default: int) -> int:
        """An integer attribute above zero, or `default` if it is not there."""
        return self.positive(name) if name in self.node.attributes else default

    def done(self, *results: ir.Value | None) -> None:
        """The node's outputs become `results`; a used output without a result is refused."""
        outputs = list(self.node.outputs)
        padded = [*results, *[None] * (len(outputs) - len(results))]
        for index, (old, new) in enumerate(zip(outputs, padded, strict=False)):
            if new is None and (old.uses() or old.is_graph_output()):
                raise self.refuse(f"its output {index} is used, which is not supported")
        self.build.replace(self.node, padded[: len(outputs)])

    def used(self, index: int) -> bool:
        """Whether output `index` exists and somebody reads it."""
        if index >= len(self.node.outputs):
            return False
        output = self.node.outputs[index]
        return bool(output.name) and (bool(output.uses()) or output.is_graph_output())

    def array(self, value: ir.Value | None, name: str) -> np.ndarray:
        """The content of a constant input."""
        return np.asarray(self.tensor(value, name).numpy())

    def tensor(self, value: ir.Value | None, name: str) -> ir.TensorProtocol:
        """A constant input, unread."""
        if value is None or value.const_value is None or value.is_graph_input():
            raise self.refuse(f"the input {name!r} must be a constant")
        return value.const_value

    def word(self, name: str, default: str) -> str:
        """A text attribute."""
        attribute = self.node.attributes.get(name)
        if attribute is None:
            return default
        if attribute.type != ir.AttributeType.STRING:
            raise self.refuse(f"the attribute {name!r} is no text")
        return str(attribute.as_string())

    def lazy(
        self, source: ir.Value, read: Callable[[], ir.TensorProtocol],
        kind: ir.DataType, shape: Sequence[int], name: str,
    ) -> ir.Value:  # fmt: skip
        """A constant that `read` computes from `source`, whose weight name it keeps, when asked."""
        title = self.build.unique(name or "weight")
        tensor = ir.LazyTensor(read, kind, ir.Shape(shape), name=title)
        return self.build.initialiser(tensor, title, provenance.weight(source))

    def scalar(self, number: float, like: ir.Value) -> ir.Value:
        """A floating-point scalar of the element type of `like` (float32 if unknown)."""
        return self.build.constant(np.array(number, dtype=float_type(like)))

    def number_of(self, value: ir.Value) -> ir.Value:
        """The one element of an int64 vector or scalar, as a scalar."""
        return self.reshape(value, ())

    # shape arithmetic -----------------------------------------------------------------------

    def ints(self, *values: int) -> ir.Value:
        """An int64 vector constant."""
        return self.build.constant(np.array(values, dtype=np.int64))

    def size(self, value: ir.Value, axis: int) -> ir.Value:
        """The extent of `value` along `axis` as an int64 vector of one element."""
        attributes = {"start": axis, "end": axis + 1}
        return self.build.op("Shape", [value], attributes)

    def reshape(self, value: ir.Value, dims: Sequence[int]) -> ir.Value:
        """`value` reshaped (0 keeps a dimension, -1 is inferred)."""
        return self.build.op("Reshape", [value, self.ints(*dims)])

    def transpose(self, value: ir.Value, perm: Sequence[int]) -> ir.Value:
        """`value` with its axes permuted."""
        return self.build.op("Transpose", [value], {"perm": list(perm)})

    def split_heads(self, value: ir.Value, heads: int) -> ir.Value:
        """``[B, S, H * D]`` to ``[B, H, S, D]``."""
        return self.transpose(self.reshape(value, (0, 0, heads, -1)), (0, 2, 1, 3))

    def join_heads(self, value: ir.Value) -> ir.Value:
        """``[B, H, S, D]`` to ``[B, S, H * D]``."""
        return self.reshape(self.transpose(value, (0, 2, 1, 3)), (0, 0, -1))

    def add(self, left: ir.Value, right: ir.Value | None) -> ir.Value:
        """The sum, or `left` if there is nothing to add."""
        return left if right is None else self.build.op("Add", [left, right])


def last_dim(value: ir.Value | None) -> int | None:
    """The static extent of the last axis, if known."""
    if value is None or value.shape is None or not len(value.shape):
        return None
    dim = value.shape[-1]
    return dim if isinstance(dim, int) else None


def rank(value: ir.Value | None) -> int | None:
    """The number of axes, if known."""
    return None if value is None or value.shape is None else len(value.shape)


def float_type(value: ir.Value) -> np.dtype[np.generic]:
    """The floating-point type to compute with `value` in: its own, else float32."""
    known = value.dtype
    if known is None or not known.is_floating_point():
        return np.dtype(np.float32)
    return known.numpy()
