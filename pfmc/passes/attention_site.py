"""Reads the attention around a softmax: its operands, scale, masks, and what it lies between."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pfmc.ir import matcher, shapes
from pfmc.ir.shapes import Dims, Shapes
from pfmc.passes.scores import Scores, is_plain, read_scores

Numbered: TypeAlias = npt.NDArray[np.int64]
Turn: TypeAlias = Callable[[Numbered], Numbered]


@dataclass(frozen=True)
class Site:
    """One attention: the nodes it is made of and its parts.

    `sink` is ``[B, H, S, 1]``: a score that takes part in the softmax and has no value (Xiao et
    al. 2023; gpt-oss).
    """

    scores: Scores
    output: ir.Value
    root: ir.Node
    nodes: tuple[ir.Node, ...]
    q: ir.Value
    k: ir.Value
    v: ir.Value
    perm: tuple[int, ...] | None = None
    scale: float = 1.0
    moves: tuple[ir.Node, ...] = ()
    sink: ir.Value | None = None


class RefusedError(Exception):
    """A softmax that is not raised, with the reason."""


def read(softmax: ir.Node, known: Shapes) -> Site:
    """The parts of the attention around `softmax`.

    Raises:
        RefusedError: it is not one that the operator can express.
    """
    dims = known.shape(softmax.outputs[0])
    if dims is None or len(dims) != 4:
        raise RefusedError("a softmax of other than four dimensions")
    if matcher.attribute(softmax, "axis", -1) not in (-1, 3):
        raise RefusedError("a softmax along another axis than the last")
    inner, sink, joining = _read_sink(softmax.inputs[0])
    scores = read_scores(inner)
    if scores is None:
        raise RefusedError("its input is not a masked product")
    product, behind = _read_output(softmax, sink is not None)
    q, q_scale = _strip_scale(scores.product.inputs[0])
    kt, k_scale = _strip_scale(scores.product.inputs[1])
    v = product.inputs[1]
    if q is None or kt is None or v is None:
        raise RefusedError("a product without operands")
    heads = _heads(known, q, kt, v)  # of keys and values: one head may serve all queries
    k, perm = _root_of_keys(kt, heads, known)
    value = _root(v, lambda a: a, heads, known)
    if value is None:
        raise RefusedError("the values are not whole heads in four dimensions")
    groups = {_dim(known, x, 1) for x in (k if perm is None else kt, value)}
    if len(groups) != 1:
        k, perm, value = *_full_keys(kt), v
    _refuse_broadcast(known, dims, scores, (q, kt, v), sunk=sink is not None)
    moves = _between(scores.product.inputs[1], k) + _between(v, value)
    nodes = (*scores.nodes, *joining, softmax, *behind, product)
    scale = scores.scale * q_scale * k_scale
    if not is_plain(scale):
        raise RefusedError(f"its scores are scaled by {scale:g}")
    return Site(scores, product.outputs[0], product, nodes, q, k, value, perm, scale, moves, sink)


def _refuse_broadcast(
    known: Shapes, dims: Dims, scores: Scores, operands: tuple[ir.Value, ...], *, sunk: bool
) -> None:
    """Refuses a mask that widens its scores, and operands of one batch beside those of more."""
    made = known.shape(scores.product.outputs[0])
    length = 3 if sunk else 4
    pairs = [(1, 1)] if made is None else list(zip(made[:length], dims[:length], strict=True))
    batches = [known.shape(x) for x in operands]
    pairs += [(b[0], dims[0]) for b in batches if b is not None]
    if any(a == 1 and b != 1 for a, b in pairs):
        raise RefusedError("an operand or the scores are broadcast over the batch or the queries")


def _read_sink(
    value: ir.Value | None,
) -> tuple[ir.Value | None, ir.Value | None, tuple[ir.Node, ...]]:
    """``Concat(scores, sink)``, less its own maximum or not: scores, sink and the nodes."""
    passed: tuple[ir.Node, ...] = ()
    joined = value
    if (less := matcher.producer(value, "Sub")) is not None:
        peak = matcher.producer(less.inputs[1], "ReduceMax")
        if peak is None or peak.inputs[0] is not less.inputs[0]:
            return value, None, ()
        if matcher.rank(peak.outputs[0]) != 4 or matcher.static_dim(peak.outputs[0], -1) != 1:
            return value, None, ()
        joined, passed = less.inputs[0], (peak, less)
    node = matcher.producer(joined, "Concat")
    if node is None or len(node.inputs) != 2 or matcher.attribute(node, "axis") not in (-1, 3):
        return value, None, ()
    scores, sink = node.inputs
    if matcher.static_dim(sink, -1) != 1 or matcher.rank(sink) != 4:
        return value, None, ()
    return scores, sink, (node, *passed)


def _drops_last(node: ir.Node) -> bool:
    """``p[..., :-1]``."""
    parts = [matcher.integers(v) for v in node.inputs[1:]]
    plain = len(parts) < 4 or parts[3] == (1,)
    return node.op_type == "Slice" and parts[:2] == [(0,), (-1,)] and plain and (
        len(parts) > 2 and parts[2] in ((-1,), (3,))
    )  # fmt: skip


def _read_output(softmax: ir.Node, sunk: bool) -> tuple[ir.Node, tuple[ir.Node, ...]]:
    """The product with the values, and the guard against NaN, Cast and Dropout before it.

    If a sink took part (`sunk`), its column must be dropped on the way.
    """
    value, passed = softmax.outputs[0], list[ir.Node]()
    while True:
        nodes = list(dict.fromkeys(use.node for use in value.uses()))
        if value.is_graph_output():
            raise RefusedError("the attention weights are an output")
        guard = _guard(value, nodes)
        if guard is not None:
            passed.extend(nodes)
            value = guard.outputs[0]
        elif len(nodes) == 1 and nodes[0].op_type in ("Identity", "Dropout"):
            passed.append(nodes[0])
            value = nodes[0].outputs[0]
        elif len(nodes) == 1 and sunk and _drops_last(nodes[0]):
            passed.append(nodes[0])
            value, sunk = nodes[0].outputs[0], False
        elif len(nodes) == 1 and not sunk and _multiplies(nodes[0], value):
            return nodes[0], tuple(passed)
        else:
            raise RefusedError("the attention weights are not multiplied with values alone")


def _multiplies(node: ir.Node, value: ir.Value) -> bool:
    return node.op_type == "MatMul" and node.inputs[0] is value


def _guard(value: ir.Value, nodes: list[ir.Node]) -> ir.Node | None:
    """``Where(IsNaN(p), 0, p)``."""
    kinds = {n.op_type: n for n in nodes}
    if len(nodes) != 2 or set(kinds) != {"IsNaN", "Where"}:
        return None
    test, choice = kinds["IsNaN"], kinds["Where"]
    fits = choice.inputs[0] is test.outputs[0] and choice.inputs[2] is value
    alone = len(test.outputs[0].uses()) == 1 and matcher.scalar(choice.inputs[1]) == 0.0
    return choice if fits and alone else None


def _strip_scale(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """The value behind products and quotients with a number, and the factor."""
    scale = 1.0
    while True:
        value = matcher.see_through(value)
        node = value.producer() if value is not None else None
        if node is None or node.op_type not in ("Mul", "Div"):
            return value, scale
        right = matcher.scalar(node.inputs[1])
        left = matcher.scalar(node.inputs[0]) if node.op_type == "Mul" else None
        if right is not None and right != 0:
            scale = scale * right if node.op_type == "Mul" else scale / right
            value = node.inputs[0]
        elif left is not None and left != 0:
            scale, value = scale * left, node.inputs[1]
        else:
            return value, scale


def _dim(known: Shapes, value: ir.Value, axis: int) -> shapes.Dim | None:
    dims = known.shape(value)
    return None if dims is None else dims[axis]


def _heads(known: Shapes, q: ir.Value, kt: ir.Value, v: ir.Value) -> int:
    """The heads of keys and values, those of the queries or one that is broadcast."""
    found = [known.shape(x) for x in (q, kt, v)]
    if any(d is None or len(d) != 4 for d in found):
        raise RefusedError("queries, keys or values are not of four known dimensions")
    queries, keys, values = (d[1] for d in found if d is not None)
    fits = isinstance(queries, int) and keys == values and keys in (1, queries)
    if not fits or not isinstance(keys, int):
        shown = [str(h) for h in (queries, keys, values)]
        raise RefusedError(f"head counts {shown} are not one known number")
    return keys


def _between(value: ir.Value | None, root: ir.Value) -> tuple[ir.Node, ...]:
    """The nodes on the way from `root` to `value`, along first inputs or scaled ones."""
    found: list[ir.Node] = []
    queue = [value]
    while queue:
        value = queue.pop()
        node = value.producer() if value is not None and value is not root else None
        if node is not None and node.op_type in (*_MOVES, "Mul", "Div"):
            found.append(node)
            queue.extend(node.inputs if node.op_type in ("Mul", "Div") else node.inputs[:1])
    return tuple(found)


def _chain(value: ir.Value) -> Iterator[tuple[ir.Value, tuple[ir.Node, ...]]]:
    """`value` and the values that moving elements alone makes it of, with the nodes between."""
    passed: tuple[ir.Node, ...] = ()
    while True:
        yield value, passed
        node = value.producer()
        if node is None or node.op_type not in _MOVES or node.inputs[0] is None:
            return
        passed = (node, *passed)
        value = node.inputs[0]


_MOVES = frozenset({"Reshape", "Transpose", "Expand", "Unsqueeze", "Squeeze", "Identity"})


def _replay(
    array: Numbered, nodes: tuple[ir.Node, ...], known: Shapes, sizes: dict[str, int]
) -> Numbered | None:
    for node in nodes:
        dims = known.shape(node.outputs[0])
        if dims is None:
            return None
        shape = [shapes.value_at(d, sizes) for d in dims]
        if not _is_drawable(shape):
            return None
        if node.op_type == "Transpose":
            perm = matcher.attribute(node, "perm")
            array = array.transpose(perm)
        elif node.op_type == "Expand":
            if not _fits(array.shape, shape):
                return None
            array = np.broadcast_to(array, shape)
        elif array.size != math.prod(shape):
            return None  # a name in a shape that says something else than the operators
        else:
            array = array.reshape(shape)
    return array


def _fits(shape: tuple[int, ...], wanted: list[int]) -> bool:
    """Whether `shape` can be broadcast to `wanted`, which may have further axes in front."""
    pairs = zip(shape[::-1], wanted[::-1], strict=False)
    return len(shape) <= len(wanted) and all(a in (1, b) for a, b in pairs)


_MOST_NUMBERED = 1 << 25


def _is_drawable(shape: list[int]) -> bool:
    """Whether an array of `shape` can be, and can be afforded."""
    return min(shape, default=1) > 0 and math.prod(shape) <= _MOST_NUMBERED


_SIZES = ((2, 3, 5, 7, 11, 13), (3, 2, 7, 5, 13, 11))


def _instances(dims: list[Dims]) -> Iterator[dict[str, int]]:
    """Two sets of sizes for the symbols in `dims`."""
    names = sorted(set().union(*(shapes.symbols_of(d) for d in dims)))
    for numbers in _SIZES:
        yield {name: numbers[i % len(numbers)] for i, name in enumerate(names)}


def _root(value: ir.Value, turn: Turn, heads: int, known: Shapes) -> ir.Value | None:
    """The earliest ``[B, G, T, D]`` of which `value` is ``turn(heads repeated)``, if one is."""
    best = None
    for candidate, nodes in _chain(value):
        dims = known.shape(candidate)
        group = dims[1] if dims is not None and len(dims) == 4 else 0
        if dims is None or not isinstance(group, int) or not group or heads % group:
            continue
        every = [known.shape(n.outputs[0]) for n in nodes]
        if any(d is None for d in every):
            return best
        ready = [dims, *(d for d in every if d is not None)]
        if all(
            _is_repetition(dims, nodes, known, sizes, heads // group, turn)
            for sizes in _instances(ready)
        ):
            best = candidate
    return best


def _is_repetition(
    dims: Dims,
    nodes: tuple[ir.Node, ...],
    known: Shapes,
    sizes: dict[str, int],
    times: int,
    turn: Turn,
) -> bool:
    shape = [shapes.value_at(d, sizes) for d in dims]
    if not _is_drawable([*shape, times]):
        return False
    numbered = np.arange(math.prod(shape)).reshape(shape)
    moved = _replay(numbered, nodes, known, sizes)
    wanted = turn(np.repeat(numbered, times, axis=1))
    return moved is not None and moved.shape == wanted.shape and bool((moved == wanted).all())


def _root_of_keys(
    kt: ir.Value, heads: int, known: Shapes
) -> tuple[ir.Value, tuple[int, ...] | None]:
    """k as ``[B, G, T, D]``, or a value and the permutation that makes it ``[B, H, T, D]``."""
    found = _root(kt, lambda a: a.swapaxes(2, 3), heads, known)
    return (found, None) if found is not None else _full_keys(kt)


def _full_keys(kt: ir.Value) -> tuple[ir.Value, tuple[int, ...]]:
    """What to transpose, and how, so that ``kt`` becomes ``[B, H, T, D]``."""
    node = matcher.producer(kt, "Transpose")
    if node is None or node.inputs[0] is None:
        return kt, (0, 1, 3, 2)
    perm = matcher.attribute(node, "perm") or (3, 2, 1, 0)
    return node.inputs[0], (perm[0], perm[1], perm[3], perm[2])
