"""Operators that select by index and operators that reduce an axis."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from pfmc.ir.meaning.arrays import integers
from pfmc.ir.meaning.attributes import Array, Arrays, Maker, Run, integer, sequence, text


def _gather(node: ir.Node, xp: Arrays) -> Run:
    axis = integer(node, "axis", 0)
    if axis == 0:
        return lambda x, indices: x[xp.index(indices, x)]

    def run(x: Array, indices: Array) -> Array:
        before = [slice(None)] * (axis % len(x.shape))
        return x[(*before, xp.index(indices, x))]

    return run


def _gather_elements(node: ir.Node, xp: Arrays) -> Run:
    axis = integer(node, "axis", 0)
    return lambda x, indices: xp.take_along(x, indices, axis % len(x.shape))


def _batch_grid(x: Array, indices: Array, batch: int, xp: Arrays) -> tuple[Array, ...]:
    """One index array for each batch axis, shaped to broadcast against ``indices[..., 0]``."""
    rank = len(indices.shape) - 1
    shapes = [[-1 if d == axis else 1 for d in range(rank)] for axis in range(batch)]
    return tuple(xp.reshape(xp.arange(x.shape[a], x), shapes[a]) for a in range(batch))


def _columns(indices: Array, like: Array, xp: Arrays) -> tuple[Array, ...]:
    return tuple(xp.index(indices[..., d], like) for d in range(indices.shape[-1]))


def _gather_nd(node: ir.Node, xp: Arrays) -> Run:
    batch = integer(node, "batch_dims", 0)

    def run(x: Array, indices: Array) -> Array:
        return x[(*_batch_grid(x, indices, batch, xp), *_columns(indices, x, xp))]

    return run


def _scatter_nd(node: ir.Node, xp: Arrays) -> Run:
    how = text(node, "reduction", "none")
    return lambda x, indices, updates: xp.put(x, _columns(indices, x, xp), updates, how)


def _scatter_elements(node: ir.Node, xp: Arrays) -> Run:
    axis, how = integer(node, "axis", 0), text(node, "reduction", "none")

    def run(x: Array, indices: Array, updates: Array) -> Array:
        rank = len(x.shape)
        place = []
        for d in range(rank):
            shape = [-1 if e == d else 1 for e in range(rank)]
            place.append(xp.reshape(xp.arange(indices.shape[d], x), shape))
        place[axis % rank] = xp.index(indices, x)
        return xp.put(x, tuple(place), updates, how)

    return run


def _cumsum(node: ir.Node, xp: Arrays) -> Run:
    exclusive, reverse = integer(node, "exclusive", 0), integer(node, "reverse", 0)

    def run(x: Array, axis: Array) -> Array:
        along = int(axis.item())
        x = xp.flip(x, along) if reverse else x
        total = xp.cumsum(x, along)
        total = total - x if exclusive else total
        return xp.flip(total, along) if reverse else total

    return run


def _top_k(node: ir.Node, xp: Arrays) -> Run:
    axis, largest = integer(node, "axis", -1), bool(integer(node, "largest", 1))

    def run(x: Array, k: Array) -> tuple[Array, Array]:
        order = xp.argsort(x, axis, largest)
        kept = xp.split(order, [int(k.item()), x.shape[axis] - int(k.item())], axis)[0]
        return xp.take_along(x, kept, axis % len(x.shape)), kept

    return run


def _arg(greatest: bool) -> Maker:
    def make(node: ir.Node, xp: Arrays) -> Run:
        axis, keep = integer(node, "axis", 0), integer(node, "keepdims", 1) == 1
        last = integer(node, "select_last_index", 0)

        def run(x: Array) -> Array:
            if not greatest:  # -x has no place for the least integer, nor for unsigned ones
                x = -x if "float" in str(x.dtype) else ~x
            found = xp.argmax(xp.flip(x, axis) if last else x, axis)
            found = x.shape[axis] - 1 - found if last else found
            shape = [1 if d == axis % len(x.shape) else n for d, n in enumerate(x.shape)]
            return xp.reshape(found, shape) if keep else found

        return run

    return make


def _non_zero(node: ir.Node, xp: Arrays) -> Run:
    return xp.nonzero


def _one_hot(node: ir.Node, xp: Arrays) -> Run:
    axis = integer(node, "axis", -1)

    def run(indices: Array, depth: Array, values: Array) -> Array:
        count = integers(depth)[0]
        along = axis % (len(indices.shape) + 1)
        grid = [1] * (len(indices.shape) + 1)
        grid[along] = count
        shape = list(indices.shape)
        shape.insert(along, 1)
        indices = xp.reshape(xp.where(indices < 0, indices + count, indices), shape)
        hit = indices == xp.reshape(xp.arange(count, indices), grid)
        return xp.where(hit, values[1], values[0])

    return run


def _reduce(body: Callable[[Arrays, Array, tuple[int, ...], bool], Array]) -> Maker:
    def make(node: ir.Node, xp: Arrays) -> Run:
        keep, fixed = integer(node, "keepdims", 1) == 1, sequence(node, "axes")
        lazy = bool(integer(node, "noop_with_empty_axes", 0))

        def run(x: Array, axes: Array | None = None) -> Array:
            where = fixed if axes is None else integers(axes)
            if not where:
                where = [] if lazy else list(range(len(x.shape)))
            return body(xp, x, tuple(where), keep) if where or len(x.shape) == 0 else x

        return run

    return make


def _log_sum_exp(xp: Arrays, x: Array, axes: tuple[int, ...], keep: bool) -> Array:
    peak = xp.max(x, axes, True)
    total = xp.log(xp.sum(xp.exp(x - peak), axes, True)) + peak
    return total if keep else xp.max(total, axes, False)


SELECTING: dict[tuple[str, str], Maker] = {
    ("", "ArgMax"): _arg(True),
    ("", "ArgMin"): _arg(False),
    ("", "CumSum"): _cumsum,
    ("", "Gather"): _gather,
    ("", "GatherElements"): _gather_elements,
    ("", "GatherND"): _gather_nd,
    ("", "NonZero"): _non_zero,
    ("", "OneHot"): _one_hot,
    ("", "ReduceL1"): _reduce(lambda xp, x, a, k: xp.sum(xp.abs(x), a, k)),
    ("", "ReduceL2"): _reduce(lambda xp, x, a, k: xp.sqrt(xp.sum(x * x, a, k))),
    ("", "ReduceLogSumExp"): _reduce(_log_sum_exp),
    ("", "ReduceMax"): _reduce(lambda xp, x, a, k: xp.max(x, a, k)),
    ("", "ReduceMean"): _reduce(lambda xp, x, a, k: xp.mean(x, a, k)),
    ("", "ReduceMin"): _reduce(lambda xp, x, a, k: xp.min(x, a, k)),
    ("", "ReduceProd"): _reduce(lambda xp, x, a, k: xp.prod(x, a, k)),
    ("", "ReduceSum"): _reduce(lambda xp, x, a, k: xp.sum(x, a, k)),
    ("", "ReduceSumSquare"): _reduce(lambda xp, x, a, k: xp.sum(x * x, a, k)),
    ("", "ScatterElements"): _scatter_elements,
    ("", "ScatterND"): _scatter_nd,
    ("", "TopK"): _top_k,
}
