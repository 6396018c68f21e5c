"""Rotates the residual stream and the values of attention, folded into the weights around them.

Orthogonal matrices leave norms and products as they are (QuaRot arXiv:2404.00456, SpinQuant
arXiv:2405.16406), while they spread single large numbers over all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pfmc.errors import UsageError
from pfmc.hadamard import Rotation, rotation
from pfmc.ir import matcher, provenance, stored, vocabulary
from pfmc.ir.vocabulary import Stage
from pfmc.noise import generator
from pfmc.passes import residual, value_heads, weights
from pfmc.passes.base import Context, Declined, Pass, PassResult
from pfmc.passes.residual import Reader, Refused, Stream
from pfmc.passes.ties import KEY_TIED, KEY_TURNED
from pfmc.passes.value_heads import Heads

Doubles = npt.NDArray[np.float64]
Step = Callable[[Doubles], Doubles]


@dataclass(frozen=True)
class Rotate(Pass):
    """CANONICAL -> CANONICAL with gains of norms and rotations folded into the weights.

    Runs after ``linears`` and ``ties``; is in no recipe of the shelf: it spreads outliers, and
    makes models that have none harder to round. Of each residual stream that is followed from its
    embeddings to its head: ``norm(x) g + b`` read by fixed linears becomes ``norm(x)``, with g and
    b in their weights and biases. Where the norms are layer norms, the mean of every row written
    onto the stream is taken away, which makes them RMS norms; an RMS norm's stream is never
    centred. Then everything that writes, ``W``, becomes ``W R`` and everything that reads
    ``R^T W``. Between the values of attention and the fixed linear behind it, each KV head and the
    query heads of its group get a rotation of their own. Nothing of it costs hardware, but that a
    head tied to its embedding is tied no more. Sums are taken in float64, one weight at a time,
    when it is read.

    A stream on which anything else stands is declined with the reason: a norm whose result is
    itself on the stream (BERT and all post-norm models), an output of the model, an adapter.
    Rotations between queries and keys and in front of ``down_proj`` (R3 and R4 of QuaRot) would be
    adders at every position, are priced by no target, and are not done.

    A fixed linear whose outputs are rotated no longer equals a value of the source file, so
    `pfmc verify` compares what follows it instead.

    Attributes:
        stream: ``rotate`` the residual stream, only ``fold`` its norms, or leave it (``none``).
        heads: whether the values of attention are rotated.
        kind: ``hadamard`` with random signs where there is such a matrix (multiples of 4 but few),
            else, and with ``random``, a random orthogonal matrix.
        block: numbers that are rotated together; 0 for all of the stream.
        keep: ``auto`` rotates after all other passes, quantises both models, and keeps the rotated
            one only if it follows the float model better on data that calibration has not seen;
            ``always`` rotates here.
    """

    name: ClassVar[str] = "rotate"
    needs: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.CANONICAL

    stream: Literal["rotate", "fold", "none"] = "rotate"
    heads: bool = True
    kind: Literal["hadamard", "random"] = "hadamard"
    block: int = 0
    keep: Literal["auto", "always"] = "auto"

    def apply(self, model: ir.Model, context: Context) -> PassResult:
        """Folds what can be folded.

        Raises:
            UsageError: the block does not divide the width of a stream.
        """
        edits = _Edits(model.graph)
        refused: list[Refused] = []
        notes = {"streams": 0, "norms": 0, "centred": 0, "heads": 0}
        for found in residual.streams(model.graph) if self.stream != "none" else ():
            if isinstance(found, Refused):
                refused.append(found)
                continue
            self._stream(edits, found, context.seed)
            notes["streams"] += 1
            notes["norms"] += len(found.norms)
            notes["centred"] += found.centred
        for heads in value_heads.value_heads(model.graph) if self.heads else ():
            if isinstance(heads, Refused):
                refused.append(heads)
                continue
            self._values(edits, heads, context.seed)
            notes["heads"] += heads.held
        told = {**notes, "untied": edits.apply()}
        declined = tuple(Declined(self.name, r.where, r.reason) for r in refused)
        return PassResult(model, notes["streams"] + notes["heads"], declined, {**told})

    def _stream(self, edits: _Edits, stream: Stream, seed: int) -> None:
        turn = self._turn(stream, seed)
        for reader in stream.readers:
            _read(edits, reader, turn)

        def written(x: Doubles) -> Doubles:
            rows = x - x.mean(axis=-1, keepdims=True) if stream.centred else x
            return turn.rows(rows) if turn else rows

        if turn or stream.centred:
            for linear in stream.writers:
                edits.add(linear, 1, written)
                edits.add(linear, 2, written)
                edits.moved.append(linear)
            for node, index in (*((n, 0) for n in stream.tables), *stream.constants):
                edits.add(node, index, written)
        for norm in stream.norms:
            edits.plain(norm)

    def _turn(self, stream: Stream, seed: int) -> Rotation | None:
        if self.stream != "rotate":
            return None
        block = self.block or stream.width
        if block < 0 or stream.width % block:
            raise UsageError(
                f"blocks of {self.block} do not divide a stream of {stream.width}",
                where="rotate.block", mend="choose a divisor of the width, or 0",
            )  # fmt: skip
        name = str(stream.norms[0].name)
        return rotation(stream.width, block, self.kind, generator(seed, name, "rotate"))

    def _values(self, edits: _Edits, heads: Heads, seed: int) -> None:
        rng = generator(seed, str(heads.maker.name), "rotate")
        make = rotation(heads.held * heads.size, heads.size, self.kind, rng)
        signs = np.repeat(make.signs.reshape(heads.held, -1), heads.groups, axis=0).reshape(-1)
        read = Rotation(signs, make.core, make.doublings)
        part = slice(heads.start, heads.stop)

        def written(x: Doubles) -> Doubles:
            made = x.copy()
            made[..., part] = make.rows(x[..., part])
            return made

        edits.add(heads.maker, 1, written)
        edits.add(heads.maker, 2, written)
        edits.add(heads.reader, 1, read.columns, first=True)
        edits.moved.append(heads.maker)


def _read(edits: _Edits, reader: Reader, turn: Rotation | None) -> None:
    """Folds the gain and the shift of the reader's norm and the rotation into its weight."""
    linear = reader.linear
    if reader.norm is not None:
        gain, shift = _vector(reader.norm, 1), _vector(reader.norm, 2)
        weight = linear.inputs[1]
        assert gain is not None
        assert weight is not None
        assert weight.const_value is not None
        tensor = weight.const_value
        if shift is not None and shift.any():
            edits.add(
                linear, 2, lambda b: b + shift @ tensor.numpy().astype(np.float64), first=True
            )
        edits.add(linear, 1, lambda w: w * gain[:, None])
    if turn is not None:
        edits.add(linear, 1, turn.columns)


def _vector(node: ir.Node, index: int) -> Doubles | None:
    array = matcher.constant(node.inputs[index]) if len(node.inputs) > index else None
    return None if array is None else np.asarray(array).astype(np.float64)


# -- the graph -------------------------------------------------------------------------------------


@dataclass
class _Edits:
    """What becomes of the constants of a graph: gathered first, then done, each weight once."""

    graph: ir.Graph
    steps: dict[tuple[ir.Node, int], list[Step]] = field(default_factory=dict)
    norms: list[ir.Node] = field(default_factory=list)
    moved: list[ir.Node] = field(default_factory=list)

    def add(self, node: ir.Node, index: int, step: Step, first: bool = False) -> None:
        """Notes that input `index` of `node` goes through `step`, behind or before the others."""
        held = self.steps.setdefault((node, index), [])
        held.insert(0 if first else len(held), step)

    def plain(self, norm: ir.Node) -> None:
        """Notes that `norm` becomes an RMS norm without gain."""
        self.norms.append(norm)

    def apply(self) -> int:
        """Does all that was noted; how many fixed linears are tied to a table no more."""
        for (node, index), steps in self.steps.items():
            self._replace(node, index, steps)
        for norm in self.norms:
            self._make_plain(norm)
        for linear in self.moved:
            linear.metadata_props.pop(vocabulary.KEY_VALUE, None)
        return sum(map(_untie, dict.fromkeys(node for node, _ in self.steps)))

    def _replace(self, node: ir.Node, index: int, steps: list[Step]) -> None:
        old = node.inputs[index]
        assert old is not None

        def made(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
            value = array.astype(np.float64)
            for step in steps:
                value = step(value)
            return value.astype(array.dtype)

        new = weights.derived(self.graph, old, weights.shape_of(old), made)
        assert new.const_value is not None
        stored.remember(new, new.const_value.numpy)  # no longer the file's own numbers
        node.replace_input_with(index, new)
        self._drop(old)

    def _make_plain(self, norm: ir.Node) -> None:
        gain = norm.inputs[1]
        assert gain is not None
        ones = np.ones(weights.shape_of(gain), weights.kind_of(gain).numpy())
        one = matcher.add_array(self.graph, f"{norm.name}:ones", ones)
        options = {"axis": -1, "epsilon": matcher.attribute(norm, "epsilon", 1e-5), "stash_type": 1}
        new = matcher.fresh(residual.RMS, [norm.inputs[0], one], options)
        vectors = [v for v in norm.inputs[1:] if v is not None]
        provenance.union_sources(new, [norm])
        matcher.substitute(norm, [], [new], norm.outputs[0])
        new.name = norm.name
        for value in vectors:
            self._drop(value)

    def _drop(self, old: ir.Value) -> None:
        if not old.uses() and not old.is_graph_output() and old.name:
            self.graph.initializers.pop(old.name, None)


def _untie(node: ir.Node) -> bool:
    """Forgets that a changed weight equals a table; true for a fixed linear that did."""
    tied = node.metadata_props.pop(KEY_TIED, None) is not None
    return node.metadata_props.pop(KEY_TURNED, None) is not None and tied
