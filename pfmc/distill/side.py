"""Closed forms of what corrects a fixed layer: gain and offset, and the best low-rank path.

The layer computes ``y = x @ M + c`` where ``x @ W + b`` was meant. Corrected it computes
``gain * y + offset + (x @ down) @ up``. What is minimised is the mean square of the remaining error
over real inputs, which only needs their mean and their covariance S: an error matrix R costs
trace(Rᵀ S R), so its best approximation of rank r is a truncated SVD of S^(1/2) R (EoRA, Liu et al.
2024, arXiv:2410.21271; by Eckart and Young), here with a weight for every output besides.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]

TOP = 127.0
"""Largest code of a factor in the fabric's 8-bit memory."""
RIDGE = 1e-6
"""Of the mean variance: directions that no input has cost nothing, and are not used."""
_ROUNDS = 4  # gain and path are each optimal for the other in turn


@dataclass(frozen=True)
class Side:
    """The correction beside one layer.

    Attributes:
        gain, offset: ``[out]``; down ``[in, rank]``; up ``[rank, out]``; the rank may be 0.
    """

    gain: Floats
    offset: Floats
    down: Floats
    up: Floats

    @property
    def rank(self) -> int:
        """Width of the low-rank path."""
        return int(self.down.shape[1])

    @property
    def parameters(self) -> int:
        """Numbers held: gain, offset and both factors."""
        return int(self.gain.size + self.offset.size + self.down.size + self.up.size)

    @staticmethod
    def none(inputs: int, outputs: int, rank: int = 0) -> Side:
        """What changes nothing."""
        return Side(
            np.ones(outputs, np.float32), np.zeros(outputs, np.float32),
            np.zeros((inputs, rank), np.float32), np.zeros((rank, outputs), np.float32),
        )  # fmt: skip

    def stored(self) -> Side:
        """As the fabric's memory holds it: 8-bit factors with a scale a column, 16-bit trims."""
        half = [np.asarray(v, np.float16).astype(np.float32) for v in (self.gain, self.offset)]
        return Side(half[0], half[1], _columns(self.down), _columns(self.up))


def _columns(matrix: Floats) -> Floats:
    if not matrix.size:
        return matrix.astype(np.float32)
    peak = np.abs(matrix).max(axis=0, keepdims=True)
    scale = (np.where(peak > 0, peak, 1.0) / TOP).astype(np.float32)
    return np.asarray(np.round(matrix / scale) * scale, np.float32)


@dataclass(frozen=True)
class Moments:
    """Mean ``[in]`` and covariance ``[in, in]`` of a layer's inputs."""

    mean: Array
    covariance: Array

    @staticmethod
    def of(rows: npt.NDArray[np.floating]) -> Moments:
        """Of rows ``[N, in]``."""
        held = np.asarray(rows, np.float64)
        mean = held.mean(axis=0)
        centred = held - mean
        return Moments(mean, centred.T @ centred / len(held))


@dataclass(frozen=True)
class Plant:
    """A layer as it is and as it was meant: matrix ``[in, out]``, constant ``[out]``, of each."""

    matrix: Array
    constant: Array
    wanted: Array
    bias: Array


def gain_of(plant: Plant, moments: Moments, path: Array | None = None) -> Array:
    """The gain ``[out]`` of least squares; `path` ``[in, out]`` is what stands beside already.

    An output that never varies keeps gain 1.
    """
    want = plant.wanted if path is None else plant.wanted - path
    spread = moments.covariance @ plant.matrix
    power = np.einsum("io,io->o", plant.matrix, spread)
    shared = np.einsum("io,io->o", want, spread)
    small = 1e-12 * max(float(power.max(initial=0.0)), 1e-300)
    gain: Array = np.divide(shared, power, out=np.ones_like(power), where=power > small)
    return gain


def offset_of(plant: Plant, moments: Moments, gain: Array, path: Array) -> Array:
    """The offset ``[out]`` that leaves no mean error."""
    meant = moments.mean @ (plant.wanted - path) + plant.bias
    return np.asarray(meant - gain * (moments.mean @ plant.matrix + plant.constant))


@dataclass(frozen=True)
class Spectrum:
    """The weighted SVD of an error: factors of every rank are its first columns.

    Attributes:
        values: singular values, falling; removed[i] = values[i]² is what rank i + 1 removes.
        left: ``[in, k]``, right: ``[k, out]``: ``left[:, :r] @ right[:r]`` is the best of rank r.
    """

    values: Array
    left: Array
    right: Array

    def factors(self, rank: int) -> tuple[Array, Array]:
        """down ``[in, rank]`` and up ``[rank, out]``, equally large."""
        down, up = self.left[:, :rank], self.right[:rank]
        norms = [np.sqrt(np.mean(np.square(m), axis=a)) for m, a in ((down, 0), (up, 1))]
        ratio = np.sqrt(norms[1] / np.maximum(norms[0], 1e-300))
        ratio = np.where((norms[0] > 0) & (norms[1] > 0), ratio, 1.0)
        return down * ratio, up / ratio[:, None]


def spectrum(error: Array, covariance: Array, importance: Array | None = None) -> Spectrum:
    """SVD of ``S^(1/2) R diag(importance)^(1/2)``, mapped back.

    Args:
        error: R ``[in, out]``; covariance: S ``[in, in]``.
        importance: weight ``[out]`` of each output's squared error; all 1 by default.
    """
    root, inverse = _roots(covariance)
    scale = np.ones(error.shape[1]) if importance is None else np.sqrt(importance)
    scale = np.maximum(scale, 1e-6 * max(float(scale.max(initial=0.0)), 1e-300))
    left, values, right = np.linalg.svd(root @ error * scale, full_matrices=False)
    signs = np.sign(left[np.abs(left).argmax(axis=0), np.arange(left.shape[1])])
    signs[signs == 0] = 1.0
    half = np.sqrt(values)
    return Spectrum(
        values, inverse @ (left * signs) * half, half[:, None] * (right * signs[:, None]) / scale
    )


def _roots(covariance: Array) -> tuple[Array, Array]:
    """S^(1/2) and its inverse, of S with a little added to its diagonal."""
    size = len(covariance)
    ridge = RIDGE * float(np.trace(covariance)) / size or 1.0
    values, vectors = np.linalg.eigh(covariance + ridge * np.eye(size))
    values = np.sqrt(np.maximum(values, ridge))
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


def fit(
    plant: Plant, moments: Moments, rank: int, importance: Array | None = None
) -> tuple[Side, Spectrum]:
    """The correction of rank `rank`, and the spectrum of what a gain alone leaves."""
    path = np.zeros_like(plant.wanted)
    gain = gain_of(plant, moments)
    found = first = spectrum(plant.wanted - plant.matrix * gain, moments.covariance, importance)
    down, up = found.factors(rank)
    for _ in range(_ROUNDS if 0 < rank < min(plant.matrix.shape) else 0):
        path = down @ up
        gain = gain_of(plant, moments, path)
        found = spectrum(plant.wanted - plant.matrix * gain, moments.covariance, importance)
        down, up = found.factors(rank)
    path = down @ up
    gain = gain_of(plant, moments, path) if rank else gain
    offset = offset_of(plant, moments, gain, path)
    return Side(*(np.asarray(v, np.float32) for v in (gain, offset, down, up))), first


def refit_gain(plant: Plant, moments: Moments, side: Side) -> Side:
    """Gain and offset anew, the path as it is: the cheap procedure after some drift."""
    path = np.asarray(side.down, np.float64) @ np.asarray(side.up, np.float64)
    gain = gain_of(plant, moments, path)
    offset = offset_of(plant, moments, gain, path)
    return replace(side, gain=gain.astype(np.float32), offset=offset.astype(np.float32))


def allocate(
    removed: Mapping[str, Sequence[float]], sizes: Mapping[str, tuple[int, int]], budget: int
) -> dict[str, int]:
    """Ranks by layer: each next rank goes where it removes most error a parameter.

    Args:
        removed: layer -> what its first, second … rank removes, falling.
        sizes: layer -> (inputs, outputs); a rank costs their sum.
        budget: parameters of all factors together.
    """
    ranks = dict.fromkeys(removed, 0)
    waiting = [(-_worth(removed[n], 0, sizes[n]), n) for n in removed if len(removed[n])]
    heapq.heapify(waiting)
    while waiting:
        worth, name = heapq.heappop(waiting)
        cost = sum(sizes[name])
        if worth >= 0.0 or cost > budget:
            continue
        budget -= cost
        ranks[name] += 1
        if ranks[name] < len(removed[name]):
            heapq.heappush(waiting, (-_worth(removed[name], ranks[name], sizes[name]), name))
    return ranks


def _worth(removed: Sequence[float], rank: int, size: tuple[int, int]) -> float:
    return float(removed[rank]) / sum(size)
