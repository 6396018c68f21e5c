"""Raises rotary position embeddings in the half-split form to ``pfmc::Rotary``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from pfmc.ir import matcher, vocabulary
from pfmc.ir.matcher import Match, Op, Var
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
    """Raises rotary position embeddings."""

    name: ClassVar[str] = "raise-rotary"

    def apply(self, model: ir.Model, context: Context) -> PassResult:
        """Applies the rules `RotateHalf` and `RotateParts`."""
        rules = (RotateHalf(), RotateParts())
        changed, declined, counts = apply_rules(model.graph, rules, self.name)
        vocabulary.install(model)
        return PassResult(model, changed, declined, {**counts})
