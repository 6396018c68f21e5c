"""A graph that takes any batch, made from one that was exported for a single sample.

Exporters write a batch of one into reshapes (``Reshape(x, [1, 0, 8, 8])``). Where such a one stands
first it becomes 0, "as in the input", and the graph is kept only if it then computes for two
samples together what it computes for each alone.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from pfmc.distill.feeds import batches
from pfmc.distill.student import Student

_POSITIONS = 8
_CLOSE = 1e-3


def freed(model: ir.Model) -> ir.Model:
    """`model`, or a copy of it that takes any batch if it takes one sample and such a copy exists.

    The model, at any stage, is not changed.
    """
    if not any(_fixed(v) for v in model.graph.inputs):
        return model
    copy = model.clone()
    for value in copy.graph.inputs:
        if _fixed(value) and value.shape is not None:
            value.shape = ir.Shape(["batch", *list(value.shape)[1:]])
    for node in copy.graph:
        if node.op_type == "Reshape" and not node.attributes.get_int("allowzero", 0):
            _open(copy.graph, node)
    return copy if _agrees(model, copy) else model


def batch_of(model: ir.Model) -> int | None:
    """The fixed batch of a graph, or None if it takes any."""
    for value in model.graph.inputs:
        if value.shape is not None and len(value.shape):
            first = value.shape[0]
            text = str(first if isinstance(first, int) else first.value)
            if text.isdecimal():
                return int(text)
    return None


def _fixed(value: ir.Value) -> bool:
    """Whether a graph input is for one sample; a number as text counts."""
    if value.shape is None or not len(value.shape):
        return False
    first = value.shape[0]
    return str(first if isinstance(first, int) else first.value) == "1"


def _open(graph: ir.Graph, node: ir.Node) -> None:
    shape = node.inputs[1]
    tensor = None if shape is None else shape.const_value
    if shape is None or tensor is None:
        return
    sizes = tensor.numpy()
    if sizes.ndim != 1 or not len(sizes) or sizes[0] != 1:
        return
    name = f"{shape.name}:any batch:{node.name}"
    made = ir.tensor(np.concatenate([[0], sizes[1:]]).astype(sizes.dtype), name=name)
    value = ir.Value(name=name, const_value=made, type=shape.type, shape=shape.shape)
    graph.register_initializer(value)
    node.replace_input_with(1, value)


def _agrees(model: ir.Model, copy: ir.Model) -> bool:
    both = next(batches(copy, 2, _POSITIONS, 0))
    first = {k: v[:1] for k, v in both.items()}
    single, pair = Student(model).eval(), Student(copy).eval()
    try:
        with torch.inference_mode():
            one, two = single(**first), pair(**both)
    except (RuntimeError, IndexError):
        return False
    return all(
        value.shape[1:] == two[name].shape[1:] and len(two[name]) == 2
        and torch.allclose(value, two[name][:1], rtol=_CLOSE, atol=_CLOSE)
        for name, value in one.items()
        if value.is_floating_point()
    )  # fmt: skip
