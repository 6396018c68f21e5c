"""What an attention mask means, found by computing it at several lengths and paddings.

The construction of a mask differs with every exporter and is never matched. Its subgraph is
evaluated in numpy instead; the lengths are chosen beyond every integer constant in it, so that a
sliding window cannot hide. What cannot be decided stays an explicit mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pfmc.errors import InputError, PfmcError
from pfmc.ir import matcher, shapes
from pfmc.ir.meaning import evaluate
from pfmc.ir.shapes import Dim, Shapes

KEY_MASK = "pfmc.mask"
KEY_WINDOW = "pfmc.window"
KEY_SINK = "pfmc.sink"

BLOCKED = -1e30
_LARGEST_LENGTH = 2048
_LARGEST_INPUT = 1 << 24  # elements of an input in one trial
_LARGEST_MASK = 1 << 26  # elements of a mask
_MOST_NODES = 400
_HOP = 1024  # samples for each position where a mask depends on the length of a sound
_HEAVY = frozenset({"FixedLinear", "QuantisedLinear", "MatMul", "Gemm", "Conv", "Attention"})
Allowed = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Finding:
    """The meaning of a mask.

    Attributes:
        kind: ``none``, ``causal``, ``padding``, ``causal+padding``, ``explicit``, or, where scores
            of other sizes are added, ``bias`` or ``causal+bias``.
        window: positions seen, the own one included, if a sliding window was found; else 0.
        padding: the graph input ``[B, T]`` that hides columns, if one does.
        reason: why the mask stays explicit.
    """

    kind: str
    window: int = 0
    padding: ir.Value | None = None
    reason: str = ""

    @property
    def causal(self) -> bool:
        """Whether no position sees a later one, by proof."""
        return "causal" in self.kind or self.window > 0


OF_PRODUCTS = "the mask depends on products or on too many nodes"
OF_VALUES = "the mask holds other values than zero and minus infinity"
BIASES = frozenset({OF_PRODUCTS, OF_VALUES})
"""Reasons that tell a bias from a mask that only hides, in a way of its own."""


def explicit(reason: str) -> Finding:
    """A mask that stays as it is."""
    return Finding("explicit", reason=reason)


@dataclass(frozen=True)
class _Trial:
    """Sizes for the symbols, and the lengths of query and key that follow."""

    sizes: Mapping[str, int]
    queries: int
    keys: int


@dataclass(frozen=True)
class Probe:
    """A finding and what it was found with.

    Attributes:
        finding: the meaning of the mask.
        lengths: S and T.
        known: the shapes of the graph.
        seed: of the random paddings.
    """

    finding: Finding
    lengths: tuple[Dim, Dim]
    known: Shapes
    seed: int


def probe(mask: ir.Value, queries: Dim, keys: Dim, known: Shapes, seed: int) -> Finding:
    """Finds what the additive `mask` (broadcasts to ``[B, H, S, T]``) means.

    Args:
        mask: the additive mask.
        queries: S; keys: T, as polynomials in the input dimensions.
        known: the shapes of the graph that holds the mask.
        seed: of the random paddings.
    """
    nodes = _ancestors(mask)
    if nodes is None:
        return explicit(OF_PRODUCTS)
    inputs = _inputs(nodes)
    readers = data_inputs(mask)
    if len(readers) > 1:
        return explicit("the mask depends on several inputs")
    try:
        trials = list(_trials(nodes, inputs, readers, queries, keys, known))
        if not trials:
            return explicit(f"the mask holds a constant beyond {_LARGEST_LENGTH}")
        if any(t.queries * t.keys > _LARGEST_MASK for t in trials):
            return explicit("the mask is too large to be tried")
        return _classify(mask, nodes, inputs, readers, trials, seed)
    except (PfmcError, ValueError, IndexError, KeyError, TypeError) as error:
        return explicit(f"the mask cannot be computed: {str(error).splitlines()[0]}")


def _ancestors(mask: ir.Value) -> list[ir.Node] | None:
    """The nodes that the mask is made by; None if they hold products or are too many."""
    found: dict[ir.Node, None] = {}
    queue = [mask.producer()]
    while queue:
        node = queue.pop()
        if node is None or node in found:
            continue
        if node.op_type in _HEAVY or len(found) >= _MOST_NODES:
            return None
        found[node] = None
        queue.extend(v.producer() for v in node.inputs if v is not None)
    return list(found)


def _inputs(nodes: list[ir.Node]) -> list[ir.Value]:
    found = {v for n in nodes for v in n.inputs if v is not None and v.is_graph_input()}
    return sorted(found, key=lambda v: str(v.name))


def data_inputs(mask: ir.Value) -> list[ir.Value]:
    """The graph inputs whose elements, not only shapes, reach the mask."""
    found: dict[ir.Value, None] = {}
    queue, seen = [mask], {mask}
    while queue:
        value = queue.pop()
        if value.is_graph_input():
            found[value] = None
        node = value.producer()
        if node is None or node.op_type in ("Shape", "Size"):
            continue
        fresh = [v for v in node.inputs if v is not None and v not in seen]
        seen.update(fresh)
        queue.extend(fresh)
    return list(found)


def _trials(
    nodes: list[ir.Node],
    inputs: list[ir.Value],
    readers: list[ir.Value],
    queries: Dim,
    keys: Dim,
    known: Shapes,
) -> Iterator[_Trial]:
    """Lengths to compute the mask at: small ones, and one beyond every constant in it."""
    reach = _largest_constant(nodes)
    if reach >= _LARGEST_LENGTH:
        return
    pairs = [(5, 3), (4, 0), (1, 6), (7, 2), (2, 9)]
    if reach > 4:
        pairs.append((reach + 3, 2))
        pairs.append((3, reach + 3))
    seen = set()
    for length, past in pairs:
        sizes = _sizes(inputs, readers, queries, keys, known, length, past)
        trial = _Trial(sizes, shapes.value_at(queries, sizes), shapes.value_at(keys, sizes))
        if (trial.queries, trial.keys) not in seen:
            seen.add((trial.queries, trial.keys))
            yield trial


def _largest_constant(nodes: list[ir.Node]) -> int:
    """The largest integer, or whole number, in the constants that the mask is made of."""
    largest = 0
    for node in nodes:
        for value in node.inputs:
            if value is None or value.const_value is None or value.const_value.size > 64:
                continue
            array = np.abs(np.asarray(value.const_value.numpy(), np.float64)).reshape(-1)
            fits = array[np.isfinite(array) & (array < 1 << 24)]
            largest = max(largest, int(fits.max(initial=0)))
    return largest


def _sizes(
    inputs: list[ir.Value],
    readers: list[ir.Value],
    queries: Dim,
    keys: Dim,
    known: Shapes,
    length: int,
    past: int,
) -> dict[str, int]:
    own, all_ = shapes.symbols_of([queries]), shapes.symbols_of([keys])
    sizes = dict.fromkeys(own, length) | dict.fromkeys(all_ - own, past)
    for value in inputs:
        dims = known.shape(value) or ()
        if value in readers and len(dims) == 2:
            _settle(sizes, dims[1], shapes.value_at(keys, sizes))
        for axis, dim in enumerate(dims):
            for name in shapes.symbols_of([dim]):
                sound = value.dtype == ir.DataType.FLOAT and len(dims) == 2
                sizes.setdefault(name, 2 if axis == 0 else length * (_HOP if sound else 1))
    return sizes


def _settle(sizes: dict[str, int], dim: Dim, wanted: int) -> None:
    """Gives the one free symbol of `dim`, if it stands alone, the size `wanted`."""
    if isinstance(dim, shapes.Poly) and len(shapes.symbols_of([dim])) == 1:
        (name,) = shapes.symbols_of([dim])
        if dim == shapes.symbol(name):
            sizes.setdefault(name, wanted)


def _classify(
    mask: ir.Value,
    nodes: list[ir.Node],
    inputs: list[ir.Value],
    readers: list[ir.Value],
    trials: list[_Trial],
    seed: int,
) -> Finding:
    bases: list[Allowed] = []
    for trial in trials:
        allowed = _evaluate(mask, nodes, _feeds(inputs, trial, None), trial)
        if allowed is None or not (allowed == allowed[:1]).all():
            return explicit(OF_VALUES)
        bases.append(allowed[0])
    kind, window = _pattern(bases, trials)
    if not readers:
        return Finding(kind, window, reason="" if kind != "explicit" else "a pattern of its own")
    if not _hides_columns(mask, nodes, inputs, readers[0], trials, bases, seed):
        return explicit(f"the mask does more with {readers[0].name!r} than to hide columns")
    if kind == "explicit":
        reason = "" if window else "a pattern of its own"
        return Finding(kind, window, readers[0] if window else None, reason)
    return Finding("padding" if kind == "none" else "causal+padding", 0, readers[0])


def marks_empty_rows(flag: ir.Value, found: Probe) -> bool:
    """Whether the condition `flag` ``[B, H, S, 1]`` is true just in rows where nothing is seen."""
    nodes = _ancestors(flag)
    readers = data_inputs(flag)
    if nodes is None or len(readers) > 1:
        return False
    inputs = _inputs(nodes)
    try:
        for trial in _trials(nodes, inputs, readers, *found.lengths, found.known):
            if trial.keys <= 64 and not _marks(flag, nodes, inputs, readers, trial, found):
                return False
    except (PfmcError, ValueError, IndexError, KeyError, TypeError):
        return False
    return True


def _marks(
    flag: ir.Value,
    nodes: list[ir.Node],
    inputs: list[ir.Value],
    readers: list[ir.Value],
    trial: _Trial,
    probe: Probe,
) -> bool:
    finding = probe.finding
    base = _ahead(trial) >= 0 if finding.causal else np.ones((trial.queries, trial.keys), bool)
    if finding.window:
        base &= _ahead(trial) < finding.window
    rng = np.random.default_rng(probe.seed)
    for _ in range(2 if readers else 1):
        padding = None
        shown = base[None]
        if readers:
            shape = _feeds(readers, trial, None)[str(readers[0].name)].shape
            padding = rng.integers(0, 2, shape)
            shown = base[None] & (padding[:, None, :] > 0)
        (array,) = evaluate(nodes, _feeds(inputs, trial, padding), [str(flag.name)])
        rows = np.asarray(array)
        empty = np.logical_not(np.any(shown, axis=-1))
        if rows.ndim != 4 or not np.all(rows[:, 0, :, 0] == empty):
            return False
    return True


def _feeds(
    inputs: list[ir.Value], trial: _Trial, padding: npt.NDArray[np.int64] | None
) -> dict[str, npt.NDArray[np.generic]]:
    """Zeros for inputs read for their shape; ones, or `padding`, for those of integers."""
    feeds: dict[str, npt.NDArray[np.generic]] = {}
    for value in inputs:
        if value.shape is None or value.dtype is None:
            raise InputError(f"input {value.name!r} is of unknown rank or type")
        dims = [shapes.parse(d) for d in value.shape]
        shape = [
            shapes.value_at(
                d if d is not None else shapes.symbol(f"{value.name}[{axis}]"), trial.sizes
            )
            for axis, d in enumerate(dims)
        ]
        if math.prod(shape) > _LARGEST_INPUT:
            raise InputError(f"input {value.name!r} has {math.prod(shape)} elements")
        array = np.ones(shape, value.dtype.numpy())
        if padding is not None and padding.shape == array.shape:
            array = padding.astype(array.dtype)
        feeds[str(value.name)] = array
    return feeds


def _evaluate(
    mask: ir.Value,
    nodes: list[ir.Node],
    feeds: Mapping[str, npt.NDArray[np.generic]],
    trial: _Trial,
) -> Allowed | None:
    """``[B, S, T]``: where attention is allowed; None if the mask is not of that kind."""
    fixed = matcher.constant(mask)
    raw = evaluate(nodes, feeds, [str(mask.name)])[0] if fixed is None else fixed
    array = np.asarray(raw, np.float64)
    if not ((array == 0) | (array <= BLOCKED)).all():
        return None
    array = array.reshape((1,) * (4 - array.ndim) + array.shape)
    if not array.any():  # hides nothing, however long it is
        return np.ones((array.shape[0], trial.queries, trial.keys), bool)
    if not (array == array[:, :1]).all():
        return None
    shape = (array.shape[0], trial.queries, trial.keys)
    return np.broadcast_to(array[:, 0] == 0, shape)


def _pattern(bases: list[Allowed], trials: list[_Trial]) -> tuple[str, int]:
    """The kind and window that fit all trials."""
    if all(base.all() for base in bases):
        return "none", 0
    windows: set[int] = set()
    for base, trial in zip(bases, trials, strict=True):
        ahead = _ahead(trial)
        seen = base & (ahead >= 0)
        if (base & (ahead < 0)).any():
            return "explicit", 0
        window = int(ahead[seen].max(initial=0)) + 1
        if not (seen == ((ahead >= 0) & (ahead < window))).all():
            return "explicit", 0
        if window <= ahead.max():
            windows.add(window)
    if not windows:
        return "causal", 0
    return "explicit", windows.pop() if len(windows) == 1 else 0


def _ahead(trial: _Trial) -> npt.NDArray[np.int64]:
    """``[S, T]``: how many positions the query stands behind the key; negative for the future."""
    own = np.arange(trial.queries)[:, None] + trial.keys - trial.queries
    return np.asarray(own - np.arange(trial.keys)[None, :])


def _hides_columns(
    mask: ir.Value,
    nodes: list[ir.Node],
    inputs: list[ir.Value],
    reader: ir.Value,
    trials: list[_Trial],
    bases: list[Allowed],
    seed: int,
) -> bool:
    """Whether the input only hides the columns where it is zero, at random paddings."""
    rng = np.random.default_rng(seed)
    for trial, base in zip(trials, bases, strict=True):
        if trial.keys > 64:
            continue
        shape = _feeds([reader], trial, None)[str(reader.name)].shape
        if len(shape) != 2 or shape[1] != trial.keys:
            return False
        for _ in range(2):
            padding = rng.integers(0, 2, shape)
            allowed = _evaluate(mask, nodes, _feeds(inputs, trial, padding), trial)
            wanted = base[None] & (padding[:, None, :] > 0)
            if allowed is None or not (allowed == wanted).all():
                return False
    return True
