"""Raises rotary position embeddings, half-split or interleaved, to ``pfmc::Rotary``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from pfmc.ir import matcher, vocabulary
from pfmc.ir.matcher import Match, Op, Scalar, Var
from pfmc.passes.base import Context, Pass, PassResult
from pfmc.passes.rules import Rule, apply_rules

_X = Var("x")


def _slice(name: str) -> Op:
    return Op("Slice", (_X,), name=name, more=True)


def _halves() -> tuple[tuple[Op, Op], ...]:
    """The first and the second half of x, as exporters take them."""
    split = [
        Op("Split", (_X,), name=n, more=True, output=i) for i, n in enumerate(("left", "right"))
    ]
    return ((_slice("left"), _slice("right")), (split[0], split[1]))


class RotateHalf(Rule):
    """Rotary embedding of the two halves of the last axis (Su et al. 2021, in GPT-NeoX's order).

    ``x * cos + Concat(-x[..., D/2:], x[..., :D/2]) * sin`` -> ``pfmc::Rotary(x, cos, sin)``
    """

    patterns = tuple(
        Op(
            "Add",
            (
                Op("Mul", (_X, Var("cos"))),
                Op(
                    "Mul",
                    (Op("Concat", (Op("Neg", (right,)), left), name="turned"), Var("sin")),
                ),
            ),
        )
        for left, right in _halves()
    )

    def check(self, found: Match) -> str:
        """Checks that the halves are halves of the last axis."""
        width, rank = matcher.static_dim(found["x"], -1), matcher.rank(found["x"])
        turned = found["turned"].producer()
        assert turned is not None
        if width is None or rank is None:
            return "rotation of unknown width"
        if matcher.attribute(turned, "axis") not in (-1, rank - 1):
            return "rotation along another axis than the last"
        if width % 2 or not _are_halves(found, width, rank):
            return "the rotated parts are not the two halves of the last axis"
        return ""

    def rewrite(self, graph: ir.Graph, found: Match) -> None:
        """Puts one operator in place of the group."""
        inputs = [found[name] for name in ("x", "cos", "sin")]
        node = matcher.fresh(vocabulary.ROTARY, inputs, domain=vocabulary.DOMAIN)
        matcher.replace(found, [node])


class RotateParts(Rule):
    """Rotary embedding that turns the two halves one by one (gpt-oss).

    ``Concat(l * cos - r * sin, r * cos + l * sin)`` with l, r the halves of x
    -> ``pfmc::Rotary(x, Concat(cos, cos), Concat(sin, sin))``
    """

    patterns = tuple(
        Op(
            "Concat",
            (
                Op("Sub", (Op("Mul", (left, Var("cos"))), Op("Mul", (right, Var("sin"))))),
                Op("Add", (Op("Mul", (right, Var("cos"))), Op("Mul", (left, Var("sin"))))),
            ),
        )
        for left, right in _halves()
    )

    def check(self, found: Match) -> str:
        """Checks that the halves are halves of the last axis, and the tables half as wide."""
        width, rank = matcher.static_dim(found["x"], -1), matcher.rank(found["x"])
        if width is None or rank is None or width % 2 or not _are_halves(found, width, rank):
            return "the rotated parts are not the two halves of the last axis"
        if matcher.attribute(found.root, "axis") not in (-1, rank - 1):
            return "rotation along another axis than the last"
        tables = {matcher.static_dim(found[name], -1) for name in ("cos", "sin")}
        return "" if tables == {width // 2} else "tables that are not half as wide as the head"

    def rewrite(self, graph: ir.Graph, found: Match) -> None:
        """Doubles the tables and puts one operator in place of the group."""
        tables = [
            matcher.fresh("Concat", [found[name], found[name]], {"axis": -1})
            for name in ("cos", "sin")
        ]
        inputs = [found["x"], *(t.outputs[0] for t in tables)]
        node = matcher.fresh(vocabulary.ROTARY, inputs, domain=vocabulary.DOMAIN)
        matcher.replace(found, [*tables, node])


def _stacked(even: Op, odd: Op, joiner: str = "stack") -> Op:
    """Two values of half the width as neighbours: ``Reshape(Concat([..., 1], [..., 1]))``."""
    parts = (Op("Unsqueeze", (even,), more=True), Op("Unsqueeze", (odd,), more=True))
    return Op("Reshape", (Op("Concat", parts, name=joiner), Var("shape")), name="flat")


def _neighbours() -> tuple[tuple[Op, Op], ...]:
    """The even and the odd elements of x, as exporters take them."""
    pairs = Op("Reshape", (_X, Var("pairs")), name="paired", shared=True)
    taken = [Op("Gather", (pairs, Scalar(float(i))), name=n) for i, n in ((0, "even"), (1, "odd"))]
    split = [
        Op("Squeeze", (Op("Split", (pairs,), more=True, output=i, shared=True),), name=n, more=True)
        for i, n in enumerate(("even", "odd"))
    ]
    sliced = [Op("Slice", (_X,), name=n, more=True) for n in ("even", "odd")]
    return ((sliced[0], sliced[1]), (taken[0], taken[1]), (split[0], split[1]))


class RotateNeighbours(Rule):
    """Rotary embedding of pairs of neighbours (Su et al. 2021; GPT-J, Cohere, GLM).

    ``x * cos + stack(-x[..., 1::2], x[..., 0::2]) * sin`` -> ``pfmc::Rotary``, interleaved
    """

    patterns = tuple(
        Op(
            "Add",
            (
                Op("Mul", (_X, Var("cos"))),
                Op("Mul", (_stacked(Op("Neg", (odd,)), even), Var("sin"))),
            ),
        )
        for even, odd in _neighbours()
    )

    def check(self, found: Match) -> str:
        """Checks that the parts are the even and the odd elements of the last axis."""
        return _not_neighbours(found)

    def rewrite(self, graph: ir.Graph, found: Match) -> None:
        """Puts one operator in place of the group."""
        inputs = [found[name] for name in ("x", "cos", "sin")]
        matcher.replace(found, [_rotary(inputs, interleaved=True)])


class RotateNeighboursByParts(Rule):
    """Rotary embedding that turns the even and the odd elements one by one (complex products).

    ``stack(e * cos - o * sin, o * cos + e * sin)`` with e, o the even and odd elements of x
    -> ``pfmc::Rotary(x, cos doubled, sin doubled)``, interleaved
    """

    patterns = tuple(
        _stacked(
            Op("Sub", (Op("Mul", (even, Var("cos"))), Op("Mul", (odd, Var("sin"))))),
            Op("Add", (Op("Mul", (odd, Var("cos"))), Op("Mul", (even, Var("sin"))))),
        )
        for even, odd in _neighbours()
    )

    def check(self, found: Match) -> str:
        """Checks the parts, and that the tables are half as wide as the head."""
        width = matcher.static_dim(found["x"], -1)
        tables = [found[name] for name in ("cos", "sin")]
        fits = all(
            width is not None and matcher.static_dim(t, -1) == width // 2 and t.shape is not None
            for t in tables
        )
        return _not_neighbours(found) or (
            "" if fits else "tables that are not half as wide as the head"
        )

    def rewrite(self, graph: ir.Graph, found: Match) -> None:
        """Doubles the tables and puts one operator in place of the group."""
        new: list[ir.Node] = []
        tables = [_double(graph, found[n], new, interleaved=True) for n in ("cos", "sin")]
        node = _rotary([found["x"], *tables], interleaved=True)
        matcher.replace(found, [*new, node])


class StandardRotary(Rule):
    """The standard operator in its own words.

    ``RotaryEmbedding(x, cos, sin[, positions])`` -> ``pfmc::Rotary`` of its first
    ``rotary_embedding_dim`` elements, the tables doubled and broadcast over the heads
    """

    patterns = (Op("RotaryEmbedding", (_X, Var("cos"), Var("sin")), more=True),)

    def check(self, found: Match) -> str:
        """Checks that the widths are known."""
        width, heads = matcher.static_dim(found["x"], -1), _heads(found)
        if width is None or matcher.rank(found["x"]) not in (3, 4):
            return "a rotary embedding of unknown width"
        if matcher.rank(found["x"]) == 3 and (heads < 1 or width % heads):
            return "a rotary embedding of an unknown number of heads"
        numbered = len(found.root.inputs) > 3 and found.root.inputs[3] is not None
        if any(matcher.rank(found[n]) != (2 if numbered else 3) for n in ("cos", "sin")):
            return "tables of another rank"
        tables = {matcher.static_dim(found[name], -1) for name in ("cos", "sin")}
        turned = _turned(found)
        fits = tables == {turned // 2} and turned % 2 == 0 and turned <= _head(found)
        return "" if fits else "tables of another width"

    def rewrite(self, graph: ir.Graph, found: Match) -> None:
        """Doubles the tables and turns the first elements of each head."""
        _Writer(graph, found).write()


class _Writer:
    """Writes the standard operator as ``pfmc::Rotary`` and what prepares its operands."""

    def __init__(self, graph: ir.Graph, found: Match) -> None:
        self.graph, self.found = graph, found
        self.new: list[ir.Node] = []
        self.flat = matcher.rank(found["x"]) == 3

    def write(self) -> None:
        """Puts the new nodes in place."""
        x, turned, head = self.found["x"], _turned(self.found), _head(self.found)
        near = bool(matcher.attribute(self.found.root, vocabulary.INTERLEAVED, 0))
        if self.flat:
            x = self._add("Reshape", [x, self._ints([0, 0, _heads(self.found), head])])
        rest = None
        if turned < head:
            sizes = self._ints([turned, head - turned])
            self.new.append(matcher.fresh("Split", [x, sizes], {"axis": -1}, outputs=2))
            x, rest = self.new[-1].outputs
        y = _rotary([x, *(self._table(n, near) for n in ("cos", "sin"))], interleaved=near)
        self.new.append(y)
        if rest is not None:
            self._add("Concat", [y.outputs[0], rest], axis=-1)
        if self.flat:
            self._add("Reshape", [self.new[-1].outputs[0], self._ints([0, 0, -1])])
        matcher.replace(self.found, self.new)

    def _table(self, name: str, near: bool) -> ir.Value:
        """``[B, 1, S, D]``, or ``[B, S, 1, D]`` for flat heads."""
        table, inputs = self.found[name], self.found.root.inputs
        if len(inputs) > 3 and inputs[3] is not None:
            table = self._add("Gather", [table, inputs[3]])
        over = self._add("Unsqueeze", [table, self._ints([2 if self.flat else 1])])
        return _double(self.graph, over, self.new, interleaved=near, rank=4)

    def _add(self, op_type: str, inputs: list[ir.Value], **options: object) -> ir.Value:
        self.new.append(matcher.fresh(op_type, inputs, options))
        return self.new[-1].outputs[0]

    def _ints(self, numbers: list[int]) -> ir.Value:
        name = f"{self.found.output.name}:numbers"
        return matcher.add_array(self.graph, name, np.asarray(numbers, np.int64))


def _heads(found: Match) -> int:
    return int(matcher.attribute(found.root, "num_heads", 0))


def _head(found: Match) -> int:
    width = matcher.static_dim(found["x"], -1) or 0
    return width // _heads(found) if matcher.rank(found["x"]) == 3 else width


def _turned(found: Match) -> int:
    return int(matcher.attribute(found.root, "rotary_embedding_dim", 0)) or _head(found)


def _rotary(inputs: list[ir.Value], *, interleaved: bool) -> ir.Node:
    options = {vocabulary.INTERLEAVED: 1} if interleaved else {}
    return matcher.fresh(vocabulary.ROTARY, inputs, options, domain=vocabulary.DOMAIN)


def _double(
    graph: ir.Graph, table: ir.Value, new: list[ir.Node], *, interleaved: bool, rank: int = 0
) -> ir.Value:
    """A table of half the width for both elements of each pair; `new` takes the nodes."""
    if not interleaved:
        new.append(matcher.fresh("Concat", [table, table], {"axis": -1}))
        return new[-1].outputs[0]
    rank = rank or matcher.rank(table) or 0
    last = matcher.add_array(graph, f"{table.name}:last", np.asarray([-1], np.int64))
    shape = matcher.add_array(
        graph, f"{table.name}:flat", np.asarray([0] * (rank - 1) + [-1], np.int64)
    )
    wide = matcher.fresh("Unsqueeze", [table, last])
    pair = matcher.fresh("Concat", [wide.outputs[0]] * 2, {"axis": -1})
    flat = matcher.fresh("Reshape", [pair.outputs[0], shape])
    new.extend([wide, pair, flat])
    return flat.outputs[0]


def _not_neighbours(found: Match) -> str:
    """Why the stacked parts are not the odd and even elements of x, stacked as they lay."""
    width, rank = matcher.static_dim(found["x"], -1), matcher.rank(found["x"])
    if width is None or rank is None or width % 2:
        return "rotation of unknown width"
    stack, flat = found["stack"].producer(), found["flat"]
    assert stack is not None
    apart = [matcher.producer(v, "Unsqueeze") for v in stack.inputs]
    axes = [matcher.integers(n.inputs[1]) for n in apart if n is not None]
    along = matcher.attribute(stack, "axis") in (-1, rank)
    if not along or len(axes) != 2 or any(a not in ((-1,), (rank,)) for a in axes):
        return "the rotated parts are not stacked as neighbours"
    if matcher.static_dim(flat, -1) != width or matcher.rank(flat) != rank:
        return "the rotated parts are not joined along the last axis"
    if not _keep_rows(found):
        return "the rows are moved too"
    if [_parity(found, name, width, rank) for name in ("even", "odd")] != [0, 1]:
        return "the rotated parts are not the even and the odd elements"
    return ""


def _keep_rows(found: Match) -> bool:
    """Whether taking pairs apart and joining them keeps all axes of x but the last."""
    x, rank = found["x"], matcher.rank(found["x"]) or 0
    made = [found[name] for name in ("paired", "flat") if name in found]
    lengths = [(matcher.static_dim(x, a), matcher.static_dim(v, a))
               for v in made for a in range(rank - 1)]  # fmt: skip
    return all(a is None or b is None or a == b for a, b in lengths)


def _parity(found: Match, name: str, width: int, rank: int) -> int | None:
    """0 if the value holds the even elements of the last axis, 1 for the odd ones."""
    node = found[name].producer()
    assert node is not None
    if node.op_type == "Slice":
        parts = [matcher.integers(v) for v in node.inputs[1:]]
        if len(parts) != 4 or parts[2] not in ((-1,), (rank - 1,)) or parts[3] != (2,):
            return None
        start, end = parts[0], parts[1]
        whole = start in ((0,), (1,)) and end is not None and end[0] >= width
        return start[0] if whole and start is not None else None
    paired = found["paired"]
    if matcher.static_dim(paired, -1) != 2 or matcher.rank(paired) != rank + 1:
        return None
    if node.op_type == "Gather":
        index = matcher.scalar(node.inputs[1])
        scalar = matcher.rank(node.inputs[1]) == 0 and matcher.attribute(node, "axis", 0)
        return int(index) if index is not None and scalar in (-1, rank) else None
    split = matcher.producer(node.inputs[0], "Split")
    if split is None or len(split.outputs) != 2:
        return None
    source = matcher.see_through(node.inputs[0])
    axes = matcher.integers(node.inputs[1]) if len(node.inputs) > 1 else None
    last = matcher.attribute(split, "axis", 0) in (-1, rank) and axes in ((-1,), (rank,))
    return source.index() if last and source is not None else None


def _are_halves(found: Match, width: int, rank: int) -> bool:
    node = found["left"].producer()
    assert node is not None
    if node.op_type == "Split":
        sizes = matcher.integers(node.inputs[1]) if len(node.inputs) > 1 else (width // 2,) * 2
        last = matcher.attribute(node, "axis", 0) in (-1, rank - 1)
        return last and sizes == (width // 2,) * 2 and len(node.outputs) == 2
    return _span(found["left"], width, rank) == (0, width // 2) and _span(
        found["right"], width, rank
    ) == (width // 2, width)


def _span(value: ir.Value, width: int, rank: int) -> tuple[int, int] | None:
    """Where a Slice of step 1 along the last axis begins and ends."""
    node = value.producer()
    assert node is not None
    parts = [matcher.integers(v) for v in node.inputs[1:]]
    if len(parts) < 3 or any(p is None or len(p) != 1 for p in parts):
        return None
    numbers = [p[0] for p in parts if p is not None]
    if numbers[2] not in (-1, rank - 1) or numbers[3:] not in ([], [1]):
        return None
    start, end, _ = slice(numbers[0], numbers[1]).indices(width)
    return start, end


@dataclass(frozen=True)
class RaiseRotary(Pass):
    """Raises rotary position embeddings.

    Pairs are the two halves of a head, or neighbours (attribute `interleaved`). Queries and keys
    keep the order of the source, so a KV memory holds what the source would hold.
    """

    name: ClassVar[str] = "raise-rotary"

    def apply(self, model: ir.Model, context: Context) -> PassResult:
        """Applies the rules of this room."""
        rules: tuple[Rule, ...] = (
            StandardRotary(), RotateHalf(), RotateParts(), RotateNeighbours(),
            RotateNeighboursByParts(),
        )  # fmt: skip
        changed, declined, counts = apply_rules(model.graph, rules, self.name)
        vocabulary.install(model)
        return PassResult(model, changed, declined, {**counts})
