"""Reads the scores of an attention backwards from its softmax: product, scale, masks, cap."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from pfmc.ir import matcher


@dataclass(frozen=True)
class Part:
    """One thing done to the scores: a value added, or scores replaced by a very low number.

    Attributes:
        value: what is added, or a condition.
        kind: ``add``, ``hide`` (low where the value is true) or ``show`` (low where it is false).
        factor: what an added value is multiplied by.
        low: the number that stands where scores are replaced.
    """

    value: ir.Value
    kind: str = "add"
    factor: float = 1.0
    low: float = -math.inf


@dataclass(frozen=True)
class Scores:
    """``scale * (q @ kt)`` and its masks, innermost first, read backwards from a softmax."""

    product: ir.Node
    scale: float
    masks: tuple[Part, ...]
    nodes: tuple[ir.Node, ...]
    softcap: float = 0.0


_MOST = 128
"""Nodes that are looked at in search of a product: exporters put a dozen before a softmax."""
_Known: TypeAlias = "dict[ir.Node, Scores | None]"


def read_scores(value: ir.Value | None) -> Scores | None:
    """Walks back through additions of masks, scalings and fillings to the product."""
    return _read(value, {})


def _read(value: ir.Value | None, known: _Known) -> Scores | None:
    value = matcher.see_through(value)
    node = value.producer() if value is not None else None
    if node is None:
        return None
    if node not in known and len(known) < _MOST:
        known[node] = None
        known[node] = _read_node(node, known)
    return known.get(node)


def _read_node(node: ir.Node, known: _Known) -> Scores | None:
    if node.op_type == "MatMul":
        return Scores(node, 1.0, (), (node,))
    if node.op_type == "Add":
        return _read_add(node, known)
    if node.op_type in ("Mul", "Div"):
        return _read_scaling(node, known)
    if node.op_type == "Where":
        return _read_filling(node, known)
    return None


HIDDEN = -1e4
"""Scores filled with this or less are taken for hidden: their weight is zero in float32."""


def filling(node: ir.Node) -> tuple[ir.Value, Part] | None:
    """What a Where fills with a very low number, and the number and its places."""
    condition = node.inputs[0]
    for low, inner, kind in ((1, 2, "hide"), (2, 1, "show")):
        number, rest = _uniform(node.inputs[low]), node.inputs[inner]
        if number is None or rest is None or condition is None:
            continue
        if number <= HIDDEN:
            return rest, Part(condition, kind, low=number)
    return None


def _read_filling(node: ir.Node, known: _Known) -> Scores | None:
    """``Where(condition, low, scores)`` or ``Where(condition, scores, low)``."""
    found = filling(node)
    inner = _read(found[0], known) if found is not None else None
    if found is None or inner is None:
        return None
    return replace(inner, masks=(*inner.masks, found[1]), nodes=(*inner.nodes, node))


def _uniform(value: ir.Value | None) -> float | None:
    """The number that all elements of a constant are, seen through Expand."""
    while (node := matcher.producer(value, "Expand")) is not None:
        value = node.inputs[0]
    array = matcher.constant(value)
    if array is None or not array.size or array.dtype.kind != "f":
        return None
    first = array.reshape(-1)[0]
    return float(first) if (array == first).all() else None


def _read_add(node: ir.Node, known: _Known) -> Scores | None:
    for inner, mask in ((0, 1), (1, 0)):
        found = _read(node.inputs[inner], known)
        other = node.inputs[mask]
        if found is not None and other is not None:
            masks = (*found.masks, Part(other))
            return replace(found, masks=masks, nodes=(*found.nodes, node))
    return None


def is_plain(factor: float) -> bool:
    """Whether `factor`, as a float32, is an ordinary number that is not zero."""
    return _TINY <= abs(factor) <= _HUGE


_TINY, _HUGE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def _read_scaling(node: ir.Node, known: _Known) -> Scores | None:
    for inner, factor in ((0, 1), (1, 0)):
        number = matcher.scalar(node.inputs[factor])
        if number is None or (node.op_type == "Div" and inner):
            continue
        if (tanh := matcher.producer(node.inputs[inner], "Tanh")) is not None:
            return _read_softcap(node, tanh, number, known)
        found = _read(node.inputs[inner], known)
        if found is None or found.softcap or number == 0 or (found.masks and number < 0):
            return None
        times = number if node.op_type == "Mul" else 1.0 / number
        if found.masks and not _keeps_masks(found.masks, times):
            return None
        masks = tuple(replace(m, factor=m.factor * times) for m in found.masks)
        return Scores(found.product, found.scale * times, masks, (*found.nodes, node))
    return None


def _keeps_masks(masks: tuple[Part, ...], times: float) -> bool:
    """Whether masks can be scaled alike, and what is hidden stays so."""
    factors = [m.factor * times for m in masks]
    low = [m.low * f for m, f in zip(masks, factors, strict=True) if m.kind != "add"]
    return all(map(is_plain, factors)) and all(number <= HIDDEN for number in low)


def _read_softcap(node: ir.Node, tanh: ir.Node, cap: float, known: _Known) -> Scores | None:
    """``cap * tanh(scores / cap)`` (Gemma 2)."""
    found = _read(tanh.inputs[0], known)
    if found is None or found.masks or found.softcap or node.op_type != "Mul" or cap <= 0:
        return None
    return Scores(found.product, found.scale * cap, (), (*found.nodes, tanh, node), cap)
