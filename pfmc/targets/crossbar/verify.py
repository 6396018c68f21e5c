"""Checks of one layer's emitted conductances against its tensors and its tile table."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pfmc.targets.base import Check, StoredLinear
from pfmc.targets.crossbar import emit, tiling
from pfmc.targets.crossbar.conductance import MINUS, PLUS, SCALE, to_normalised
from pfmc.targets.crossbar.technology import Design

_ROUNDING = 1e-6
"""Relative rounding of float32 conductances."""


def verify(stored: StoredLinear, hardware: Path, design: Design) -> list[Check]:
    """What must hold of a crossbar layer; values are numbers of violations unless named otherwise.

    `hardware` is the artifact's ``hardware/`` folder. The CSV is checked where the layer is small
    enough to have one; a missing file fails.
    """
    plus, minus = (np.asarray(stored.tensors[k], np.float32) for k in (PLUS, MINUS))
    low = np.minimum(plus, minus)
    slack = _ROUNDING * design.g_max_s
    checks = [
        Check("conductances outside g_min..g_max", _outside(plus, minus, design, slack), 0.0),
        Check("pairs with both devices above g_min", _over(low, design.g_min_s + slack), 0.0),
        Check("weights covered other than once by the tiles", _cover(stored), 0.0),
        Check("distance of a tile column's peak from g_max", _peaks(stored, design), 1e-5),
    ]
    if plus.size <= emit.LARGEST:
        checks.append(Check("conductances that differ in CSV", _csv(stored, hardware), 0.0))
    return checks


def _over(values: np.typing.NDArray[np.float32], limit: float) -> float:
    return float(np.count_nonzero(~(values <= limit)))


def _outside(
    plus: np.typing.NDArray[np.float32], minus: np.typing.NDArray[np.float32],
    design: Design, slack: float,
) -> float:  # fmt: skip
    return sum(
        _over(g, design.g_max_s + slack) + _over(-g, slack - design.g_min_s) for g in (plus, minus)
    )


def _cover(stored: StoredLinear) -> float:
    seen = np.zeros((stored.inputs, stored.outputs), np.int16)
    columns = (stored.tiles[k].tolist() for k in ("row0", "col0", "rows", "cols"))
    for row0, col0, rows, cols in zip(*columns, strict=True):
        seen[row0 : row0 + rows, col0 : col0 + cols] += 1
    return float(np.count_nonzero(seen != 1))


def _peaks(stored: StoredLinear, design: Design) -> float:
    """Largest |peak - 1| over tile columns that hold any weight."""
    plus, minus = (np.asarray(stored.tensors[k], np.float32) for k in (PLUS, MINUS))
    scale = np.asarray(stored.tensors[SCALE], np.float32)
    magnitude = np.abs(to_normalised(plus, minus, design))
    edges = tiling.from_table(stored.tiles, stored.inputs, stored.outputs).row_edges
    peaks = np.maximum.reduceat(magnitude, edges[:-1], axis=0)
    return float(np.abs(np.where(scale > 0, peaks - 1, peaks)).max())


def _csv(stored: StoredLinear, hardware: Path) -> float:
    file = hardware / emit.path(stored.name)
    if not file.is_file():
        return float(stored.inputs * stored.outputs)
    plus, minus = emit.read(file.read_bytes(), (stored.inputs, stored.outputs))
    return float(
        np.count_nonzero((plus != stored.tensors[PLUS]) | (minus != stored.tensors[MINUS]))
    )
