"""Writes the target conductances of small layers as CSV, readable by any tool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pfmc.targets.crossbar.conductance import MINUS, PLUS

LARGEST: Final = 16_384
"""Weights of the largest layer that is also written as CSV; all layers are in safetensors."""


def path(name: str) -> str:
    """Where the conductances of layer `name` lie under ``hardware/``."""
    return f"conductances/{name}.csv"


def files(name: str, tensors: Mapping[str, npt.NDArray[Any]]) -> dict[str, bytes]:
    """``conductances/<layer>.csv`` of a small layer, or nothing.

    Header ``input,output,g_plus_siemens,g_minus_siemens``; one line a weight, inputs outermost;
    nine significant digits, which float32 survives unchanged.
    """
    plus, minus = tensors[PLUS], tensors[MINUS]
    if plus.size > LARGEST:
        return {}
    lines = ["input,output,g_plus_siemens,g_minus_siemens"]
    for i, (row_plus, row_minus) in enumerate(zip(plus.tolist(), minus.tolist(), strict=True)):
        lines += [
            f"{i},{o},{p:.9g},{m:.9g}"
            for o, (p, m) in enumerate(zip(row_plus, row_minus, strict=True))
        ]
    return {path(name): ("\n".join(lines) + "\n").encode()}


def read(body: bytes, shape: tuple[int, int]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """g_plus and g_minus, float32 ``shape``, from a CSV written by `files`.

    Raises:
        ValueError: the text is not such a table of that shape.
    """
    rows = np.loadtxt(body.decode().splitlines()[1:], delimiter=",", ndmin=2)
    index = rows[:, 0] * shape[1] + rows[:, 1]
    if len(rows) != shape[0] * shape[1] or not np.array_equal(index, np.arange(len(rows))):
        raise ValueError(f"the conductances do not form a matrix of {shape[0]} x {shape[1]}")
    plus, minus = (rows[:, k].astype(np.float32).reshape(shape) for k in (2, 3))
    return plus, minus
