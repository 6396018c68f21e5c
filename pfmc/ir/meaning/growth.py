"""How large the result of an operator that can grow would get, before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from pfmc.errors import InputError
from pfmc.ir.meaning.arrays import Array

MOST = 1 << 27
"""Elements beyond which a folded or probed value is refused."""


def check(op_type: str, inputs: Sequence[Array | None], where: str) -> None:
    """Refuses to compute `op_type` on `inputs` if the result has more than `MOST` elements.

    Raises:
        InputError: it would have.
    """
    grower = _GROWERS.get(op_type)
    count = grower(inputs) if grower is not None else 0
    if count > MOST:
        raise InputError(f"{op_type} makes {count:.4g} elements; at most {MOST}", where=where)


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


_GROWERS: dict[str, Callable[[Sequence[Array | None]], float]] = {
    "ConstantOfShape": lambda inputs: _product(_numbers(inputs, 0)),
    "Expand": _expanded,
    "OneHot": _one_hot,
    "Pad": _padded,
    "Range": _counted,
    "Tile": _repeated,
}
