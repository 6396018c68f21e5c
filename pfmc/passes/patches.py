"""Convolutions that are fixed linears: 1x1, and patches whose stride is the kernel's size."""

from __future__ import annotations

from math import prod

import numpy as np
import onnx_ir as ir

from pfmc.ir import matcher
from pfmc.ir.matcher import Constant, Match, Op, Var
from pfmc.passes import weights
from pfmc.passes.rules import Rule

_CONV = Op("Conv", (Var("x"), Constant("weight")), name="conv", more=True)


def reason(node: ir.Node) -> str:
    """Why a convolution is not a fixed linear; empty if it is one."""
    weight = matcher.see_through(node.inputs[1])
    if weight is None or not matcher.is_constant(weight) or weight.const_value is None:
        return "convolution with a kernel that is not constant"
    kernel = list(weight.const_value.shape.numpy()[2:])
    steps = list(matcher.attribute(node, "strides", [1] * len(kernel)))
    if matcher.attribute(node, "group", 1) != 1:
        return "grouped convolution"
    if any(matcher.attribute(node, "pads", ())) or matcher.attribute(
        node, "auto_pad", "NOTSET"
    ) not in ("NOTSET", "VALID"):
        return "convolution with padding"
    if kernel != steps:
        return f"convolution whose kernel {kernel} overlaps its stride {steps}"
    if any(d != 1 for d in matcher.attribute(node, "dilations", ())) and prod(kernel) != 1:
        return "dilated convolution"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and not matcher.is_constant(bias):
        return "convolution with a bias that is not constant"
    x = node.inputs[0]
    if any(not isinstance(matcher.static_dim(x, axis), int) for axis in range(2, 2 + len(kernel))):
        return "" if prod(kernel) == 1 else "patches of an image of unknown size"
    return ""


def _grid(node: ir.Node, kernel: list[int]) -> list[int]:
    x = node.inputs[0]
    sizes = [matcher.static_dim(x, axis) for axis in range(2, 2 + len(kernel))]
    return [(size or 0) // k for size, k in zip(sizes, kernel, strict=True)]


def _cut(graph: ir.Graph, node: ir.Node, kernel: list[int], flat: bool) -> list[ir.Node]:
    """Nodes that give ``[B, *grid, C * prod(kernel)]`` (or ``[B, prod(grid), …]`` if `flat`)."""
    x, dims = node.inputs[0], len(kernel)
    assert x is not None
    grid, channels = _grid(node, kernel), matcher.static_dim(node.inputs[1], 1) or 0
    out = str(node.outputs[0].name)
    apart = [0, channels, *(n for pair in zip(grid, kernel, strict=True) for n in pair)]
    perm = (0, *range(2, 2 + 2 * dims, 2), 1, *range(3, 3 + 2 * dims, 2))
    together = [0, *([prod(grid)] if flat else grid), channels * prod(kernel)]
    nodes: list[ir.Node] = []
    sizes = [matcher.static_dim(x, axis) for axis in range(2, 2 + dims)]
    whole = [g * k for g, k in zip(grid, kernel, strict=True)]
    if sizes != whole:
        nodes.append(_crop(graph, x, whole, out))
        x = nodes[-1].outputs[0]
    nodes.append(_reshape(graph, x, apart, f"{out}:apart"))
    nodes.append(matcher.fresh("Transpose", [nodes[-1].outputs[0]], {"perm": perm}))
    nodes.append(_reshape(graph, nodes[-1].outputs[0], together, f"{out}:together"))
    return nodes


def _crop(graph: ir.Graph, x: ir.Value, sizes: list[int], out: str) -> ir.Node:
    axes = list(range(2, 2 + len(sizes)))
    parts = {"starts": [0] * len(sizes), "ends": sizes, "axes": axes}
    values = [
        matcher.add_array(graph, f"{out}:{name}", np.asarray(part, np.int64))
        for name, part in parts.items()
    ]
    return matcher.fresh("Slice", [x, *values])


def _reshape(graph: ir.Graph, x: ir.Value, shape: list[int], name: str) -> ir.Node:
    """A Reshape; 0 keeps the dimension."""
    return matcher.fresh(
        "Reshape", [x, matcher.add_array(graph, name, np.asarray(shape, np.int64))]
    )


def _linear(graph: ir.Graph, conv: ir.Node, x: ir.Value, source: ir.Value) -> ir.Node:
    kernel = matcher.see_through(conv.inputs[1])
    assert kernel is not None
    assert kernel.const_value is not None
    shape = list(kernel.const_value.shape.numpy())
    outputs, inputs = shape[0], prod(shape[1:])
    weight = weights.derived(graph, kernel, (inputs, outputs), lambda a: a.reshape(outputs, -1).T)
    bias = matcher.see_through(conv.inputs[2]) if len(conv.inputs) > 2 else None
    if bias is None:
        bias = weights.zeros(graph, str(source.name), outputs, kernel.const_value.dtype)
    return weights.linear(x, weight, bias, source, conv)


def _kernel(node: ir.Node) -> list[int]:
    weight = matcher.see_through(node.inputs[1])
    assert weight is not None
    assert weight.const_value is not None
    return list(weight.const_value.shape.numpy()[2:])


class PatchEmbedding(Rule):
    """A patch embedding whose grid is flattened and whose channels go last.

    ``Transpose(Reshape(Conv(x, W, b), [B, C, patches]), [0, 2, 1])`` with kernel = stride
    -> ``FixedLinear([B, patches, in * kernel], W', b)``
    """

    patterns = (
        Op(
            "Transpose",
            (Op("Reshape", (_CONV, Var("shape")), name="flat"),),
            attributes=(("perm", (0, 2, 1)),),
        ),
        Op("Transpose", (Op("Flatten", (_CONV,), name="flat"),), attributes=(("perm", (0, 2, 1)),)),
    )

    def check(self, found: Match) -> str:
        """Checks the convolution, and that the reshape flattens the grid alone."""
        conv = found["conv"].producer()
        assert conv is not None
        if text := reason(conv):
            return text
        if not all(_grid(conv, _kernel(conv))):
            return "convolution of an image of unknown size"
        shape = matcher.integers(found["shape"]) if "shape" in found else None
        known = matcher.rank(found["flat"])
        if (len(shape) if shape is not None else known) != 3:
            return "the convolution's output is reshaped to another rank than three"
        return _flattens_grid(found, conv, shape)

    def rewrite(self, graph: ir.Graph, found: Match) -> None:
        """Cuts the image into rows and puts a fixed linear behind."""
        conv = found["conv"].producer()
        assert conv is not None
        before = _cut(graph, conv, _kernel(conv), flat=True)
        node = _linear(graph, conv, before[-1].outputs[0], found.output)
        matcher.inherit(node, found.nodes, conv)
        matcher.replace(found, [*before, node])


def _flattens_grid(found: Match, conv: ir.Node, shape: tuple[int, ...] | None) -> str:
    channels = matcher.static_dim(conv.inputs[1], 0)
    middle = shape[1] if shape is not None else matcher.static_dim(found["flat"], 1)
    last = shape[2] if shape is not None else matcher.static_dim(found["flat"], 2)
    if middle != channels or last not in (-1, prod(_grid(conv, _kernel(conv)))):
        return "the convolution's output is not flattened to [batch, channels, patches]"
    return ""


class Patches(Rule):
    """Any other convolution whose stride is its kernel's size.

    ``Conv(x, W, b)`` -> ``Transpose(FixedLinear([B, *grid, in * kernel], W', b))``, channels
    first again; ``pfmc.perm`` on the linear says how its output relates to ``pfmc.value``.
    """

    patterns = (_CONV,)

    def check(self, found: Match) -> str:
        """Checks the convolution; what is no linear is reported once, at the end."""
        conv = found.root
        grid_known = all(
            matcher.static_dim(conv.inputs[0], a) is not None
            for a in range(2, 2 + len(_kernel(conv)))
        )
        return reason(conv) or ("" if grid_known else "1x1 convolution of unknown size")

    def rewrite(self, graph: ir.Graph, found: Match) -> None:
        """Cuts the image, applies the linear, and puts the channels first again."""
        conv, dims = found.root, len(_kernel(found.root))
        before = _cut(graph, conv, _kernel(conv), flat=False)
        node = _linear(graph, conv, before[-1].outputs[0], found.output)
        perm = (0, dims + 1, *range(1, dims + 1))
        node.metadata_props[weights.KEY_PERM] = " ".join(map(str, perm))
        back = matcher.fresh("Transpose", [node.outputs[0]], {"perm": perm})
        matcher.replace(found, [*before, node, back])
