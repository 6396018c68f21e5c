"""The map between weights and conductances, and the conductances of one die.

One-sided differential pairs: a weight w of a tile column of scale s = max |w| is held by two
devices, of which one stays at g_min::

    g_plus  = g_min + (g_max - g_min) * max( w / s, 0)
    g_minus = g_min + (g_max - g_min) * max(-w / s, 0)
    w       = (g_plus - g_minus) / (g_max - g_min) * s          (the inverse)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pfmc.targets.base import Die
from pfmc.targets.crossbar.technology import Design

Floats = npt.NDArray[np.float32]

PLUS, MINUS, SCALE = "g_plus_siemens", "g_minus_siemens", "column_scale"
"""Names of the arrays in ``weights/<layer>.safetensors``: float32 ``[in, out]`` twice, and the
weight of a full conductance, float32 ``[row tiles, out]``."""


def column_scale(magnitude: Floats, row_edges: npt.NDArray[np.int32]) -> Floats:
    """Largest |w| of every tile column: float32 ``[row tiles, out]`` of |w| ``[in, out]``."""
    return np.stack([magnitude[a:b].max(axis=0) for a, b in pairwise(row_edges.tolist())])


def normalise(weights: Floats, scale: Floats) -> Floats:
    """w / s of one row of tiles: ``[rows, out]`` by ``[out]``; columns of zeros stay zero."""
    safe = np.where(scale > 0, scale, np.float32(1))
    return np.clip(weights / safe, -1, 1).astype(np.float32, copy=False)


def to_conductance(normalised: Floats, design: Design) -> tuple[Floats, Floats]:
    """g_plus and g_minus in siemens of normalised weights within ±1, any shape."""
    low, span = np.float32(design.g_min_s), np.float32(design.g_max_s - design.g_min_s)
    plus = np.maximum(normalised, 0)
    minus = plus - normalised
    plus *= span
    plus += low
    minus *= span
    minus += low
    return plus, minus


def to_normalised(plus: Floats, minus: Floats, design: Design) -> Floats:
    """The inverse of `to_conductance`."""
    difference: Floats = (plus - minus) / np.float32(design.g_max_s - design.g_min_s)
    return difference


def weights(
    tensors: Mapping[str, npt.NDArray[np.generic]], row_edges: npt.NDArray[np.int32],
    design: Design,
) -> Floats:  # fmt: skip
    """The weights that target conductances stand for: float32 ``[in, out]``."""
    plus, minus = tensors[PLUS].astype(np.float32), tensors[MINUS].astype(np.float32)
    scale = np.repeat(tensors[SCALE].astype(np.float32), np.diff(row_edges), axis=0)
    return to_normalised(plus, minus, design) * scale


@dataclass(frozen=True)
class DieConductances:
    """What the devices of one die hold: normalised conductances g / g_max, float32
    ``[2, in, out]``, plus first; `written` right after programming, `aged` at the die's age."""

    written: Floats
    aged: Floats

    def siemens(self, design: Design) -> Floats:
        """The aged conductances in siemens, as a SPICE deck of the die states them."""
        return self.aged * np.float32(design.g_max_s)


def die_conductances(
    tensors: Mapping[str, npt.NDArray[np.generic]], name: str, design: Design, die: Die
) -> DieConductances:
    """Draws the devices of layer `name` of `die`: simulation and emission see the same numbers.

    Raises:
        UsageError: the age or a conductance lies outside what the technology's laws hold for.
    """
    target = np.stack([tensors[PLUS], tensors[MINUS]]).astype(np.float32)
    target /= np.float32(design.g_max_s)
    written, aged = design.noise.device(target, die.seed, name, die.age_s)
    return DieConductances(written, aged)
