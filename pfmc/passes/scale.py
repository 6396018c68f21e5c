"""Moves a factor of each input from the weights that read it into what makes it.

``y = x @ W`` equals ``(x / s) @ (s W)``. Where x comes from a norm or, on a path that is linear in
it, from another fixed linear, 1 / s is folded there: the float model stays the same while the
matrix to round, and the inputs to convert, become easier (SmoothQuant arXiv:2211.10438, AWQ
arXiv:2306.00978).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pfmc.hardware import LayerStatistics, Limits
from pfmc.ir import matcher, vocabulary
from pfmc.ir.vocabulary import DOMAIN, Stage
from pfmc.layer_rounding import Seen, round_layer
from pfmc.passes import weights
from pfmc.passes.base import Context, Declined, Pass, PassResult
from pfmc.passes.quantise import Quantise

Doubles = npt.NDArray[np.float64]

RATIOS = (0.25, 0.5, 0.75, 1.0)
"""Exponents tried: ``s = rms(x)^a / max|W|^(1 - a)``, its geometric mean made 1."""
MARGIN = 0.99
"""A scaling must lower the loss to this share of what it is without."""
_NORMS = frozenset({"RMSNormalization", "LayerNormalization"})
_TOKEN_PEAK = 3.5  # largest of a position's inputs over their root mean square, about


@dataclass(frozen=True)
class Group:
    """Fixed linears that read one value, and what makes it.

    Attributes:
        readers: they, and nobody else.
        maker: a norm, or the fixed linear behind a linear path.
        places: for each input of the readers the output of `maker` that it is, ``[in]``.
    """

    readers: tuple[ir.Node, ...]
    maker: ir.Node
    places: npt.NDArray[np.intp]


@dataclass(frozen=True)
class Scale(Pass):
    """CANONICAL -> CANONICAL with 1 / s folded into norms and fixed linears where it pays.

    Paths: norm -> its readers; v -> attention -> o, heads in groups sharing their factor; up ->
    SwiGLU -> down. The exponent is searched for each group of readers; the loss is what their
    rounding, as the quantise pass will do it, adds to their outputs on the calibration data, with
    the noise of their input converter. A fixed linear whose outputs are scaled no longer equals a
    value of the source file, so `pfmc verify` compares what follows it instead. Values that a KV
    memory holds are scaled alike.

    Attributes:
        quantise: how the layers will be rounded.
    """

    name: ClassVar[str] = "scale"
    needs: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.CANONICAL
    statistics: ClassVar[frozenset[str]] = frozenset({"input_power", "input_moment"})

    quantise: Quantise = field(default_factory=Quantise)

    def apply(self, model: ir.Model, context: Context) -> PassResult:
        """Searches and folds, group after group in the order of the graph."""
        declined, changed, gains = [], 0, []
        limits = context.limits
        assert limits is not None, "scaling needs a target's limits"
        for group in groups(model.graph):
            name = str(group.readers[0].name)
            seen = context.statistics.get(name)
            if seen is None:
                declined.append(Declined(self.name, name, "calibration has not seen this layer"))
                continue
            search = _Search(group, seen, self.quantise, limits)
            factor, before, after = search.best()
            if factor is None:
                reason = "no scaling lowers the calibrated loss"
                declined.append(Declined(self.name, name, reason))
                continue
            fold(model.graph, group, factor)
            context.progress(f"scale: {name}: loss {before:.4g} -> {after:.4g}")
            gains.append(after / before)
            changed += 1
        notes: dict[str, float | int | str] = {"groups": changed + len(declined)}
        if gains:
            notes["loss_ratio_mean"] = float(np.exp(np.mean(np.log(gains))))
        return PassResult(model, changed, tuple(declined), notes)


# -- where ---------------------------------------------------------------------------------------


def groups(graph: ir.Graph) -> Iterator[Group]:
    """The groups of fixed linears whose input may be scaled, in the order of the graph."""
    done: set[ir.Value] = set()
    for node in list(graph):
        x = node.inputs[0] if _is_linear(node) else None
        if x is None or x in done:
            continue
        done.add(x)
        readers = tuple(use.node for use in x.uses())
        if x.is_graph_output() or not all(_is_linear(r) and r.inputs[0] is x for r in readers):
            continue
        found = _maker(x, _width(readers[0]))
        if found is not None:
            yield Group(readers, *found)


def _is_linear(node: ir.Node) -> bool:
    return vocabulary.is_op(node, vocabulary.FIXED_LINEAR, DOMAIN)


def _width(linear: ir.Node) -> int:
    assert linear.inputs[1] is not None
    return weights.shape_of(linear.inputs[1])[0]


def _maker(x: ir.Value, width: int) -> tuple[ir.Node, npt.NDArray[np.intp]] | None:
    node = x.producer()
    if node is None:
        return None
    straight = np.arange(width)
    if node.op_type in _NORMS and not node.domain and _is_vector(node.inputs[1], width):
        last = matcher.attribute(node, "axis", -1) == -1
        plain = all(not o.uses() for o in node.outputs[1:])
        return (node, straight) if last and plain else None
    if vocabulary.is_op(node, vocabulary.SWIGLU, DOMAIN):
        up = _sole_linear(node.inputs[1])
        return None if up is None else (up, straight)
    return _through_attention(node, width)


def _is_vector(value: ir.Value | None, width: int) -> bool:
    return (
        value is not None and value.const_value is not None and weights.shape_of(value) == (width,)
    )


def _sole_linear(value: ir.Value | None) -> ir.Node | None:
    """The fixed linear that makes `value`, if nobody else reads it."""
    node = None if value is None else value.producer()
    if node is None or value is None or not _is_linear(node):
        return None
    return node if len(value.uses()) == 1 and not value.is_graph_output() else None


def _through_attention(node: ir.Node, width: int) -> tuple[ir.Node, npt.NDArray[np.intp]] | None:
    """``o <- Reshape <- Transpose <- Attention <- Transpose <- Reshape <- v``."""
    attention = _back(node)
    if attention is None or not vocabulary.is_op(attention, "Attention"):
        return None
    value = attention.inputs[2] if len(attention.inputs) > 2 else None
    turned = None if value is None else value.producer()
    if value is None or turned is None or turned.op_type != "Transpose" or len(value.uses()) != 1:
        return None
    split = turned.inputs[0].producer() if turned.inputs[0] is not None else None
    if split is None or split.op_type != "Reshape":
        return None
    maker = _sole_linear(split.inputs[0])
    heads = matcher.constant(split.inputs[1])
    if maker is None or heads is None or heads.size != 4 or int(heads[-1]) <= 0:
        return None
    assert maker.inputs[1] is not None
    held, head = weights.shape_of(maker.inputs[1])[1], int(heads[-1])
    if width % held or held % head:
        return None
    place = np.arange(held).reshape(-1, head)
    return maker, np.repeat(place, width // held, axis=0).reshape(-1)


def _back(node: ir.Node) -> ir.Node | None:
    """What makes the input of ``Reshape(Transpose(.))``, if nobody else reads it on the way."""
    for kind in ("Reshape", "Transpose"):
        x = node.inputs[0]
        if node.op_type != kind or x is None or len(x.uses()) != 1:
            return None
        if kind == "Transpose" and list(matcher.attribute(node, "perm", ())) != [0, 2, 1, 3]:
            return None
        before = x.producer()
        if before is None:
            return None
        node = before
    return node


# -- how much --------------------------------------------------------------------------------------


class _Search:
    """The loss of one group as a function of its factors."""

    def __init__(
        self, group: Group, seen: LayerStatistics, quantise: Quantise, limits: Limits
    ) -> None:
        self.group, self.quantise, self.limits = group, quantise, limits
        self.power, self.moment = seen.input_power, seen.input_moment
        self.top = float(2 ** (limits.input_bits - 1) - 1)
        self.matrices = [_weight(r) for r in group.readers]
        rms = np.sqrt(np.maximum(self.power, 1e-12 * max(float(self.power.max()), 1e-30)))
        peak = seen.input_peak / float(rms.max())
        self.peak = _TOKEN_PEAK if quantise.per_token(limits) else peak
        self.rms = self._shared(rms)

    def _shared(self, values: Doubles) -> Doubles:
        """The root mean square over inputs that come from one place of the maker."""
        places = self.group.places
        count = np.bincount(places)
        return np.asarray(np.sqrt(np.bincount(places, values**2) / np.maximum(count, 1)))

    def best(self) -> tuple[Doubles | None, float, float]:
        """Factors of the maker's outputs, None if none pays; loss before and after."""
        before = least = self.loss(np.ones_like(self.rms))
        found: Doubles | None = None
        for ratio in RATIOS:
            factor = self.factor(ratio)
            loss = self.loss(factor)
            if loss < least:
                found, least = factor, loss
        if found is None or not least < MARGIN * before:
            return None, before, before
        return found, before, least

    def factor(self, ratio: float) -> Doubles:
        """``rms^a / max|W|^(1-a)`` for each output of the maker; 1 where nobody cares."""
        peak = np.zeros_like(self.rms)
        for matrix in self.matrices:
            np.maximum.at(peak, self.group.places, np.abs(matrix).max(axis=1))
        alive = (peak > 0) & (self.rms > 0)
        value = np.ones_like(self.rms)
        value[alive] = self.rms[alive] ** ratio / peak[alive] ** (1 - ratio)
        value[alive] /= np.exp(np.mean(np.log(value[alive]))) if alive.any() else 1.0
        return np.clip(value, 1e-3, 1e3).astype(np.float32).astype(np.float64)

    def loss(self, factor: Doubles) -> float:
        """Wrong power of all readers' outputs, over their power."""
        s = factor[self.group.places]
        power = self.power / s**2
        moment = None if self.moment is None else self.moment / np.outer(s, s)
        total = 0.0
        for reader, matrix in zip(self.group.readers, self.matrices, strict=True):
            plan = self.quantise.plan_of(str(reader.name), self.limits)
            scaled = matrix * s[:, None]
            seen = Seen(power, moment)
            made = round_layer(scaled, plan.form, plan.group, plan.search, seen)
            step = self.peak * float(np.sqrt(power).max()) / self.top
            converter = step**2 / 12 * float((scaled**2).sum())
            output = _output_power(scaled, seen)
            total += made.diagnostics["code_error_relative"] + converter / max(output, 1e-30)
        return total


def _output_power(weight: Doubles, seen: Seen) -> float:
    if seen.moment is not None:
        return float((weight * (seen.moment @ weight)).sum())
    assert seen.power is not None
    return float(seen.power @ (weight**2).sum(axis=1))


def _weight(linear: ir.Node) -> Doubles:
    assert linear.inputs[1] is not None
    assert linear.inputs[1].const_value is not None
    return np.asarray(linear.inputs[1].const_value.numpy()).astype(np.float64)


# -- folding ---------------------------------------------------------------------------------------


def fold(graph: ir.Graph, group: Group, factor: Doubles) -> None:
    """Divides the maker's outputs by `factor` and multiplies the readers' rows by it."""
    rows = factor[group.places].astype(np.float32)[:, None]
    for reader in group.readers:
        _replace(graph, reader, 1, lambda w: w * rows)
    inverse = factor
    made = group.maker
    indices = (1, 2) if len(made.inputs) > 2 else (1,)
    for index in indices:
        if made.inputs[index] is not None:
            _replace(graph, made, index, lambda w: (w / inverse).astype(w.dtype))
    made.metadata_props.pop(vocabulary.KEY_VALUE, None)


def _replace(graph: ir.Graph, node: ir.Node, index: int, of: Any) -> None:
    old = node.inputs[index]
    assert old is not None
    value = weights.derived(graph, old, weights.shape_of(old), of)
    node.replace_input_with(index, value)
    if not old.uses() and not old.is_graph_output() and old.name:
        graph.initializers.pop(old.name, None)
