"""Positions that act on attention's scores by distance: the buckets of T5 and MPNet."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from pfmc.ingest.hf.blocks import INT, Frame
from pfmc.ingest.hf.graph import dims


def buckets(count: int, distance: int, *, both: bool) -> np.ndarray:
    """Bucket of each key place less query place from ``-distance`` to ``distance``, int64.

    Half of the buckets are for single places, the rest grow with the logarithm up to `distance`;
    farther keys are in the last (Raffel et al. 2020, arXiv:1910.10683, section 2.1).

    Args:
        count: of buckets; distance: from where on all keys are alike.
        both: whether later keys have buckets of their own, or all share that of distance 0.
    """
    offset = np.arange(-distance, distance + 1, dtype=np.int64)
    sides = count // 2 if both else count
    first = (offset > 0) * sides if both else np.zeros_like(offset)
    apart = np.abs(offset) if both else np.maximum(-offset, 0)
    exact = sides // 2
    ratio = np.log(np.maximum(apart, 1).astype(np.float32) / np.float32(exact))
    large = ratio / np.float32(math.log(distance / exact)) * np.float32(sides - exact)
    far = np.minimum(exact + large.astype(np.int64), sides - 1)
    return np.asarray(first + np.where(apart < exact, apart, far), np.int64)


def bias(
    frame: Frame, ids: ir.Value, table: str, heads: int, count: int, distance: int, *, both: bool
) -> ir.Value:
    """What the places add to the scores, ``[1, heads, S, S]``.

    Args:
        frame: of the graph; ids: tokens whose places they are, ``[B, S]``.
        table: module that holds a row of `heads` numbers for each of `count` buckets.
        distance, both: as in `buckets`.
    """
    g, length = frame.g, frame.size(ids, 1)
    name = dims(ids)[1]
    end = g.op("Squeeze", [length, g.integers(0)], (), table, kind=INT)
    zero, one = (g.constant(np.asarray(i, np.int64), f"pfmc/number_{i}") for i in (0, 1))
    places = g.op("Range", [zero, end, one], (name,), table, kind=INT)
    column = g.op("Unsqueeze", [places, g.integers(1)], (name, 1), table, kind=INT)
    offset = g.op("Sub", [places, column], (name, name), table, kind=INT)
    far = g.constant(np.asarray(distance, np.int64), f"pfmc/distance_{distance}")
    near = g.constant(np.asarray(-distance, np.int64), f"pfmc/distance_-{distance}")
    offset = g.op("Clip", [offset, near, far], (name, name), table, kind=INT)
    offset = g.op("Add", [offset, far], (name, name), table, kind=INT)
    known = g.constant(buckets(count, distance, both=both), f"pfmc/buckets_{count}_{int(both)}")
    which = g.op("Gather", [known, offset], (name, name), table, kind=INT, axis=0)
    rows = g.parameter(f"{table}.weight", (count, heads))
    found = g.op("Gather", [rows, which], (name, name, heads), table, axis=0)
    found = g.op("Transpose", [found], (heads, name, name), table, perm=(2, 0, 1))
    return g.op("Unsqueeze", [found, g.integers(0)], (1, heads, name, name), table)
