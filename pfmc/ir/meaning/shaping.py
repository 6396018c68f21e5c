"""Operators that move elements or make index arithmetic: shape, slice, join, repeat, pad.

Shapes and lengths stay on the host: `Shape` and `Size` return numpy int64 whatever the library,
and the inputs named in `HOST_INPUTS` are read as Python integers, so numpy is welcome there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from pfmc.errors import InputError
from pfmc.ir.meaning.arrays import integers
from pfmc.ir.meaning.attributes import (
    Array,
    Arrays,
    Maker,
    Run,
    attribute,
    describe,
    integer,
    sequence,
    text,
)


def _shape(node: ir.Node, xp: Arrays) -> Run:
    start, end = integer(node, "start", 0), attribute(node, "end")
    return lambda x: np.array(x.shape[start:end], dtype=np.int64)


def _size(node: ir.Node, xp: Arrays) -> Run:
    return lambda x: np.array(int(np.prod(x.shape)), dtype=np.int64)


def _reshape(node: ir.Node, xp: Arrays) -> Run:
    keep = not integer(node, "allowzero", 0)

    def run(x: Array, shape: Array) -> Array:
        sizes = integers(shape)
        if keep and 0 in sizes:
            sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
        return xp.reshape(x, sizes)

    return run


def _flatten(node: ir.Node, xp: Arrays) -> Run:
    axis = integer(node, "axis", 1)

    def run(x: Array) -> Array:
        split = axis if axis >= 0 else axis + len(x.shape)
        return xp.reshape(x, [int(np.prod(x.shape[:split])), int(np.prod(x.shape[split:]))])

    return run


def _transpose(node: ir.Node, xp: Arrays) -> Run:
    perm = sequence(node, "perm")
    if perm is None:
        return lambda x: xp.permute_dims(x, list(range(len(x.shape)))[::-1])
    return lambda x: xp.permute_dims(x, perm)


def _places(axes: Sequence[int], rank: int, node: ir.Node) -> set[int]:
    """`axes` counted from the front.

    Raises:
        InputError: one is named twice or is none of `rank`.
    """
    found = {axis + rank if axis < 0 else axis for axis in axes}
    if len(found) < len(axes) or any(not 0 <= axis < rank for axis in found):
        raise InputError(
            f"{node.op_type} at axes {list(axes)} of {rank}", where=describe(node)
        )
    return found


def _unsqueeze(node: ir.Node, xp: Arrays) -> Run:
    fixed = sequence(node, "axes")

    def run(x: Array, axes: Array | None = None) -> Array:
        where = fixed if fixed is not None else integers(axes)
        rank = len(x.shape) + len(where)
        ones = _places(where, rank, node)
        sides = iter(x.shape)
        return xp.reshape(x, [1 if d in ones else next(sides) for d in range(rank)])

    return run


def _squeeze(node: ir.Node, xp: Arrays) -> Run:
    fixed = sequence(node, "axes")

    def run(x: Array, axes: Array | None = None) -> Array:
        shape = x.shape
        if fixed is None and axes is None:
            return xp.reshape(x, [n for n in shape if n != 1])
        where = fixed if fixed is not None else integers(axes)
        drop = _places(where, len(shape), node)
        if any(shape[axis] != 1 for axis in drop):
            raise InputError(
                f"Squeeze of axes {sorted(drop)} of shape {list(shape)}", where=describe(node)
            )
        return xp.reshape(x, [n for d, n in enumerate(shape) if d not in drop])

    return run


def _expand(node: ir.Node, xp: Arrays) -> Run:
    def run(x: Array, shape: Array) -> Array:
        return xp.broadcast_to(x, np.broadcast_shapes(tuple(x.shape), tuple(integers(shape))))

    return run


def _tile(node: ir.Node, xp: Arrays) -> Run:
    return lambda x, repeats: xp.tile(x, integers(repeats))


def _concat(node: ir.Node, xp: Arrays) -> Run:
    axis = integer(node, "axis", 0)
    return lambda *inputs: xp.concat(inputs, axis)


def _split(node: ir.Node, xp: Arrays) -> Run:
    axis, fixed = integer(node, "axis", 0), sequence(node, "split")
    parts = integer(node, "num_outputs", len(node.outputs))

    def run(x: Array, split: Array | None = None) -> tuple[Array, ...]:
        sizes = fixed if split is None else integers(split)
        if sizes is None:
            total = x.shape[axis]
            each = -(-total // parts)
            sizes = [min(each, total - i * each) for i in range(parts)]
        return tuple(xp.split(x, sizes, axis))

    return run


def _slice(node: ir.Node, xp: Arrays) -> Run:
    fixed = [sequence(node, name) for name in ("starts", "ends", "axes")]  # before opset 10

    def run(
        x: Array,
        starts: Array | None = None,
        ends: Array | None = None,
        axes: Array | None = None,
        steps: Array | None = None,
    ) -> Array:
        first = fixed[0] or [] if starts is None else integers(starts)
        last = fixed[1] or [] if ends is None else integers(ends)
        where = fixed[2] if axes is None else integers(axes)
        pace = [1] * len(first) if steps is None else integers(steps)
        where = list(range(len(first))) if where is None else where
        return cut(x, first, last, where, pace, xp)

    return run


def cut(
    x: Array, starts: list[int], ends: list[int], axes: list[int], steps: list[int], xp: Arrays
) -> Array:
    """ONNX Slice: negative bounds count from the end, all bounds clamp, steps may be negative."""
    rank = len(x.shape)
    pick: list[slice] = [slice(None)] * rank
    backwards: list[tuple[int, range]] = []
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = x.shape[axis]
        start, end = (v + size if v < 0 else v for v in (start, end))
        if step > 0:
            pick[axis % rank] = slice(min(max(start, 0), size), min(max(end, 0), size), step)
        else:
            stretch = range(min(max(start, 0), size - 1), min(max(end, -1), size - 1), step)
            backwards.append((axis % rank, stretch))
    x = x[tuple(pick)]
    for axis, stretch in backwards:
        order = xp.index(np.array(list(stretch), dtype=np.int64), x)
        x = x[(*[slice(None)] * axis, order)]
    return x


def _range(node: ir.Node, xp: Arrays) -> Run:
    def run(start: Array, limit: Array, delta: Array) -> Array:
        if isinstance(start, (np.ndarray, np.generic)):
            dtype = start.dtype
            made = np.arange(start.item(), limit.item(), delta.item(), dtype=dtype)
            return made if xp.name == "numpy" else xp.asarray(made)
        count = max(0, int(np.ceil((limit.item() - start.item()) / delta.item())))
        return start + xp.astype(xp.arange(count, start), start.dtype) * delta

    return run


def _constant(node: ir.Node, xp: Arrays) -> Run:
    value = constant_value(node)
    made = xp.asarray(value)
    return lambda: made


def constant_value(node: ir.Node) -> np.ndarray:
    """The array that a ``Constant`` node holds."""
    if "value" in node.attributes:
        return np.asarray(attribute(node, "value").numpy())
    for name, dtype in (("value_int", np.int64), ("value_float", np.float32)):
        for key in (name, name + "s"):
            if key in node.attributes:
                return np.array(attribute(node, key), dtype=dtype)
    raise InputError("Constant without a numeric value", where=describe(node))


def _constant_of_shape(node: ir.Node, xp: Arrays) -> Run:
    tensor = attribute(node, "value")
    value = np.zeros((1,), np.float32) if tensor is None else np.asarray(tensor.numpy())

    def run(shape: Array) -> Array:
        return xp.asarray(np.full(integers(shape), value.reshape(-1)[0], dtype=value.dtype))

    return run


def _pad(node: ir.Node, xp: Arrays) -> Run:
    mode, fixed = text(node, "mode", "constant"), sequence(node, "pads")

    def run(x: Array, pads: Any = None, value: Any = None, axes: Any = None) -> Array:
        given = fixed if fixed is not None else integers(pads)
        rank = len(x.shape)
        where = [a % rank for a in integers(axes)] if axes is not None else list(range(rank))
        widths = [(0, 0)] * rank
        for i, axis in enumerate(where):
            widths[axis] = (given[i], given[i + len(where)])
        return xp.pad(x, widths, mode, 0 if value is None else value.item())

    return run


def _trilu(node: ir.Node, xp: Arrays) -> Run:
    upper = bool(integer(node, "upper", 1))

    def run(x: Array, k: Array | None = None) -> Array:
        return xp.triangle(x, 0 if k is None else int(k.item()), upper)

    return run


SHAPING: dict[tuple[str, str], Maker] = {
    ("", "Concat"): _concat,
    ("", "Constant"): _constant,
    ("", "ConstantOfShape"): _constant_of_shape,
    ("", "Expand"): _expand,
    ("", "Flatten"): _flatten,
    ("", "Pad"): _pad,
    ("", "Range"): _range,
    ("", "Reshape"): _reshape,
    ("", "Shape"): _shape,
    ("", "Size"): _size,
    ("", "Slice"): _slice,
    ("", "Split"): _split,
    ("", "Squeeze"): _squeeze,
    ("", "Tile"): _tile,
    ("", "Transpose"): _transpose,
    ("", "Trilu"): _trilu,
    ("", "Unsqueeze"): _unsqueeze,
}

HOST_INPUTS: dict[str, frozenset[int]] = {
    "ConstantOfShape": frozenset({0}),
    "CumSum": frozenset({1}),
    "Expand": frozenset({1}),
    "OneHot": frozenset({1}),
    "Pad": frozenset({1, 2, 3}),
    "Pow": frozenset({1}),
    "Range": frozenset({0, 1, 2}),
    "ReduceL1": frozenset({1}),
    "ReduceL2": frozenset({1}),
    "ReduceLogSumExp": frozenset({1}),
    "ReduceMax": frozenset({1}),
    "ReduceMean": frozenset({1}),
    "ReduceMin": frozenset({1}),
    "ReduceProd": frozenset({1}),
    "ReduceSum": frozenset({1}),
    "ReduceSumSquare": frozenset({1}),
    "Reshape": frozenset({1}),
    "Slice": frozenset({1, 2, 3, 4}),
    "Split": frozenset({1}),
    "Squeeze": frozenset({1}),
    "Tile": frozenset({1}),
    "TopK": frozenset({1}),
    "Trilu": frozenset({1}),
    "Unsqueeze": frozenset({1}),
}
"""Inputs that an operator of the default domain reads as Python integers, by operator type."""
