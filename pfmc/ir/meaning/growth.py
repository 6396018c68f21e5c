"""How large the result of an operator that can grow would get, before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from pfmc.errors import InputError
from pfmc.ir.meaning.arrays import Array
from pfmc.ir.meaning.elementwise import ELEMENTWISE

MOST = 1 << 27
"""Elements beyond which a folded or probed value is refused."""

MOST_BYTES = 1 << 29
"""Bytes beyond which a folded or probed value that is written out is refused."""


def check(op_type: str, inputs: Sequence[Array | None], where: str, axis: int = 0) -> None:
    """Refuses to compute `op_type` on `inputs` if the result has more than `MOST` elements.

    Args:
        op_type: the operator; inputs: its inputs; where: the node, for the message.
        axis: the attribute of that name of Gather.

    Raises:
        InputError: it would have, or, in numpy, more than `MOST_BYTES` bytes.
    """
    first = inputs[0] if inputs else None
    written = isinstance(first, np.ndarray)  # a training library's own tensors are its own affair
    grower = _GROWERS.get(op_type) or (_JOINERS.get(op_type) if written else None)
    if grower is not None:
        count = grower(inputs)
    elif written and op_type == "Gather":
        count = float(math.prod(gathered(inputs, axis)))
    else:
        count = _joined(inputs) if written and ("", op_type) in ELEMENTWISE else 0.0
    size = first.dtype.itemsize if isinstance(first, np.ndarray) and op_type not in _VIEWS else 0
    most = min(MOST, MOST_BYTES // max(1, size))
    if count > most:
        raise InputError(f"{op_type} makes {count:.4g} elements; at most {most}", where=where)


def gathered(inputs: Sequence[Array | None], axis: int) -> tuple[int, ...]:
    """The shape that Gather gives; ``()`` where its inputs are not what it takes."""
    data, places = (*inputs, None, None)[:2]
    if data is None or places is None or not -len(data.shape) <= axis < len(data.shape):
        return ()
    at = axis % len(data.shape)
    return (*data.shape[:at], *places.shape, *data.shape[at + 1 :])


def product(left: Sequence[int], right: Sequence[int]) -> tuple[int, ...]:
    """The shape of a matrix product of these shapes; ``()`` where they do not fit."""
    if not left or not right or left[-1] != right[max(0, len(right) - 2)]:
        return ()
    try:
        stack = np.broadcast_shapes(tuple(left[:-2]), tuple(right[:-2]))
    except ValueError:
        return ()
    return (*stack, *left[-2:-1], *(right[-1:] if len(right) > 1 else ()))


def broadcast(inputs: Sequence[Array | None]) -> tuple[int, ...]:
    """The shape of `inputs` broadcast against each other; ``()`` where they do not fit."""
    try:
        return np.broadcast_shapes(*(tuple(x.shape) for x in inputs if x is not None))
    except ValueError:
        return ()


def _joined(inputs: Sequence[Array | None]) -> float:
    """How many elements `inputs` have, broadcast against each other."""
    shapes = {tuple(x.shape) for x in inputs if x is not None}
    return 0.0 if len(shapes) < 2 else float(math.prod(broadcast(inputs)))


def _multiplied(inputs: Sequence[Array | None]) -> float:
    left, right = (*inputs, None, None)[:2]
    if left is None or right is None:
        return 0.0
    return float(math.prod(product(left.shape, right.shape)))


def check_empty(op_type: str, results: Sequence[Array | None], where: str) -> None:
    """Refuses an empty result with sides so long that a loop over them does not end.

    Raises:
        InputError: it has.
    """
    for result in results:
        if result is not None and 0 in result.shape and _product(result.shape) > MOST:
            raise InputError(f"{op_type} makes an empty tensor {tuple(result.shape)}", where=where)


def _size(inputs: Sequence[Array | None]) -> float:
    first = inputs[0] if inputs else None
    return float(math.prod(first.shape)) if first is not None else 0.0


def _numbers(inputs: Sequence[Array | None], position: int) -> list[float]:
    array = inputs[position] if position < len(inputs) else None
    return [] if array is None else [float(x) for x in np.asarray(array).reshape(-1)[:64]]


def _product(numbers: Sequence[float]) -> float:
    """Elements of these sides; a side of 0 counts as 1, for what reads it loops over the others."""
    return math.prod(max(abs(x), 1.0) for x in numbers)


def _repeated(inputs: Sequence[Array | None]) -> float:
    return _size(inputs) * _product(_numbers(inputs, 1))


def _expanded(inputs: Sequence[Array | None]) -> float:
    first, wanted = inputs[0], _numbers(inputs, 1)
    dims = [float(d) for d in first.shape] if first is not None else []
    fill = max(len(dims), len(wanted))
    sides = ([1.0] * (fill - len(x)) + x for x in (dims, wanted))
    return _product([max(a, b) for a, b in zip(*sides, strict=True)])


def _counted(inputs: Sequence[Array | None]) -> float:
    ends = [_numbers(inputs, i) for i in range(3)]
    if any(len(e) != 1 for e in ends) or ends[2][0] == 0:
        return 0.0
    return (ends[1][0] - ends[0][0]) / ends[2][0]


def _padded(inputs: Sequence[Array | None]) -> float:
    first, pads = inputs[0], _numbers(inputs, 1)
    dims = [float(d) for d in first.shape] if first is not None else []
    half = len(pads) // 2
    axes = _numbers(inputs, 3) if len(inputs) > 3 else []
    places = [int(a) for a in axes] if axes else list(range(half))
    for place, before, after in zip(places, pads[:half], pads[half:], strict=False):
        if -len(dims) <= place < len(dims):
            dims[place] = max(0.0, dims[place] + before + after)
    return _product(dims)


def _one_hot(inputs: Sequence[Array | None]) -> float:
    return _size(inputs) * _product(_numbers(inputs, 1))


def _found(inputs: Sequence[Array | None]) -> float:
    """The indices of every element, of int64 and twice on the way, as elements of four bytes."""
    first = inputs[0] if inputs else None
    return 0.0 if first is None else 8 * _size(inputs) * max(1, len(first.shape))


_VIEWS = frozenset({"Expand"})
_GROWERS: dict[str, Callable[[Sequence[Array | None]], float]] = {
    "ConstantOfShape": lambda inputs: _product(_numbers(inputs, 0)),
    "Expand": _expanded,
    "OneHot": _one_hot,
    "Pad": _padded,
    "Range": _counted,
    "Tile": _repeated,
}
_JOINERS: dict[str, Callable[[Sequence[Array | None]], float]] = {
    "MatMul": _multiplied,
    "NonZero": _found,
}
