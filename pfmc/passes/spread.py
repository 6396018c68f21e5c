"""Keeps the largest directions of fixed linears in digital memory: passive glass delivers more.

Glass cannot amplify: a tile is ``W = sigma_max T``, so a reading's noise counts sigma_max times,
and the power that T delivers of a random input is its stable rank ``|W|_F² / sigma_max²`` over its
inputs (Miller, Opt. Express 21, 6360, 2013: singular values are the coupling strengths).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pfmc.hardware import Limits
from pfmc.ingest.adapters import SidePath
from pfmc.ir import matcher, vocabulary
from pfmc.ir.vocabulary import Stage
from pfmc.passes import weights
from pfmc.passes.adapters import put_beside
from pfmc.passes.base import Context, Declined, Pass, PassResult
from pfmc.passes.fabric_formats import rounded_columns

Doubles = npt.NDArray[np.float64]

_DIRECT = 1024  # smaller sides at most are decomposed directly
_SWEEPS = 12  # of the subspace iteration beyond
_SPARE = 8  # directions that it carries besides


@dataclass(frozen=True)
class Spread(Pass):
    """CANONICAL -> CANONICAL with the largest singular directions of fixed linears kept digital.

    ``FixedLinear(x, w, b)`` -> ``SidePath(x, FixedLinear(x, w - down @ up, b), down, up)``

    ``down @ up`` holds the k largest singular directions of the whole matrix, rounded as the
    fabric will hold them, so the sum equals the source. k is chosen for each layer: the one whose
    fall of the reading noise, ``sum over tiles of outputs sigma_max²`` in decibel, exceeds most
    what its numbers ask for. Runs after ``linears`` and ``ties``; is in no recipe of the shelf:
    what it is worth on `optical` stands in docs/optical.md.

    Attributes:
        rank: largest k; 0 changes nothing.
        worth: decibel that the side path must save for each percent of the layer's weights that
            it holds in writable memory, ``k (in + out)`` numbers.
    """

    name: ClassVar[str] = "spread"
    needs: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.CANONICAL

    rank: int = 4
    worth: float = 1.0

    def apply(self, model: ir.Model, context: Context) -> PassResult:
        """Works on one fixed linear after the other; each is read twice."""
        declined: list[Declined] = []
        notes: dict[str, float | int | str] = {"layers": 0, "parameters": 0}
        changed = held = 0
        for node in vocabulary.fixed_linears(model):
            name = str(node.name)
            weight = node.inputs[1]
            assert weight is not None
            assert weight.const_value is not None
            matrix = np.asarray(weight.const_value.numpy())
            best = self._best(matrix, context.limits)
            notes[name] = best.told()
            context.progress(f"spread: {name}: {best.told()}")
            if not best.rank:
                reason = f"no direction saves {self.worth:g} dB for a percent of the weights"
                declined.append(Declined(self.name, name, reason))
                continue
            _keep(model.graph, node, best)
            changed += 1
            held += best.rank * sum(matrix.shape)
        vocabulary.install(model)
        notes |= {"layers": changed, "parameters": held}
        return PassResult(model, changed, tuple(declined), notes)

    def _best(self, matrix: npt.NDArray[np.floating], limits: Limits | None) -> _Kept:
        whole = matrix.astype(np.float64)
        down, up = directions(whole, min(self.rank, *matrix.shape))
        tops = 2.0 ** (limits.fabric_bits - 1) - 1 if limits and limits.fabric_bits else 0.0
        none = np.zeros((matrix.shape[0], 0)), np.zeros((0, matrix.shape[1]))
        before = measure(whole, limits)
        found = _Kept(*none, before, before)
        percent = 100.0 * sum(matrix.shape) / matrix.size
        for k in range(1, down.shape[1] + 1):
            pair = _stored(down[:, :k], tops), _stored(up[:k], tops)
            kept = _Kept(*pair, before, measure(whole - pair[0] @ pair[1], limits))
            if kept.decibel - self.worth * percent * k > (
                found.decibel - self.worth * percent * found.rank
            ):
                found = kept
        return found


@dataclass(frozen=True)
class Light:
    """What passive tiles make of a matrix, all tiles alike.

    Attributes:
        noise: sum over tiles of outputs times sigma_max², the noise of all readings in units of
            the weights squared.
        stable_rank: mean of ``|W|_F² / sigma_max²``.
        power: mean share of a random input's power that leaves by the outputs.
    """

    noise: float
    stable_rank: float
    power: float


def measure(matrix: Doubles, limits: Limits | None) -> Light:
    """`Light` of ``[in, out]`` cut into the target's tiles; one tile without a target."""
    inputs, outputs = matrix.shape
    high = (limits.tile_inputs if limits else 0) or inputs
    wide = (limits.tile_outputs if limits else 0) or outputs
    noise, ranks, powers = 0.0, [], []
    for row in range(0, inputs, high):
        for column in range(0, outputs, wide):
            tile = matrix[row : row + high, column : column + wide]
            top = float(np.linalg.norm(tile, 2)) ** 2
            noise += top * tile.shape[1]
            rank = float((tile**2).sum()) / top if top > 0 else 0.0
            ranks.append(rank)
            powers.append(rank / len(tile))
    return Light(noise, float(np.mean(ranks)), float(np.mean(powers)))


@dataclass(frozen=True)
class _Kept:
    down: Doubles
    up: Doubles
    before: Light
    after: Light

    @property
    def rank(self) -> int:
        return int(self.down.shape[1])

    @property
    def decibel(self) -> float:
        """How far the noise of reading falls."""
        if not self.before.noise:
            return 0.0
        return -10.0 * float(np.log10(max(self.after.noise / self.before.noise, 1e-30)))

    def told(self) -> str:
        a, b = self.before, self.after
        return (
            f"rank {self.rank}, stable rank {a.stable_rank:.2f} -> {b.stable_rank:.2f}, power "
            f"{a.power:.4f} -> {b.power:.4f}, reading noise {-self.decibel:.2f} dB"
        )


def directions(matrix: Doubles, rank: int) -> tuple[Doubles, Doubles]:
    """The largest singular directions: ``down[in, rank]`` and ``up[rank, out]``, each times √s.

    Directly where the smaller side is at most 1,024, else by subspace iteration (Halko, Martinsson
    and Tropp, SIAM Review 53, 2011, algorithm 4.4).
    """
    if min(matrix.shape) <= _DIRECT:
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
    else:
        start = np.random.default_rng(0).normal(size=(matrix.shape[1], rank + _SPARE))
        basis, _ = np.linalg.qr(matrix @ start)
        for _ in range(_SWEEPS):
            other, _ = np.linalg.qr(matrix.T @ basis)
            basis, _ = np.linalg.qr(matrix @ other)
        small, values, right = np.linalg.svd(basis.T @ matrix, full_matrices=False)
        left = basis @ small
    root = np.sqrt(values[:rank])
    return left[:, :rank] * root, root[:, None] * right[:rank]


def _stored(factor: Doubles, top: float) -> Doubles:
    """A factor as the fabric holds it."""
    single = factor.astype(np.float32)
    return (rounded_columns(single, top) if top else single).astype(np.float64)


def _keep(graph: ir.Graph, node: ir.Node, kept: _Kept) -> None:
    weight = node.inputs[1]
    assert weight is not None
    rest = weights.derived(
        graph, weight, weights.shape_of(weight),
        lambda w: (w.astype(np.float64) - kept.down @ kept.up).astype(w.dtype),
    )  # fmt: skip
    node.replace_input_with(1, rest)
    if not weight.uses() and not weight.is_graph_output():
        graph.initializers.pop(str(weight.name), None)
    down, up = (ir.tensor(part.astype(np.float32)) for part in (kept.down, kept.up))
    path = put_beside(graph, node, SidePath(str(node.name), down, up, 1.0))
    path.metadata_props[vocabulary.KEY_SPREAD] = "1"
    path.name = matcher.unique_name(graph, f"{node.name}:spread")
