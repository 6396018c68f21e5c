"""Raises decomposed RMS and layer normalisations to the standard operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from pfmc.ir import matcher
from pfmc.ir.matcher import Constant, Either, Match, Op, Pattern, Scalar, Var
from pfmc.passes.base import Context, Pass, PassResult
from pfmc.passes.rules import Rule, apply_rules, widened

_X = Var("x")


def _mean(of: Pattern, name: str) -> Op:
    return Op("ReduceMean", (of,), name=name, more=True, shared=True)


def _square(of: Pattern) -> Pattern:
    return Either((Op("Pow", (of, Scalar(2.0))), Op("Mul", (of, of))))


def _root(variance: Pattern) -> tuple[Op, Pattern]:
    """``sqrt(variance + eps)`` and the ways to write its reciprocal."""
    shifted = Op("Add", (variance, Scalar(name="eps")))
    root = Op("Sqrt", (shifted,))
    reciprocal = Either(
        (
            Op("Reciprocal", (root,)),
            Op("Div", (Scalar(1.0), root)),
            Op("Pow", (shifted, Scalar(-0.5))),
        )
    )
    return root, reciprocal


def _normalised(x: Pattern, variance: Pattern) -> tuple[Op, ...]:
    root, reciprocal = _root(variance)
    return (Op("Mul", (x, reciprocal)), Op("Div", (x, root)))


_RMS = Either(_normalised(_X, Op("ReduceMean", (_square(_X),), name="mean", more=True)))
_CENTRED = Op("Sub", (_X, Op("ReduceMean", (_X,), name="centre", more=True)))
_VARIANCE = Op("ReduceMean", (_square(_CENTRED),), name="mean", more=True)
_LAYER = Either(_normalised(_CENTRED, _VARIANCE))


def _rounded(pattern: Pattern) -> Either:
    """`pattern`, or `pattern` cast back to the narrower type that it was computed from."""
    return Either((pattern, Op("Cast", (pattern,), name="narrow")))


class RmsNorm(Rule):
    """RMS normalisation over the last axis.

    ``x * (1 / sqrt(mean(x²) + eps)) * g`` -> ``RMSNormalization(x, g; axis=-1, epsilon=eps)``

    The square is Pow or Mul, the root Sqrt with Reciprocal or Div, or Pow(-0.5), factors in any
    order, g constant ``[width]``. When x was cast up and the result cast down again before the
    product with g, the operator takes the narrow x: it computes in float32 itself.
    """

    patterns = (Op("Mul", (_rounded(_RMS), Constant("scale"))),)

    def check(self, found: Match) -> str:
        """Checks the axes, the widths and the types."""
        return _check(found, ("mean",))

    def rewrite(self, graph: ir.Graph, found: Match) -> None:
        """Puts one operator in place of the group."""
        node = matcher.fresh(
            "RMSNormalization", [_input(found), _vector(graph, found, "scale")], _options(found)
        )
        matcher.replace(found, [node])


class RmsNormUnscaled(Rule):
    """RMS normalisation without a learnt scale, of known width.

    ``x * (1 / sqrt(mean(x²) + eps))`` -> ``RMSNormalization(x, ones)``
    """

    patterns = _normalised(_X, Op("ReduceMean", (_square(_X),), name="mean", more=True))

    def check(self, found: Match) -> str:
        """Checks the axes and that the width is known."""
        if matcher.static_dim(found["x"], -1) is None:
            return "RMS normalisation without scale, of unknown width"
        return _check(found, ("mean",))

    def rewrite(self, graph: ir.Graph, found: Match) -> None:
        """Puts one operator with a scale of ones in place of the group."""
        width = matcher.static_dim(found["x"], -1)
        assert width is not None
        kind = found["x"].dtype or ir.DataType.FLOAT
        ones = matcher.add_array(graph, f"{found.output.name}:ones", np.ones(width, kind.numpy()))
        node = matcher.fresh("RMSNormalization", [found["x"], ones], _options(found))
        matcher.replace(found, [node])


class LayerNorm(Rule):
    """Layer normalisation over the last axis.

    ``(x - mean(x)) / sqrt(mean((x - mean(x))²) + eps) * g + b``
    -> ``LayerNormalization(x, g, b; axis=-1, epsilon=eps)``; without b if nothing is added.
    """

    patterns = (
        Op("Add", (Op("Mul", (_rounded(_LAYER), Constant("scale"))), Constant("shift"))),
        Op("Mul", (_rounded(_LAYER), Constant("scale"))),
    )

    def check(self, found: Match) -> str:
        """Checks the axes, the widths and the types."""
        return _check(found, ("mean", "centre"))

    def rewrite(self, graph: ir.Graph, found: Match) -> None:
        """Puts one operator in place of the group."""
        names = [name for name in ("scale", "shift") if name in found]
        vectors = [_vector(graph, found, name) for name in names]
        node = matcher.fresh("LayerNormalization", [_input(found), *vectors], _options(found))
        matcher.replace(found, [node])


class BatchNorm(Rule):
    """Batch normalisation at inference, whose statistics are constants.

    ``BatchNormalization(x[B, C, ...], g, b, mean, var)`` -> ``x * g' + b'`` with constants
    ``g' = g / sqrt(var + eps)`` and ``b' = b - mean * g'``
    """

    patterns = (
        Op(
            "BatchNormalization",
            (_X, *(Constant(n) for n in ("scale", "shift", "average", "variance"))),
        ),
    )

    def check(self, found: Match) -> str:
        """Checks that it normalises with constants and that the rank is known."""
        if matcher.attribute(found.root, "training_mode", 0):
            return "batch normalisation in training mode"
        if any(v.uses() or v.is_graph_output() for v in found.root.outputs[1:]):
            return "batch normalisation whose statistics are read"
        return "" if matcher.rank(found["x"]) else "batch normalisation of unknown rank"

    def rewrite(self, graph: ir.Graph, found: Match) -> None:
        """Multiplies and adds one number for each channel."""
        rank = matcher.rank(found["x"])
        assert rank is not None
        arrays = [
            np.asarray(found[n].const_value.numpy(), np.float64)  # type: ignore[union-attr]
            for n in ("scale", "shift", "average", "variance")
        ]
        factor = arrays[0] / np.sqrt(arrays[3] + matcher.attribute(found.root, "epsilon", 1e-5))
        shape = (-1, *(1,) * (rank - 2))
        kind = np.float32 if found["x"].dtype is None else found["x"].dtype.numpy()
        parts = [
            matcher.add_array(graph, f"{found.output.name}:{name}", a.astype(kind).reshape(shape))
            for name, a in (("scale", factor), ("shift", arrays[1] - arrays[2] * factor))
        ]
        scaled = matcher.fresh("Mul", [found["x"], parts[0]])
        matcher.replace(found, [scaled, matcher.fresh("Add", [scaled.outputs[0], parts[1]])])


def _check(found: Match, means: tuple[str, ...]) -> str:
    for name in means:
        node = found[name].producer()
        assert node is not None
        if not _over_last_axis(node, matcher.rank(found["x"])):
            return f"mean {found[name].name!r} is not over the last axis with kept dimensions"
    for name in ("scale", "shift"):
        if name in found and not _is_vector(found[name], matcher.static_dim(found["x"], -1)):
            return f"{name} {found[name].name!r} is not one vector of the width of x"
    if "narrow" in found and _narrow_input(found) is None:
        return "the result is cast to another type than x had"
    epsilon = matcher.scalar(found["eps"]) or 0.0
    with np.errstate(all="ignore"):
        kept = float(np.float32(epsilon))
    if not np.isfinite(kept) or (kept == 0.0) != (epsilon == 0.0):
        return f"epsilon = {epsilon:g} is no number of float32, the type of the attribute"
    return widened(found)


def _over_last_axis(node: ir.Node, rank: int | None) -> bool:
    axes = matcher.attribute(node, "axes")
    if axes is None and len(node.inputs) > 1:
        axes = matcher.integers(node.inputs[1])
    last = [(-1,)] if rank is None else [(-1,), (rank - 1,)]
    return axes is not None and tuple(axes) in last and matcher.attribute(node, "keepdims", 1) == 1


def _is_vector(value: ir.Value, width: int | None) -> bool:
    assert value.const_value is not None
    shape = tuple(value.const_value.shape.numpy())
    if not shape or any(length != 1 for length in shape[:-1]):
        return False
    return shape[-1] == width if width is not None else shape[-1] > 1


def _narrow_input(found: Match) -> ir.Value | None:
    """x before the cast up, if the result is cast down to the type that it had there."""
    up = matcher.producer(found["x"], "Cast")
    down = found["narrow"].producer()
    if up is None or down is None or up.inputs[0] is None:
        return None
    kind = up.inputs[0].dtype
    real = kind is not None and kind.is_floating_point()
    return up.inputs[0] if real and kind == matcher.attribute(down, "to") else None


def _input(found: Match) -> ir.Value:
    narrow = _narrow_input(found) if "narrow" in found else None
    return found["x"] if narrow is None else narrow


def _vector(graph: ir.Graph, found: Match, name: str) -> ir.Value:
    value = found[name]
    assert value.const_value is not None
    if len(value.const_value.shape) == 1:
        return value
    flat = value.const_value.numpy().reshape(-1)
    return matcher.add_initialiser(
        graph, f"{value.name}:flat", ir.Tensor(flat), value.metadata_props
    )


def _options(found: Match) -> dict[str, int | float]:
    epsilon = matcher.scalar(found["eps"])
    assert epsilon is not None
    return {"axis": -1, "epsilon": epsilon, "stash_type": 1}


@dataclass(frozen=True)
class RaiseNorms(Pass):
    """Raises RMS and layer normalisations."""

    name: ClassVar[str] = "raise-norms"

    def apply(self, model: ir.Model, context: Context) -> PassResult:
        """Applies the rules of this file; `RmsNormUnscaled` after `RmsNorm`."""
        rules = (LayerNorm(), RmsNorm(), RmsNormUnscaled(), BatchNorm())
        changed, declined, counts = apply_rules(model.graph, rules, self.name)
        return PassResult(model, changed, declined, {**counts})
