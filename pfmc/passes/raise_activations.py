"""Raises decomposed activations: GELU in its two forms, SiLU, and the gated SwiGLU."""

from __future__ import annotations

from dataclasses import dataclass
from math import pi, sqrt
from typing import ClassVar

import onnx_ir as ir

from pfmc.ir import matcher, vocabulary
from pfmc.ir.matcher import Either, Match, Op, Pattern, Scalar, Var
from pfmc.passes.base import Context, Pass, PassResult
from pfmc.passes.rules import Rule, apply_rules, widened

_X = Var("x")


def _halved(inner: Pattern) -> tuple[Op, ...]:
    """``0.5 * x * inner`` in any grouping."""
    half = Scalar(0.5)
    return (
        Op("Mul", (Op("Mul", (_X, half)), inner)),
        Op("Mul", (Op("Mul", (_X, inner)), half)),
        Op("Mul", (_X, Op("Mul", (inner, half)))),
        Op("Div", (Op("Mul", (_X, inner)), Scalar(2.0))),
    )


_ERF = Op(
    "Erf",
    (Either((Op("Div", (_X, Scalar(sqrt(2)))), Op("Mul", (_X, Scalar(1 / sqrt(2)))))),),
)
_CUBE = Either(
    (
        Op("Pow", (_X, Scalar(3.0))),
        Op("Mul", (_X, Op("Mul", (_X, _X)))),
        Op("Mul", (_X, Op("Pow", (_X, Scalar(2.0))))),
    )
)
_SQUARE = Either((Op("Pow", (_X, Scalar(2.0))), Op("Mul", (_X, _X))))
_BENT = Either(
    (
        Op("Add", (_X, Op("Mul", (_CUBE, Scalar(0.044715))))),
        Op("Mul", (_X, Op("Add", (Op("Mul", (_SQUARE, Scalar(0.044715))), Scalar(1.0))))),
    )
)
_TANH = Op("Tanh", (Op("Mul", (_BENT, Scalar(sqrt(2 / pi)))),))


class _Gelu(Rule):
    approximate: ClassVar[str]

    def check(self, found: Match) -> str:
        """Checks that the result has the axes of x."""
        return widened(found)

    def rewrite(self, graph: ir.Graph, found: Match) -> None:
        """Puts one operator in place of the group."""
        options = {"approximate": self.approximate}
        matcher.replace(found, [matcher.fresh("Gelu", [found["x"]], options)])


class GeluErf(_Gelu):
    """``0.5 x (1 + erf(x / √2))`` -> ``Gelu(x; approximate="none")`` (Hendrycks, Gimpel 2016)."""

    approximate = "none"
    patterns = _halved(Op("Add", (_ERF, Scalar(1.0))))


class GeluTanh(_Gelu):
    """``0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))`` -> ``Gelu(x; approximate="tanh")``."""

    approximate = "tanh"
    patterns = _halved(Op("Add", (_TANH, Scalar(1.0))))


class Silu(Rule):
    """``x * sigmoid(x)`` -> ``Swish(x)``; with ``sigmoid(a x)``, ``Swish(x; alpha=a)``."""

    patterns = (
        Op("Mul", (_X, Op("Sigmoid", (_X,)))),
        Op("Mul", (_X, Op("Sigmoid", (Op("Mul", (_X, Scalar(name="alpha"))),)))),
    )

    def check(self, found: Match) -> str:
        """Checks that the result has the axes of x."""
        return widened(found)

    def rewrite(self, graph: ir.Graph, found: Match) -> None:
        """Puts one operator in place of the group."""
        alpha = matcher.scalar(found["alpha"]) if "alpha" in found else 1.0
        matcher.replace(found, [matcher.fresh("Swish", [found["x"]], {"alpha": alpha})])


class SwiGlu(Rule):
    """``Swish(gate) * up`` -> ``pfmc::SwiGLU(gate, up)`` (Shazeer 2020), with alpha 1 only.

    A product of Swish with a constant, or with a value that is broadcast, stays as it is.
    """

    patterns = (Op("Mul", (Op("Swish", (Var("gate"),), name="active"), Var("up"))),)

    def check(self, found: Match) -> str:
        """Checks alpha and that gate and up have the same width."""
        node = found["active"].producer()
        assert node is not None
        if matcher.attribute(node, "alpha", 1.0) != 1.0:
            return "gated by a Swish with alpha other than 1"
        if matcher.is_constant(found["up"]):
            return "Swish is scaled by a constant, not gated"
        widths = {matcher.static_dim(found[name], -1) for name in ("gate", "up")}
        if len(widths) != 1 or matcher.rank(found["gate"]) != matcher.rank(found["up"]):
            return "gate and up differ in width or rank"
        return ""

    def rewrite(self, graph: ir.Graph, found: Match) -> None:
        """Puts one operator in place of the group."""
        inputs = [found["gate"], found["up"]]
        node = matcher.fresh(vocabulary.SWIGLU, inputs, domain=vocabulary.DOMAIN)
        matcher.replace(found, [node])


@dataclass(frozen=True)
class RaiseActivations(Pass):
    """Raises GELU, SiLU and SwiGLU."""

    name: ClassVar[str] = "raise-activations"

    def apply(self, model: ir.Model, context: Context) -> PassResult:
        """Applies the rules `GeluErf`, `GeluTanh`, `Silu` and then `SwiGlu`."""
        rules = (GeluErf(), GeluTanh(), Silu(), SwiGlu())
        changed, declined, counts = apply_rules(model.graph, rules, self.name)
        vocabulary.install(model)
        return PassResult(model, changed, declined, {**counts})
