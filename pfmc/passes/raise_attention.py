"""Raises softmax attention to the standard ``Attention`` operator with native grouped heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pfmc.ir import matcher, shapes
from pfmc.ir.shapes import Dims, Shapes
from pfmc.passes.base import Context, Declined, Pass, PassResult
from pfmc.passes.masks import (
    KEY_MASK,
    KEY_WINDOW,
    Finding,
    Probe,
    explicit,
    marks_empty_rows,
    probe,
)
from pfmc.passes.rules import where

LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class _Scores:
    """``scale * (q @ kt) + masks``, read backwards from a softmax."""

    product: ir.Node
    scale: float
    masks: tuple[ir.Value, ...]
    nodes: tuple[ir.Node, ...]


@dataclass(frozen=True)
class _Site:
    """One attention: the nodes it is made of and its parts."""

    scores: _Scores
    output: ir.Value
    root: ir.Node
    nodes: tuple[ir.Node, ...]
    q: ir.Value
    k: ir.Value
    v: ir.Value
    perm: tuple[int, ...] | None = None
    scale: float = 1.0
    moves: tuple[ir.Node, ...] = ()


class _Refused(Exception):
    """A softmax that is not raised, with the reason."""


@dataclass(frozen=True)
class RaiseAttention(Pass):
    """Raises softmax attention.

    ``Softmax(s q' @ k'ᵀ + mask) @ v'`` -> ``Attention(q, k, v[, mask]; scale, is_causal)``, 4-D,
    where k' and v' are k and v, or k and v with each head repeated for its group of query heads.
    Scalings of q, of k and of the scores are gathered in `scale`. Whatever Reshape, Transpose,
    Expand and Unsqueeze lie between k and k' are proved to be that repetition (and transposition)
    by moving numbered elements through them. A guard that turns NaN into zero is dropped.

    The mask is computed, not matched (`pfmc.passes.masks`). Proven causal: ``is_causal=1``.
    Proven to hide the columns of a graph input: one plain mask of that input, shared by all
    layers. Else it stays as it is. ``pfmc.mask`` tells. In rows where padding hides everything
    (padded queries, which nobody reads) the result may differ from the source.
    """

    name: ClassVar[str] = "raise-attention"

    def apply(self, model: ir.Model, context: Context) -> PassResult:
        """Visits every softmax of the graph."""
        work = _Work(model.graph, context.seed)
        declined: list[Declined] = []
        for node in [n for n in model.graph if n.op_type == "Softmax"]:
            try:
                work.visit(node)
            except _Refused as refusal:
                declined.append(Declined(self.name, where(node), str(refusal)))
        declined.extend(Declined(self.name, at, reason) for at, reason in work.remarks)
        return PassResult(model, work.changed, tuple(declined), {**work.counts})


class _Work:
    def __init__(self, graph: ir.Graph, seed: int) -> None:
        self.graph, self.seed = graph, seed
        self.shapes = Shapes(graph)
        self.findings: dict[tuple[ir.Value, object, object], Finding] = {}
        self.plain: dict[tuple[ir.Value, object, int], ir.Value] = {}
        self.empty: dict[object, bool] = {}
        self.counts: dict[str, int] = {}
        self.remarks: list[tuple[str, str]] = []
        self.changed = 0

    def visit(self, softmax: ir.Node) -> None:
        """Raises one attention or raises `_Refused`."""
        site = read(softmax, self.shapes)
        memory = self._memory(site)
        queries, keys = self._lengths(site)
        mask, finding = self._mask(site, aligned=memory is not None or queries == keys)
        before: list[ir.Node] = []
        k, v = site.k, site.v
        if site.perm is not None:
            before.append(matcher.fresh("Transpose", [k], {"perm": site.perm}))
            k = before[0].outputs[0]
        past: list[ir.Value | None] = []
        if memory is not None:
            (past_k, k), (past_v, v) = memory
            past = [past_k, past_v]
        inputs = [site.q, k, v, *([mask, *past] if past or mask is not None else [])]
        options = {"scale": site.scale, "is_causal": int(finding.causal)}
        node = matcher.fresh("Attention", inputs, options, outputs=3 if past else 1)
        _describe(node, finding)
        if finding.reason:
            self.remarks.append((where(softmax), f"mask kept explicit: {finding.reason}"))
        self._put(site, [*before, node], (site.k, site.v) if past else ())
        self._drop_guard(node, Probe(finding, (queries, keys), self.shapes, self.seed))
        self.counts[finding.kind] = self.counts.get(finding.kind, 0) + 1
        self.changed += 1

    def _put(self, site: _Site, new: list[ir.Node], joined: tuple[ir.Value, ...]) -> None:
        """Puts the new nodes in place; the joined keys and values become present outputs."""
        node, dims = new[-1], self.shapes.shape(site.output)
        matcher.substitute(site.root, site.nodes, new, site.output, node.outputs[0])
        if dims is not None:
            self.shapes.learn(node.outputs[0], dims)
        for value, present in zip(joined, node.outputs[1:], strict=False):
            maker = value.producer()
            assert maker is not None
            matcher.inherit(node, [maker], node)
            known = self.shapes.shape(value)
            matcher.take_place(self.graph, value, present)
            matcher.remove_dead(self.graph, [maker])
            if known is not None:
                self.shapes.learn(present, known)

    def _memory(self, site: _Site) -> tuple[tuple[ir.Value, ir.Value], ...] | None:
        """(past, new) of keys and of values that are joined along the positions."""
        if site.perm is not None:
            return None
        pairs = [_joined(value, self.shapes) for value in (site.k, site.v)]
        for value in (site.k, site.v):
            if not self._only_feeds(value, site):
                return None
        ready = tuple(p for p in pairs if p is not None)
        return ready if len(ready) == 2 else None

    def _only_feeds(self, value: ir.Value, site: _Site) -> bool:
        """Whether the readers of `value` are this attention's own and graph outputs."""
        own = set(site.nodes) | set(site.moves)
        return all(use.node in own for use in value.uses())

    def _drop_guard(self, node: ir.Node, found: Probe) -> None:
        """Drops ``Where(nothing is seen, 0, y)`` behind the attention."""
        output = node.outputs[0]
        uses = tuple(output.uses())
        if len(uses) != 1 or uses[0].node.op_type != "Where" or uses[0].idx != 2:
            return
        guard = uses[0].node
        flag = guard.inputs[0]
        if flag is None or matcher.scalar(guard.inputs[1]) != 0.0:
            return
        key = (flag, found.lengths, found.finding)
        if key not in self.empty:
            self.empty[key] = marks_empty_rows(flag, found)
        if self.empty[key]:
            matcher.inherit(node, [guard], node)
            matcher.take_place(self.graph, guard.outputs[0], output)
            matcher.remove_dead(self.graph, [guard])

    def _mask(self, site: _Site, aligned: bool) -> tuple[ir.Value | None, Finding]:
        """The mask to hand to the operator, and what it means.

        Unless `aligned` (as many keys as queries, or the past handed over apart) the operator
        would count positions from another end than the mask, which then stays.
        """
        masks = site.scores.masks
        if not masks:
            return None, Finding("none")
        whole = masks[0] if len(masks) == 1 else self._sum(site)
        queries, keys = self._lengths(site)
        key = (whole, queries, keys)
        if key not in self.findings:
            self.findings[key] = probe(whole, queries, keys, self.shapes, self.seed)
        finding = self.findings[key]
        if finding.causal and not aligned:
            return self._as_it_is(site, whole), explicit("keys and queries are not aligned")
        if finding.kind in ("none", "causal"):
            return None, finding
        if finding.padding is not None and site.q.dtype in (None, ir.DataType.FLOAT):
            return self._padding(site, finding.padding, finding.window), finding
        return self._as_it_is(site, whole), finding

    def _lengths(self, site: _Site) -> tuple[shapes.Dim, shapes.Dim]:
        dims = self.shapes.shape(site.scores.product.outputs[0])
        assert dims is not None
        return dims[-2], dims[-1]

    def _sum(self, site: _Site) -> ir.Value:
        """The sum of several masks."""
        total = site.scores.masks[0]
        for mask in site.scores.masks[1:]:
            node = matcher.fresh("Add", [total, mask])
            self._insert(node, site)
            total = node.outputs[0]
        return total

    def _insert(self, node: ir.Node, site: _Site) -> ir.Value:
        at = site.scores.product
        matcher.inherit(node, [at], at)
        output = node.outputs[0]
        output.name = matcher.unique_name(self.graph, f"{at.outputs[0].name}:{node.op_type}")
        self.graph.insert_before(at, [node])
        return output

    def _as_it_is(self, site: _Site, mask: ir.Value) -> ir.Value:
        """The mask with the rows and columns that the operator demands."""
        dims = self.shapes.shape(mask)
        lengths = self._lengths(site)
        if dims is not None and dims[-2:] == lengths:
            return mask
        raise _Refused("an explicit mask that is broadcast along rows or columns")

    def _padding(self, site: _Site, source: ir.Value, window: int) -> ir.Value:
        """``[B, 1, S, T]``: zero where `source` ``[B, T]`` is not zero, else the lowest float."""
        queries, _ = self._lengths(site)
        key = (source, queries, window)
        if key not in self.plain:
            maker = _MaskMaker(self.graph, source, site.scores.nodes)
            self.plain[key] = maker.make(queries, window)
        return self.plain[key]


class _MaskMaker:
    """Writes the plain mask of a padding input at the head of the graph."""

    def __init__(self, graph: ir.Graph, source: ir.Value, origin: tuple[ir.Node, ...]) -> None:
        self.graph, self.source, self.origin = graph, source, origin
        self.nodes: list[ir.Node] = []

    def make(self, queries: shapes.Dim, window: int) -> ir.Value:
        """Zero where the source is not zero (and within the window), else the lowest float."""
        rows = self._rows(queries)
        axes = self._constant("axes", np.asarray([1, 2], np.int64))
        shown = self.source
        if self.source.dtype != ir.DataType.BOOL:
            shown = self._node("Cast", [shown], to=int(ir.DataType.BOOL))
        shown = self._node("Unsqueeze", [shown, axes])
        if window:
            shown = self._node("And", [shown, self._within(rows, window)])
        low = self._constant("low", np.asarray(LOWEST, np.float32))
        mask = self._node("Where", [shown, self._constant("zero", np.asarray(0, np.float32)), low])
        if not window:
            one = self._constant("one", np.asarray([1], np.int64))
            shape = self._node("Concat", [one, one, rows, one], axis=0)
            mask = self._node("Expand", [mask, shape])
        self.graph.insert_before(next(iter(self.graph)), self.nodes)
        return mask

    def _node(self, op_type: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        node = matcher.fresh(op_type, inputs, attributes)
        matcher.inherit(node, list(self.origin), self.origin[0])
        name = matcher.unique_name(self.graph, f"{self.source.name}:{op_type}")
        node.outputs[0].name = name
        self.nodes.append(node)
        return node.outputs[0]

    def _constant(self, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
        return matcher.add_array(self.graph, f"{self.source.name}:{name}", np.asarray(array))

    def _rows(self, queries: shapes.Dim) -> ir.Value:
        """The vector ``[S]``."""
        if isinstance(queries, int):
            return self._constant("rows", np.asarray([queries], np.int64))
        home = next((h for n, h in shapes.homes(self.graph).items() if shapes.symbol(n) == queries), None)
        if home is None:
            raise _Refused("the number of queries is not a dimension of an input")
        return self._node("Shape", [home[0]], start=home[1], end=home[1] + 1)

    def _within(self, rows: ir.Value, window: int) -> ir.Value:
        """``[S, T]``: whether the key is less than `window` positions behind the query."""
        first = self._constant("first", np.asarray([0], np.int64))
        zero, one = (self._constant(n, np.asarray(i, np.int64)) for i, n in enumerate(("from", "by")))
        columns = self._node("Shape", [self.source], start=1, end=2)
        past = self._node("Squeeze", [self._node("Sub", [columns, rows]), first])
        end = self._node("Squeeze", [columns, first])
        keys = self._node("Range", [zero, end, one])
        own = self._node("Unsqueeze", [self._node("Range", [past, end, one]), self._constant("last", np.asarray([1], np.int64))])
        behind = self._node("Sub", [own, keys])
        return self._node("Less", [behind, self._constant("window", np.asarray(window, np.int64))])


def _describe(node: ir.Node, finding: Finding) -> None:
    node.metadata_props[KEY_MASK] = finding.kind
    if finding.window:
        node.metadata_props[KEY_WINDOW] = str(finding.window)


def _joined(value: ir.Value, known: Shapes) -> tuple[ir.Value, ir.Value] | None:
    """(past, new) if `value` ``[B, H, T, D]`` is a graph input and a new part, in this order."""
    node = value.producer()
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2:
        return None
    past, new = node.inputs
    if past is None or new is None or matcher.attribute(node, "axis") not in (2, -2):
        return None
    return (past, new) if past.is_graph_input() else None


# ---------------------------------------------------------------- reading one site


def read(softmax: ir.Node, known: Shapes) -> _Site:
    """The parts of the attention around `softmax`.

    Raises:
        _Refused: it is not one that the operator can express.
    """
    dims = known.shape(softmax.outputs[0])
    if dims is None or len(dims) != 4:
        raise _Refused("a softmax of other than four dimensions")
    if matcher.attribute(softmax, "axis", -1) not in (-1, 3):
        raise _Refused("a softmax along another axis than the last")
    scores = _read_scores(softmax.inputs[0])
    if scores is None:
        raise _Refused("its input is not a masked product")
    product, behind = _read_output(softmax)
    q, q_scale = _strip_scale(scores.product.inputs[0])
    kt, k_scale = _strip_scale(scores.product.inputs[1])
    v = product.inputs[1]
    if q is None or kt is None or v is None:
        raise _Refused("a product without operands")
    heads = _heads(known, q, kt, v)
    k, perm = _root_of_keys(kt, heads, known)
    value = _root(v, lambda a: a, heads, known)
    if value is None:
        raise _Refused("the values are not whole heads in four dimensions")
    groups = {_dim(known, x, 1) for x in (k if perm is None else kt, value)}
    if len(groups) != 1:
        k, perm, value = *_full_keys(kt), v
    moves = _between(scores.product.inputs[1], k) + _between(v, value)
    nodes = (*scores.nodes, softmax, *behind, product)
    scale = scores.scale * q_scale * k_scale
    return _Site(scores, product.outputs[0], product, nodes, q, k, value, perm, scale, moves)


def _read_scores(value: ir.Value | None) -> _Scores | None:
    """Walks back through additions of masks, scalings and fillings to the product."""
    value = matcher.see_through(value)
    node = value.producer() if value is not None else None
    if node is None:
        return None
    if node.op_type == "MatMul":
        return _Scores(node, 1.0, (), (node,))
    if node.op_type == "Add":
        return _read_add(node)
    if node.op_type in ("Mul", "Div"):
        return _read_scaling(node)
    return None


def _read_add(node: ir.Node) -> _Scores | None:
    for inner, mask in ((0, 1), (1, 0)):
        found = _read_scores(node.inputs[inner])
        other = node.inputs[mask]
        if found is not None and other is not None:
            masks = (*found.masks, other)
            return _Scores(found.product, found.scale, masks, (*found.nodes, node))
    return None


def _read_scaling(node: ir.Node) -> _Scores | None:
    for inner, factor in ((0, 1), (1, 0)):
        number = matcher.scalar(node.inputs[factor])
        if number is None or (node.op_type == "Div" and inner):
            continue
        found = _read_scores(node.inputs[inner])
        if found is None or found.masks:
            return None
        scale = found.scale * number if node.op_type == "Mul" else found.scale / number
        return _Scores(found.product, scale, (), (*found.nodes, node))
    return None


def _read_output(softmax: ir.Node) -> tuple[ir.Node, tuple[ir.Node, ...]]:
    """The product with the values, and the guard against NaN, Cast and Dropout before it."""
    value, passed = softmax.outputs[0], list[ir.Node]()
    while True:
        nodes = list(dict.fromkeys(use.node for use in value.uses()))
        if value.is_graph_output():
            raise _Refused("the attention weights are an output")
        guard = _guard(value, nodes)
        if guard is not None:
            passed.extend(nodes)
            value = guard.outputs[0]
        elif len(nodes) == 1 and nodes[0].op_type in ("Identity", "Dropout"):
            passed.append(nodes[0])
            value = nodes[0].outputs[0]
        elif len(nodes) == 1 and nodes[0].op_type == "MatMul" and nodes[0].inputs[0] is value:
            return nodes[0], tuple(passed)
        else:
            raise _Refused("the attention weights are not multiplied with values alone")


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
        elif left is not None:
            scale, value = scale * left, node.inputs[1]
        else:
            return value, scale


def _dim(known: Shapes, value: ir.Value, axis: int) -> shapes.Dim | None:
    dims = known.shape(value)
    return None if dims is None else dims[axis]


def _heads(known: Shapes, q: ir.Value, kt: ir.Value, v: ir.Value) -> int:
    """The number of query heads; all three must be of four known dimensions."""
    found = [known.shape(x) for x in (q, kt, v)]
    if any(d is None or len(d) != 4 for d in found):
        raise _Refused("queries, keys or values are not of four known dimensions")
    heads = [d[1] for d in found if d is not None]
    if not isinstance(heads[0], int) or any(h != heads[0] for h in heads):
        raise _Refused(f"head counts {[str(h) for h in heads]} are not one known number")
    return heads[0]


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
    array: npt.NDArray[np.int64], nodes: tuple[ir.Node, ...], known: Shapes, sizes: dict[str, int]
) -> npt.NDArray[np.int64] | None:
    for node in nodes:
        dims = known.shape(node.outputs[0])
        if dims is None:
            return None
        shape = [shapes.value_at(d, sizes) for d in dims]
        if node.op_type == "Transpose":
            perm = matcher.attribute(node, "perm")
            array = array.transpose(perm)
        elif node.op_type == "Expand":
            array = np.broadcast_to(array, shape)
        else:
            array = array.reshape(shape)
    return array


_SIZES = ((2, 3, 5, 7, 11, 13), (3, 2, 7, 5, 13, 11))


def _instances(dims: list[Dims]) -> Iterator[dict[str, int]]:
    """Two sets of sizes for the symbols in `dims`."""
    names = sorted(set().union(*(shapes.symbols_of(d) for d in dims)))
    for numbers in _SIZES:
        yield {name: numbers[i % len(numbers)] for i, name in enumerate(names)}


def _root(value: ir.Value, turn: object, heads: int, known: Shapes) -> ir.Value | None:
    """The earliest ``[B, G, T, D]`` of which `value` is ``turn(heads repeated)``, if one is."""
    assert callable(turn)
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
    turn: object,
) -> bool:
    assert callable(turn)
    shape = [shapes.value_at(d, sizes) for d in dims]
    numbered = np.arange(int(np.prod(shape))).reshape(shape)
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
    perm = matcher.attribute(node, "perm")
    return node.inputs[0], (perm[0], perm[1], perm[3], perm[2])

