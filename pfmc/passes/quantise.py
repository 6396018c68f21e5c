"""Quantising: fixed linears get integer codes and their inputs a scale; nothing is computed yet.

The codes of a layer are lazy (`pfmc.passes.lazy_codes`), unless they were solved on calibration
data before (`pfmc.passes.solve`), which then are read.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pfmc import formats, rounding
from pfmc.errors import InfeasibleError, UsageError
from pfmc.hardware import LayerStatistics, Limits
from pfmc.ir import matcher, provenance, vocabulary
from pfmc.ir.vocabulary import DOMAIN, Stage
from pfmc.layer_rounding import LayerPlan, Search
from pfmc.passes.base import Context, Pass, PassResult
from pfmc.passes.lazy_codes import LazyCodes, LazyMatrix, Slot
from pfmc.passes.records import (
    KEY_FORMAT,
    linear_record,
    linear_records,
    matrix_of,
    quantised_linears,
    release,
)

if TYPE_CHECKING:
    from pfmc.passes.recipe import Recipe

__all__ = [
    "LayerFormat", "LazyCodes", "Quantise", "linear_record", "linear_records", "matrix_of",
    "quantised_linears", "release",
]  # fmt: skip

WIDEST = 8
_NOTHING = 1e-6  # share of the largest input below which a percentile is that of zeros


@dataclass(frozen=True)
class LayerFormat:
    """What differs in layers whose name fits the glob `pattern`; None keeps the common choice."""

    pattern: str
    weight_bits: int | Literal["target"] | None = None
    granularity: Literal["channel", "tile"] | None = None
    search: Search | None = None
    format: formats.Name | None = None
    group: int | None = None


@dataclass(frozen=True)
class Quantise(Pass):
    """CANONICAL -> QUANTISED.

    ``FixedLinear(x, w, b)`` -> ``QuantisedLinear(Quantise(x), codes, scale, b)``; the Quantise is
    shared by the linears that read the same x. Options: see `pfmc.passes.recipe.Quantising`.
    """

    name: ClassVar[str] = "quantise"
    needs: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.QUANTISED
    statistics: ClassVar[frozenset[str]] = frozenset({"input_quantiles", "input_power"})

    weight_bits: int | Literal["target"] = 4
    granularity: Literal["channel", "tile"] = "channel"
    search: Search = "clip"
    inputs: Literal["static", "token", "target"] = "static"
    input_range: Literal["mse", "peak", "percentile"] = "mse"
    layers: tuple[LayerFormat, ...] = ()
    format: formats.Name = "int"
    group: int = 0
    percentile: float = 99.99
    prefix: Literal["float", "rounded"] = "float"
    iterations: int = 200

    @classmethod
    def of(cls, recipe: Recipe) -> Quantise:
        """The pass that a recipe's ``[quantise]`` section describes."""
        section = recipe.quantise
        rules = tuple(LayerFormat(g, **r.model_dump()) for g, r in section.layers.items())
        others = ("layers", "scaling", "kv_bits", "budget")
        plain = {k: v for k, v in section.model_dump().items() if k not in others}
        return cls(**plain, layers=rules)

    def with_bits(self, widths: Mapping[str, int]) -> Quantise:
        """The same with the weight bits of single layers set."""
        rules = tuple(LayerFormat(_literal(n), weight_bits=b) for n, b in widths.items())
        return replace(self, layers=(*self.layers, *rules))

    def apply(self, model: ir.Model, context: Context) -> PassResult:
        """Puts lazy codes in place of every fixed linear's weight.

        Raises:
            UsageError: no target was chosen, or static inputs lack calibration statistics.
            InfeasibleError: the target cannot hold codes this wide, of this format, or inputs
                scaled per token.
        """
        if context.limits is None:
            raise UsageError("quantising needs a target's limits", where="pass quantise")
        self.check_inputs(context.limits)
        work = _Work(model.graph, self, context.limits, context)
        nodes = vocabulary.fixed_linears(model)
        for node in nodes:
            work.replace(node)
        work.drop_dead_weights()
        vocabulary.install(model)
        return PassResult(model, len(nodes), (), work.notes())

    def check_inputs(self, limits: Limits) -> None:
        """Refuses inputs scaled per token where the target's converters are fixed."""
        if limits.static_inputs and self.inputs == "token":
            raise InfeasibleError(
                "the target's input converters have fixed ranges, but the recipe scales inputs "
                "afresh for every token",
                where="[quantise] inputs",
                mend="set quantise.inputs=static and calibration.source=self",
            )

    def _searches(self) -> set[str | None]:
        return {self.search, *(rule.search for rule in self.layers)}

    @property
    def compensates(self) -> bool:
        """Whether some layer may need second moments of its input."""
        return bool(self._searches() & {"compensate", "learned"})

    @property
    def sequential(self) -> bool:
        """Whether layers are rounded one after the other on the outputs of those before."""
        return "learned" in self._searches() or (self.prefix == "rounded" and self.compensates)

    def per_token(self, limits: Limits) -> bool:
        """Whether inputs are scaled afresh for every position."""
        token = self.inputs == "target" and not limits.static_inputs
        return token or self.inputs == "token"

    def range_of(self, seen: LayerStatistics, top: float) -> float:
        """The range ±r of a static input converter; the peak if a percentile lies among zeros."""
        if self.input_range == "mse":
            return rounding.best_range(seen.input_quantiles, seen.input_peak, top)
        if self.input_range == "percentile":
            chance = self.percentile / 100.0
            reach = rounding.quantile(seen.input_quantiles, seen.input_peak, chance)
            return reach if reach > _NOTHING * seen.input_peak else seen.input_peak
        return seen.input_peak

    def plan_of(self, layer: str, limits: Limits) -> LayerPlan:
        """Format, group and search of a layer; group 0 is per channel.

        Raises:
            InfeasibleError: the target holds no such codes.
        """
        bits, granularity, search = self.weight_bits, self.granularity, self.search
        name, group = self.format, self.group
        for rule in self.layers:
            if fnmatch.fnmatchcase(layer, rule.pattern):
                bits = rule.weight_bits if rule.weight_bits is not None else bits
                granularity = rule.granularity or granularity
                search = rule.search or search
                name = rule.format or name
                group = rule.group if rule.group is not None else group
        tile = limits.tile_inputs if granularity == "tile" else 0
        form = _form(name, bits, layer, limits)
        return LayerPlan(form, form.block or group or tile, search)


def _literal(name: str) -> str:
    """A glob that fits `name` alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _form(name: str, bits: int | Literal["target"], layer: str, limits: Limits) -> formats.Format:
    if name not in limits.formats:
        raise InfeasibleError(
            f"the target holds no {name!r} codes, only {', '.join(limits.formats)}",
            where=layer, mend=f"set quantise.format={limits.formats[0]}",
        )  # fmt: skip
    fixed = formats.least_bits(name)
    width = _width(bits if fixed is None else fixed, layer, limits)
    return formats.of("int" if name == "midrise" and width == WIDEST else name, width)


def _width(bits: int | Literal["target"], layer: str, limits: Limits) -> int:
    low, high = limits.weight_bits
    width = min(high, WIDEST) if bits == "target" else bits
    if not low <= width <= high:
        nearest = min(max(width, low), high)
        raise InfeasibleError(
            f"the target holds weight codes of {low} to {high} bits, not {width}",
            where=layer,
            mend=f"set quantise.weight_bits={nearest}, or quantise.layers.<glob>.weight_bits",
        )
    return width


# -- the graph -----------------------------------------------------------------------------------


class _Work:
    """One run of the pass."""

    def __init__(
        self, graph: ir.Graph, options: Quantise, limits: Limits, context: Context
    ) -> None:
        self.graph, self.options, self.limits, self.context = graph, options, limits, context
        self.slot = Slot()
        self.inputs: dict[ir.Value, ir.Node] = {}
        self.weights: set[ir.Value] = set()
        self.weights_of: dict[tuple[str, int], int] = {}
        self.clipping: dict[ir.Value, dict[str, float]] = {}

    def replace(self, node: ir.Node) -> None:
        """Turns one FixedLinear into a QuantisedLinear behind its Quantise."""
        x, weight, bias = node.inputs
        assert x is not None
        assert weight is not None
        assert weight.const_value is not None
        layer = str(node.name)
        plan = self.options.plan_of(layer, self.limits)
        form, group = plan.form, plan.group
        inputs, outputs = weight.const_value.shape.numpy()
        self.weights_of[form.name, form.bits] = (
            self.weights_of.get((form.name, form.bits), 0) + inputs * outputs
        )
        converted = self._quantised(x, node)
        lazy = LazyMatrix(
            layer, provenance.weight(weight) or str(weight.name), weight.const_value, plan,
            self.context.statistics.get(layer), self.context.progress, self.slot,
            self.context.matrices.get(layer), self.clipping.get(x, {}),
        )  # fmt: skip
        shape = (outputs,) if group == 0 else (-(-inputs // group), outputs)
        made = LazyCodes(lazy, False, (inputs, outputs), form.nibbles)
        codes = self._constant(f"{layer}:codes", made, weight)
        scale = self._constant(f"{layer}:scale", LazyCodes(lazy, True, shape), weight)
        new = matcher.fresh(
            vocabulary.QUANTISED_LINEAR, [converted, codes, scale, bias],
            {"axis": 0 if group else 1, "block_size": group}, domain=DOMAIN,
        )  # fmt: skip
        self.weights.add(weight)
        matcher.substitute(node, [], [new], node.outputs[0])
        new.name = layer
        if form.name != "int" or form.bits not in (4, 8):
            new.metadata_props[KEY_FORMAT] = f"{form.name} {form.bits} 1.0"

    def _constant(self, stem: str, tensor: LazyCodes, weight: ir.Value) -> ir.Value:
        name = matcher.unique_name(self.graph, stem)
        tensor.name = name
        return matcher.add_initialiser(self.graph, name, tensor, dict(weight.metadata_props))

    def _quantised(self, x: ir.Value, reader: ir.Node) -> ir.Value:
        """x behind its Quantise node, made before its first reader."""
        made = self.inputs.get(x)
        if made is None:
            made = self.inputs[x] = self._converter(x, reader)
            made.name = f"{x.name}:{made.op_type}"
            output = made.outputs[0]
            output.name = matcher.unique_name(self.graph, f"{x.name}:quantised")
            output.shape, output.type = x.shape, x.type
            if scope := provenance.scope(reader):
                made.metadata_props[vocabulary.KEY_SCOPE] = scope
            self.graph.insert_before(reader, made)
        provenance.union_sources(made, [reader])
        return made.outputs[0]

    def _converter(self, x: ir.Value, reader: ir.Node) -> ir.Node:
        top = {"top": float(2 ** (self.limits.input_bits - 1) - 1)}
        if self.options.per_token(self.limits):
            return matcher.fresh(vocabulary.QUANTISE_TOKEN, [x], top, domain=DOMAIN)
        step = self._static_step(x, str(reader.name), top["top"])
        name = matcher.unique_name(self.graph, f"{x.name}:scale")
        scale = matcher.add_initialiser(self.graph, name, ir.tensor(step, name=name))
        return matcher.fresh(vocabulary.QUANTISE, [x, scale], top, domain=DOMAIN)

    def _static_step(self, x: ir.Value, layer: str, top: float) -> npt.NDArray[np.float32]:
        seen = self.context.statistics.get(layer)
        if seen is None:
            raise UsageError(
                "static input scales need calibration statistics, and this layer has none",
                where=layer,
                mend="set calibration.source=self, or quantise.inputs=token if the target can",
            )
        reach = self.options.range_of(seen, top)
        share = rounding.share_above(seen.input_quantiles, seen.input_peak, reach)
        self.clipping[x] = {"input_range": reach, "input_clipped_share": share}
        return np.asarray(reach / top if reach > 0 else 1.0, np.float32)

    def drop_dead_weights(self) -> None:
        """Removes the weights that only fixed linears read."""
        for value in self.weights:
            if not value.uses() and not value.is_graph_output() and value.name:
                self.graph.initializers.pop(value.name, None)

    def notes(self) -> dict[str, float | int | str]:
        """Weights by width, and input converters."""
        widths: dict[str, float | int | str] = {
            f"weights_of_{bits}_bits" + ("" if name == "int" else f"_{name}"): n
            for (name, bits), n in sorted(self.weights_of.items())
        }
        return {**widths, "input_converters": len(self.inputs), **self._clipped()}

    def _clipped(self) -> dict[str, float | int | str]:
        """The largest share of inputs that a static range clips, if there is one."""
        shares = [facts["input_clipped_share"] for facts in self.clipping.values()]
        return {"input_clipped_share_most": max(shares)} if shares else {}
