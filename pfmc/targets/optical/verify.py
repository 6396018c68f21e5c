"""Checks of a stored optical layer from its tensors alone: passive, faithful, energy conserved."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pfmc.hardware import QuantisedMatrix
from pfmc.targets.base import Check, StoredLinear
from pfmc.targets.optical import physics, tiling
from pfmc.technology import Technology

Floats = npt.NDArray[np.float64]


def verify(stored: StoredLinear, technology: Technology) -> list[Check]:
    """The checks of one layer.

    ``spectral norm`` <= 1 by singular values of every tile; ``weights`` largest difference of
    T x scale x sigma_max from the quantised matrix, over its largest weight; ``energy`` largest
    output over input power of probing fields (the leading right singular vector's estimate and
    random ones); ``power fraction`` of the table against |T|_F² / inputs.
    """
    transfer = np.asarray(stored.tensors["transfer"], dtype=np.float64)
    return [
        Check("spectral norm", physics.passive_excess(transfer), 1.0),
        Check("weights", weight_error(stored, transfer, technology), 1e-5),
        Check("energy", energy_ratio(transfer), 1.0),
        Check("power fraction", _power_error(stored, transfer), 1e-5),
    ]


def asked(stored: StoredLinear) -> npt.NDArray[np.float32]:
    """The quantised matrix the tiles were made from, float32 ``[in, out]``."""
    codes = np.asarray(stored.tensors["codes"], dtype=np.int8)
    scale = np.asarray(stored.tensors["scale"], dtype=np.float32)
    return QuantisedMatrix(codes, 8, scale, int(stored.tensors["code_group"][0])).weights()


def weight_error(stored: StoredLinear, transfer: Floats, technology: Technology) -> float:
    """Largest |T scale sigma_max - W| over the largest |W| (or over 1 where all are zero)."""
    tiles = tiling.grid(stored.inputs, stored.outputs, technology)
    scale, sigma = (np.asarray(stored.tiles[k], np.float64) for k in ("scale", "sigma_max"))
    gain = scale * sigma
    built = tiles.join(transfer * gain[:, None, None])
    wanted = asked(stored).astype(np.float64)
    largest = float(np.abs(wanted).max(initial=0.0))
    return float(np.abs(built - wanted).max(initial=0.0)) / (largest or 1.0)


def energy_ratio(transfer: Floats, steps: int = 8) -> float:
    """Largest output power over input power for fields that seek it: power iterations from all-one
    and alternating fields; every iterate is a real input, so a value above 1 proves gain."""
    size = transfer.shape[1]
    start = np.stack([np.ones(size), (-1.0) ** np.arange(size)])
    field = np.broadcast_to(start / np.sqrt(size), (len(transfer), 2, size))
    largest = 0.0
    for _ in range(steps):
        out = field @ transfer
        largest = max(largest, float((out**2).sum(axis=2).max(initial=0.0)))
        back = out @ transfer.transpose(0, 2, 1)
        length = np.linalg.norm(back, axis=2, keepdims=True)
        field = np.divide(back, length, out=np.zeros_like(back), where=length > 0.0)
    return largest


def _power_error(stored: StoredLinear, transfer: Floats) -> float:
    rows, stated = (np.asarray(stored.tiles[k], np.float64) for k in ("rows", "power_fraction"))
    fraction = np.einsum("tio,tio->t", transfer, transfer) / rows
    return float(np.abs(fraction - stated).max(initial=0.0))
