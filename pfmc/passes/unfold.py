"""Any convolution with a constant kernel: windows are gathered, which is wiring, then a linear."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pfmc.ir import matcher, vocabulary
from pfmc.ir.matcher import Constant, Match, Op, Var
from pfmc.passes import weights
from pfmc.passes.rules import Rule

_BLOCK = 256
"""Groups are joined into block-diagonal linears of at most so many inputs: a tile holds them."""


def reason(node: ir.Node) -> str:
    """Why a convolution is not a fixed linear; empty if it is one."""
    kernel = matcher.see_through(node.inputs[1])
    if kernel is None or not matcher.is_constant(kernel):
        return "convolution with a kernel that is not constant"
    if matcher.attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return "convolution whose padding is left to the runtime (auto_pad)"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and not matcher.is_constant(bias):
        return "convolution with a bias that is not constant"
    groups, outputs = int(matcher.attribute(node, "group", 1)), weights.shape_of(kernel)[:1]
    if groups < 1 or outputs[0] % groups:
        return f"convolution in {groups} groups of {outputs[0]} channels"
    rank = len(weights.shape_of(kernel))
    if rank not in (3, 4, 5):
        return f"convolution with a kernel of rank {rank}"
    if matcher.rank(node.inputs[0]) != rank:
        return "convolution of an input of unknown rank"
    return _too_large(node, weights.shape_of(kernel), groups)


_MOST_BLOCKS = 2048
_MOST_PLACES = 1 << 24


def _too_large(node: ir.Node, kernel: tuple[int, ...], groups: int) -> str:
    """Why the windows, or the linears, of a convolution are too many or none."""
    if 0 in kernel:
        return "convolution with a kernel without elements"
    if groups // _joined(groups, prod(kernel[1:])) > _MOST_BLOCKS:
        return f"convolution in {groups} groups"
    pads = list(matcher.attribute(node, "pads", None) or [0] * 2 * len(kernel[2:]))
    lengths = [matcher.static_dim(node.inputs[0], 2 + axis) for axis in range(len(kernel[2:]))]
    ends = zip(pads, pads[len(lengths) :], strict=False)
    wide = [(n or 0) + sum(p) for n, p in zip(lengths, ends, strict=True)]
    if any(n * k > _MOST_PLACES for n, k in zip(wide, kernel[2:], strict=True)):
        return "convolution of an input too long to be cut into windows"
    return ""


class Unfolded(Rule):
    """A convolution whose windows overlap, are padded, dilated or grouped (im2col).

    ``Conv(x[B, C, *in], W, b)`` -> ``Transpose(FixedLinear(windows[B, *out, C * kernel], W', b))``

    Windows are gathered along each axis by constant indices, or by counted ones where the length
    is free. Groups become linears of their own; small ones are joined block by block, so that a
    depthwise convolution fills its tiles. ``pfmc.perm`` relates the output to ``pfmc.value``.
    """

    patterns = (Op("Conv", (Var("x"), Constant("weight")), more=True),)

    def check(self, found: Match) -> str:
        """Checks that the kernel is constant and the padding is spelt out."""
        if matcher.is_constant(found["x"]):
            return "both factors are constant"
        return reason(found.root)

    def rewrite(self, graph: ir.Graph, found: Match) -> None:
        """Pads, gathers windows, applies the linears, and puts the channels first again."""
        made = _Windows(graph, found)
        x = made.windows(made.pad(found["x"]))
        y = made.products(x)
        dims = made.dims
        perm = (0, dims + 1, *range(1, dims + 1))
        made.linears[0].metadata_props[weights.KEY_PERM] = " ".join(map(str, perm))
        if len(made.linears) > 1:
            for node in made.linears:
                node.metadata_props.pop(vocabulary.KEY_VALUE, None)
                node.metadata_props.pop(weights.KEY_PERM, None)
        made.add("Transpose", y, perm=perm)
        matcher.replace(found, made.nodes)


class _Windows:
    """The nodes of one unfolded convolution."""

    def __init__(self, graph: ir.Graph, found: Match) -> None:
        node = found.root
        self.graph, self.found = graph, found
        self.nodes: list[ir.Node] = []
        self.linears: list[ir.Node] = []
        self.outputs, self.inputs, *self.kernel = weights.shape_of(found["weight"])
        self.dims = len(self.kernel)
        self.groups = int(matcher.attribute(node, "group", 1))
        self.steps = list(matcher.attribute(node, "strides", None) or [1] * self.dims)
        self.spread = list(matcher.attribute(node, "dilations", None) or [1] * self.dims)
        self.pads = list(matcher.attribute(node, "pads", None) or [0] * 2 * self.dims)

    def add(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """One node; its first output."""
        self.nodes.append(matcher.fresh(op_type, list(inputs), attributes))
        return self.nodes[-1].outputs[0]

    def constant(self, array: npt.ArrayLike) -> ir.Value:
        """A small constant of integers."""
        return matcher.add_array(
            self.graph, f"{self.found.output.name}:windows", np.asarray(array, np.int64)
        )

    def pad(self, x: ir.Value) -> ir.Value:
        """x with zeros around."""
        if not any(self.pads):
            return x
        before, after = self.pads[: self.dims], self.pads[self.dims :]
        return self.add("Pad", x, self.constant([0, 0, *before, 0, 0, *after]))

    def windows(self, x: ir.Value) -> ir.Value:
        """``[B, *out, C * kernel]``, the channel changing slowest in the last axis."""
        if prod(self.kernel) == 1 and prod(self.steps) == 1:
            return self.add("Transpose", x, perm=(0, *range(2, 2 + self.dims), 1))
        for axis in range(self.dims):
            x = self.add("Gather", x, self._indices(x, axis), axis=2 + 2 * axis)
        grid = range(2, 2 + 2 * self.dims, 2)
        window = range(3, 3 + 2 * self.dims, 2)
        x = self.add("Transpose", x, perm=(0, *grid, 1, *window))
        width = self.groups * self.inputs * prod(self.kernel)
        return self.add("Reshape", x, self.constant([*([0] * (self.dims + 1)), width]))

    def _indices(self, x: ir.Value, axis: int) -> ir.Value:
        """``[out, kernel]``: which positions each window sees."""
        size, step, spread = self.kernel[axis], self.steps[axis], self.spread[axis]
        seen = np.arange(size) * spread
        reach = (size - 1) * spread + 1
        length = matcher.static_dim(self.found["x"], 2 + axis)
        if length is not None:
            length += self.pads[axis] + self.pads[self.dims + axis]
            return self.constant(np.arange(0, length - reach + 1, step)[:, None] + seen)
        place = 2 + 2 * axis
        whole = self.add("Squeeze", self.add("Shape", x, start=place, end=place + 1))
        end = self.add("Sub", whole, self.constant(reach - 1))
        starts = self.add("Range", self.constant(0), end, self.constant(step))
        column = self.add("Unsqueeze", starts, self.constant([1]))
        return self.add("Add", column, self.constant(seen))

    def products(self, x: ir.Value) -> ir.Value:
        """The linears of all groups, joined along the last axis."""
        together = _joined(self.groups, self.inputs * prod(self.kernel))
        blocks = self.groups // together
        parts: Sequence[ir.Value] = [x]
        if blocks > 1:
            self.nodes.append(
                matcher.fresh("Split", [x], {"axis": -1, "num_outputs": blocks}, outputs=blocks)
            )
            parts = self.nodes[-1].outputs
        results = [self._linear(part, i, together) for i, part in enumerate(parts)]
        return results[0] if blocks == 1 else self.add("Concat", *results, axis=-1)

    def _linear(self, x: ir.Value, block: int, together: int) -> ir.Value:
        """Groups ``block * together`` and on, as one block-diagonal fixed linear."""
        rows, columns = self.inputs * prod(self.kernel), self.outputs // self.groups
        start = block * together * columns

        def of(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
            own = array.reshape(self.outputs, -1)[start : start + together * columns]
            if together == 1:
                return own.T
            whole = np.zeros((together * rows, together * columns), array.dtype)
            for g in range(together):
                part = own[g * columns : (g + 1) * columns].T
                whole[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] = part
            return whole

        kernel = self.found["weight"]
        weight = weights.derived(self.graph, kernel, (together * rows, together * columns), of)
        if together < self.groups:
            weight.meta[weights.SLICE] = block
        node = weights.linear(
            x, weight, self._bias(start, together * columns), self.found.output, self.found.root
        )
        self.nodes.append(node)
        self.linears.append(node)
        return node.outputs[0]

    def _bias(self, start: int, width: int) -> ir.Value:
        node, kernel = self.found.root, self.found["weight"]
        given = matcher.see_through(node.inputs[2]) if len(node.inputs) > 2 else None
        if given is None:
            name = str(self.found.output.name)
            return weights.zeros(self.graph, name, width, weights.kind_of(kernel))
        if width == self.outputs:
            return given
        return weights.derived(self.graph, given, (width,), lambda a: a[start : start + width])


def _joined(groups: int, rows: int) -> int:
    """How many groups of `rows` inputs share a linear: the most that divide and fit."""
    if groups == 1:
        return 1
    fits = [n for n in range(1, min(groups, _BLOCK) + 1) if groups % n == 0 and n * rows <= _BLOCK]
    return max(fits, default=1)
