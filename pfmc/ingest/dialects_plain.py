"""Lowers the operators of com.microsoft that the standard has under this or another name."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pfmc.ingest.lowering import Lowering, last_dim, rank

_MANY = 1 << 22  # places that windows are gathered from


def renamed(op_type: str) -> Callable[[Lowering], None]:
    """The standard operator `op_type` with the same inputs and attributes."""

    def lower_renamed(low: Lowering) -> None:
        attributes = {name: found.value for name, found in low.node.attributes.items()}
        count = len(low.node.outputs)
        low.done(*low.build.ops(op_type, list(low.node.inputs), attributes, outputs=count))

    lower_renamed.__doc__ = f"The standard {op_type}."
    return lower_renamed


def echo(low: Lowering) -> None:
    """Nothing: the output is the input."""
    low.done(low.build.op("Identity", [low.need(0, "X")]))


def expand_dims(low: Lowering) -> None:
    """Unsqueeze at a constant axis."""
    axis = low.array(low.input(1), "axis").reshape(-1)
    low.done(low.build.op("Unsqueeze", [low.need(0, "X"), low.ints(*(int(a) for a in axis))]))


def pad(low: Lowering) -> None:
    """Pad of constant extents."""
    extents = low.array(low.input(1), "pads").reshape(-1)
    operands = [low.need(0, "data"), low.ints(*(int(n) for n in extents))]
    if (value := low.input(2)) is not None:
        operands.append(low.number_of(value))
    low.done(low.build.op("Pad", operands, {"mode": low.word("mode", "constant")}))


def count_up(low: Lowering) -> None:
    """Range; its step is 1 if none is given."""
    start, limit = (low.number_of(low.need(i, n)) for i, n in enumerate(("start", "limit")))
    step, kind = low.input(2), start.dtype or low.need(0, "start").dtype
    if step is None and kind is None:
        raise low.refuse("the element type is unknown")
    if step is None:
        assert kind is not None
        step = low.build.constant(np.array(1, kind.numpy()))
    else:
        step = low.number_of(step)
    low.done(low.build.op("Range", [start, limit, step]))


def unfold(low: Lowering) -> None:
    """Gather of every window of an axis of known length."""
    value, axis = low.need(0, "input"), low.integer("dim", -1)
    size, step, axes = low.positive("size"), low.integer("step", 1), rank(value)
    if axes is None or step <= 0:
        raise low.refuse("the shape of the input is unknown")
    axis %= axes
    length = last_dim(value) if axis == axes - 1 else value.shape and value.shape[axis]
    if not isinstance(length, int):
        raise low.refuse("the length of the unfolded axis is unknown")
    if size > length:
        raise low.refuse(f"windows of {size} of an axis of {length}")
    if size * ((length - size) // step + 1) > _MANY:
        raise low.refuse(f"windows of {size} of an axis of {length} are too many")
    starts = np.arange(0, length - size + 1, step)
    places = low.build.constant((starts[:, None] + np.arange(size)[None]).astype(np.int64))
    found = low.build.op("Gather", [value, places], {"axis": axis})
    perm = [i for i in range(axes + 1) if i != axis + 1]
    low.done(low.transpose(found, [*perm, axis + 1]))
