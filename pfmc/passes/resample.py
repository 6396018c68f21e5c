"""Writes Resize as what it does to each axis: rows picked, or weighted sums of rows picked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pfmc.ir import matcher
from pfmc.ir.shapes import Shapes

Reals = npt.NDArray[np.floating[Any]]

_MOST = 1 << 24  # elements of an axis's matrix; an image of 4,096 points a side
_MOST_TAPS = 64  # points that one point of a smaller image is made of
_UNKNOWN = "an image of unknown size: export with a fixed size"


def spell(node: ir.Node, known: Shapes) -> list[ir.Node] | str:
    """The nodes that compute ``Resize(x)``, the last of them its output, or why not.

    Each axis by itself: nearest is a ``Gather``; linear and cubic, with antialiasing too, are the
    sum of as many products ``Gather(x) * weights`` as a point has neighbours. Follows the ONNX
    operator's text, opset 19.
    """
    dims = known.shape(node.inputs[0])
    if not dims or not all(isinstance(d, int) for d in dims[2:]):
        return _UNKNOWN
    if _option(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        return "an aspect ratio to be kept"
    steps = _steps(node, [d if isinstance(d, int) else 0 for d in dims], known)
    if isinstance(steps, str):
        return steps
    if _option(node, "mode", "nearest") not in _MODES or _rounding(node) not in _ROUNDINGS:
        return "a mode that is not known"
    if any(after < 1 for _, _, after, _ in steps):
        return "an axis to no points"
    if any(before * after > _MOST for _, before, after, _ in steps):
        return "an axis to too many points"
    if any(before > _MOST_TAPS * after for _, before, after, _ in steps) and (
        matcher.attribute(node, "antialias", 0)
    ):
        return "an axis to points of too many neighbours each"
    work = _Work(node)
    for axis, before, after, scale in steps:
        matrix = _matrix(node, before, after, scale)
        if matrix is None:
            return f"coordinates of kind {_option(node, _COORDINATES, 'half_pixel')!r}"
        work.apply(axis, matrix)
    return work.nodes or [matcher.fresh("Identity", [work.value])]


_COORDINATES = "coordinate_transformation_mode"
_MODES = frozenset({"nearest", "linear", "cubic"})


def _option(node: ir.Node, name: str, default: str) -> str:
    value = matcher.attribute(node, name, default)
    return value.decode() if isinstance(value, bytes) else str(value)


def _steps(
    node: ir.Node, dims: list[int], known: Shapes
) -> list[tuple[int, int, int, float]] | str:
    """(axis, length before, length after, scale) of every axis that changes."""
    axes = [a % len(dims) for a in matcher.attribute(node, "axes", range(len(dims)))]
    sizes = known.content(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] else None
    found: list[tuple[int, int, int, float]] = []
    if sizes is not None:
        if len(sizes) != len(axes):
            return "sizes that are not one for each axis"
        for axis, size in zip(axes, sizes, strict=True):
            if dims[axis] and not isinstance(size, int):
                return _UNKNOWN
            if dims[axis] and isinstance(size, int):
                found.append((axis, dims[axis], size, size / dims[axis]))
    else:
        scales = matcher.constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if scales is None or scales.shape != (len(axes),):
            return "a scale that is computed at run time"
        for axis, scale in zip(axes, scales.tolist(), strict=True):
            if not dims[axis] and scale != 1:
                return _UNKNOWN
            held = min(max(scale, 0.0), 2.0 * _MOST)
            length = int(np.float32(dims[axis]) * np.float32(held))
            found.append((axis, dims[axis], length, scale))
    if all(before == after for _, before, after, _ in found):
        return []  # ONNX Runtime copies then, whatever the scale
    return [s for s in found if s[3] != 1.0]


def _places(kind: str, before: int, after: int, scale: float) -> Reals | None:
    """Where in the old axis the points of the new one lie."""
    x = np.arange(after, dtype=np.float32)  # single precision, as ONNX Runtime rounds
    half = (x + np.float32(0.5)) / np.float32(scale) - np.float32(0.5)
    if kind == "pytorch_half_pixel":
        return half if after > 1 else np.zeros(1)
    if kind == "half_pixel_symmetric":
        return np.float32(before / 2 * (1 - after / (scale * before))) + half
    if kind == "align_corners":
        return x * np.float32(before - 1) / np.float32(after - 1) if after > 1 else np.zeros(1)
    return {"half_pixel": half, "asymmetric": x / np.float32(scale)}.get(kind)


_ROUNDINGS: dict[str, Callable[[Reals], Reals]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


def _rounding(node: ir.Node) -> str:
    return _option(node, "nearest_mode", "round_prefer_floor")


def _matrix(node: ir.Node, before: int, after: int, scale: float) -> Reals | None:
    """``[after, before]``: the new axis as a linear function of the old one."""
    places = _places(_option(node, _COORDINATES, "half_pixel"), before, after, scale)
    if places is None:
        return None
    mode = _option(node, "mode", "nearest")
    if mode == "nearest":
        near = _ROUNDINGS[_rounding(node)](places)
        matrix = np.zeros((after, before))
        matrix[np.arange(after), np.clip(near, 0, before - 1).astype(np.int64)] = 1
        return matrix
    reach = min(scale, 1.0) if matcher.attribute(node, "antialias", 0) else 1.0
    radius = math.ceil((1 if mode == "linear" else 2) / reach)
    own = np.floor(places)[:, None] + np.arange(1 - radius, radius + 1)[None, :]
    distance = (places[:, None] - own) * reach
    slope = float(matcher.attribute(node, "cubic_coeff_a", -0.75))
    taps = np.maximum(0, 1 - np.abs(distance)) if mode == "linear" else _cubic(distance, slope)
    if matcher.attribute(node, "exclude_outside", 0):
        taps = np.where((own >= 0) & (own < before), taps, 0)
    taps = taps / taps.sum(axis=1, keepdims=True)
    matrix = np.zeros((after, before))
    columns = np.clip(own, 0, before - 1).astype(np.int64)
    np.add.at(matrix, (np.arange(after)[:, None], columns), taps)
    return matrix


def _cubic(distance: Reals, a: float) -> Reals:
    """The cubic convolution kernel (Keys 1981)."""
    d = np.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0))


class _Work:
    def __init__(self, node: ir.Node) -> None:
        source = node.inputs[0]
        assert source is not None
        assert node.graph is not None
        self.graph, self.stem, self.value = node.graph, str(node.outputs[0].name), source
        self.kind = source.dtype.numpy() if source.dtype is not None else np.dtype(np.float32)
        self.rank = len(source.shape or ()) or 4
        self.nodes: list[ir.Node] = []

    def _add(self, op_type: str, inputs: list[ir.Value], **options: object) -> ir.Value:
        self.nodes.append(matcher.fresh(op_type, inputs, options))
        return self.nodes[-1].outputs[0]

    def apply(self, axis: int, matrix: Reals) -> None:
        """The axis made anew by `matrix` ``[after, before]``."""
        count = int((matrix != 0).sum(axis=1).max())
        order = np.sort(np.argsort(matrix == 0, axis=1, kind="stable")[:, :count], axis=1)
        total: ir.Value | None = None
        for k in range(count):
            rows = order[:, k]
            weights = matrix[np.arange(len(rows)), rows]
            name = f"{self.stem}:{'rows'}"
            index = matcher.add_array(self.graph, name, rows.astype(np.int64))
            part = self._add("Gather", [self.value, index], axis=axis)
            if (weights != 1).any():
                shape = [-1 if a == axis else 1 for a in range(self.rank)]
                factor = weights.reshape(shape).astype(self.kind)
                held = matcher.add_array(self.graph, f"{self.stem}:weights", factor)
                part = self._add("Mul", [part, held])
            total = part if total is None else self._add("Add", [total, part])
        assert total is not None
        self.value = total
