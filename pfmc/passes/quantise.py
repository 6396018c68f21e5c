"""Quantising: fixed linears get integer codes and their inputs a scale; nothing is computed yet.

The codes of a layer are lazy: they are made when somebody reads them, and only the last layer's
are kept, so a model of any size is quantised with one layer in memory.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pfmc import compensation, rounding
from pfmc.errors import InfeasibleError, InputError, UsageError
from pfmc.hardware import FixedLinear, LayerStatistics, Limits, QuantisedMatrix
from pfmc.ir import matcher, provenance, vocabulary
from pfmc.ir.vocabulary import DOMAIN, Stage
from pfmc.passes.base import Context, Pass, PassResult

if TYPE_CHECKING:
    from pfmc.passes.recipe import Recipe

WIDEST = 8

Search = Literal["compensate", "clip", "plain"]


@dataclass(frozen=True)
class LayerFormat:
    """What differs in layers whose name fits the glob `pattern`; None keeps the common choice."""

    pattern: str
    weight_bits: int | Literal["target"] | None = None
    granularity: Literal["channel", "tile"] | None = None
    search: Search | None = None


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
    input_range: Literal["mse", "peak"] = "mse"
    layers: tuple[LayerFormat, ...] = ()

    @classmethod
    def of(cls, recipe: Recipe) -> Quantise:
        """The pass that a recipe's ``[quantise]`` section describes."""
        section = recipe.quantise
        rules = tuple(LayerFormat(g, **r.model_dump()) for g, r in section.layers.items())
        plain = {k: v for k, v in section.model_dump().items() if k != "layers"}
        return cls(**plain, layers=rules)

    def apply(self, model: ir.Model, context: Context) -> PassResult:
        """Puts lazy codes in place of every fixed linear's weight.

        Raises:
            UsageError: no target was chosen, or static inputs lack calibration statistics.
            InfeasibleError: the target cannot hold codes this wide or inputs scaled per token.
        """
        if context.limits is None:
            raise UsageError("quantising needs a target's limits", where="pass quantise")
        self._check_inputs(context.limits)
        work = _Work(model.graph, self, context.limits, context)
        nodes = vocabulary.fixed_linears(model)
        for node in nodes:
            work.replace(node)
        work.drop_dead_weights()
        vocabulary.install(model)
        return PassResult(model, len(nodes), (), work.notes())

    def _check_inputs(self, limits: Limits) -> None:
        if limits.static_inputs and self.inputs == "token":
            raise InfeasibleError(
                "the target's input converters have fixed ranges, but the recipe scales inputs "
                "afresh for every token",
                where="[quantise] inputs",
                mend="set quantise.inputs=static and calibration.source=self",
            )

    @property
    def compensates(self) -> bool:
        """Whether some layer may need second moments of its input."""
        return "compensate" in (self.search, *(rule.search for rule in self.layers))

    def format_of(self, layer: str, limits: Limits) -> tuple[int, int, Search]:
        """(weight bits, group, search) of a layer; group 0 is per channel."""
        bits, granularity, search = self.weight_bits, self.granularity, self.search
        for rule in self.layers:
            if fnmatch.fnmatchcase(layer, rule.pattern):
                bits = rule.weight_bits if rule.weight_bits is not None else bits
                granularity = rule.granularity or granularity
                search = rule.search or search
        group = limits.tile_inputs if granularity == "tile" else 0
        return _width(bits, layer, limits), group, search


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


# -- codes on demand -----------------------------------------------------------------------------


class _Slot:
    """Room for the codes of one layer: asking for another lets go of the first.

    Threads may share it: the pair is set at once, so at worst a layer is rounded twice.
    """

    def __init__(self) -> None:
        self.held: tuple[_LazyMatrix, QuantisedMatrix] | None = None


@dataclass(frozen=True, eq=False)
class _LazyMatrix:
    """The codes and scales of one weight, made together when one of them is read."""

    layer: str
    weight: str
    tensor: ir.TensorProtocol
    bits: int
    group: int
    search: Search
    statistics: LayerStatistics | None
    progress: Callable[[str], None]
    slot: _Slot = field(repr=False)

    def matrix(self) -> QuantisedMatrix:
        """Rounds the weight, unless it is the last one that was rounded."""
        held = self.slot.held
        if held is not None and held[0] is self:
            return held[1]
        self.slot.held = held = None
        made = self._round()
        self.slot.held = (self, made)
        return made

    def release(self) -> None:
        """Lets go of the codes if the slot still holds them."""
        held = self.slot.held
        if held is not None and held[0] is self:
            self.slot.held = None

    def _round(self) -> QuantisedMatrix:
        array = self.tensor.numpy()
        try:
            codes, scale, diagnostics = self._rounded(array)
        except InputError as error:
            raise InputError(
                error.what, where=f"tensor {self.weight!r}, {error.where}", mend=error.mend
            ) from error
        finally:
            release = getattr(self.tensor, "release", None)
            if release is not None:
                release()
        group = self.group or int(array.shape[0])
        return QuantisedMatrix(codes, self.bits, scale, group, diagnostics)

    def _rounded(
        self, array: npt.NDArray[Any]
    ) -> tuple[rounding.Codes, rounding.Floats, dict[str, float]]:
        """Codes, scales and diagnostics of the weight."""
        seen = self.statistics
        moment = None if seen is None else seen.input_moment
        if self.search == "compensate" and moment is not None:
            found = compensation.compensate(array, self.bits, self.group, moment=moment)
            if found.failed:
                self.progress(f"quantise: {self.layer}: moments not definite, clip search kept")
            return found.codes, found.scale, {
                "clip_error_relative": found.clip_error, "code_error_relative": found.error,
                "compensated_outputs": found.kept,
            }  # fmt: skip
        if self.search == "compensate":
            self.progress(f"quantise: {self.layer}: no second moments, clip search kept")
        codes, scale = rounding.quantise(
            array, self.bits, self.group, search=self.search != "plain",
            input_power=None if seen is None else seen.input_power,
        )  # fmt: skip
        return codes, scale, {}


class LazyCodes(ir.LazyTensor):
    """A tensor of codes or scales that knows the matrix it belongs to."""

    def __init__(self, source: _LazyMatrix, scale: bool, shape: tuple[int, ...]) -> None:
        self.source = source
        kind = ir.DataType.INT4 if source.bits <= 4 else ir.DataType.INT8
        kind = ir.DataType.FLOAT if scale else kind
        read = self._scale if scale else self._codes
        super().__init__(read, kind, ir.Shape(shape))

    def _scale(self) -> ir.TensorProtocol:
        shape = self.shape.numpy()
        return ir.tensor(self.source.matrix().scale.reshape(shape), name=self.name)

    def _codes(self) -> ir.TensorProtocol:
        codes = self.source.matrix().codes
        if self.dtype is ir.DataType.INT8:
            return ir.tensor(codes, name=self.name)
        packed = rounding.pack_int4(codes)
        return ir.PackedTensor(packed, ir.DataType.INT4, shape=codes.shape, name=self.name)


# -- the graph -----------------------------------------------------------------------------------


class _Work:
    """One run of the pass."""

    def __init__(
        self, graph: ir.Graph, options: Quantise, limits: Limits, context: Context
    ) -> None:
        self.graph, self.options, self.limits, self.context = graph, options, limits, context
        self.slot = _Slot()
        self.inputs: dict[ir.Value, ir.Node] = {}
        self.weights: set[ir.Value] = set()
        self.bits: dict[int, int] = {}

    def replace(self, node: ir.Node) -> None:
        """Turns one FixedLinear into a QuantisedLinear behind its Quantise."""
        x, weight, bias = node.inputs
        assert x is not None
        assert weight is not None
        assert weight.const_value is not None
        layer = str(node.name)
        bits, group, search = self.options.format_of(layer, self.limits)
        inputs, outputs = weight.const_value.shape.numpy()
        self.bits[bits] = self.bits.get(bits, 0) + inputs * outputs
        seen = self.context.statistics.get(layer)
        lazy = _LazyMatrix(
            layer, provenance.weight(weight) or str(weight.name), weight.const_value, bits, group,
            search, seen, self.context.progress, self.slot,
        )  # fmt: skip
        shape = (outputs,) if group == 0 else (-(-inputs // group), outputs)
        codes = self._constant(f"{layer}:codes", LazyCodes(lazy, False, (inputs, outputs)), weight)
        scale = self._constant(f"{layer}:scale", LazyCodes(lazy, True, shape), weight)
        new = matcher.fresh(
            vocabulary.QUANTISED_LINEAR, [self._quantised(x, node), codes, scale, bias],
            {"axis": 0 if group else 1, "block_size": group}, domain=DOMAIN,
        )  # fmt: skip
        self.weights.add(weight)
        matcher.substitute(node, [], [new], node.outputs[0])
        new.name = layer

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
        token = self.options.inputs == "target" and not self.limits.static_inputs
        if token or self.options.inputs == "token":
            return matcher.fresh(vocabulary.QUANTISE_TOKEN, [x], top, domain=DOMAIN)
        step = self._static_step(str(reader.name), top["top"])
        name = matcher.unique_name(self.graph, f"{x.name}:scale")
        scale = matcher.add_initialiser(self.graph, name, ir.tensor(step, name=name))
        return matcher.fresh(vocabulary.QUANTISE, [x, scale], top, domain=DOMAIN)

    def _static_step(self, layer: str, top: float) -> npt.NDArray[np.float32]:
        seen = self.context.statistics.get(layer)
        if seen is None:
            raise UsageError(
                "static input scales need calibration statistics, and this layer has none",
                where=layer,
                mend="set calibration.source=self, or quantise.inputs=token if the target can",
            )
        peak = seen.input_peak
        if self.options.input_range == "mse":
            peak = rounding.best_range(seen.input_quantiles, peak, top)
        return np.asarray(peak / top if peak > 0 else 1.0, np.float32)

    def drop_dead_weights(self) -> None:
        """Removes the weights that only fixed linears read."""
        for value in self.weights:
            if not value.uses() and not value.is_graph_output() and value.name:
                self.graph.initializers.pop(value.name, None)

    def notes(self) -> dict[str, float | int | str]:
        """Weights by width, and input converters."""
        widths = {f"weights_of_{b}_bits": n for b, n in sorted(self.bits.items())}
        return {**widths, "input_converters": len(self.inputs)}


# -- records for targets -------------------------------------------------------------------------


def quantised_linears(model: ir.Model) -> list[ir.Node]:
    """The QuantisedLinear nodes of `model` in graph order."""
    return [n for n in model.graph if vocabulary.is_op(n, vocabulary.QUANTISED_LINEAR, DOMAIN)]


def linear_record(node: ir.Node, statistics: LayerStatistics | None = None) -> FixedLinear:
    """The record of one QuantisedLinear as a target receives it; rounds its weight now.

    Args:
        node: of a QUANTISED model, made here or loaded from a file.
        statistics: of this layer, if calibration took any.

    Raises:
        InputError: the weight holds NaN or infinity; names tensor and index.
    """
    x, codes, _, bias = node.inputs
    assert x is not None
    assert codes is not None
    assert bias is not None
    assert bias.const_value is not None
    offset = np.asarray(bias.const_value.numpy()).astype(np.float32)
    if not np.isfinite(offset).all():
        index = int(np.argmin(np.isfinite(offset)))
        raise InputError(
            f"a bias holds {offset[index]}",
            where=f"tensor {provenance.weight(bias) or bias.name!r}, index [{index}]",
            mend="mend the checkpoint: no hardware can hold this number",
        )
    bits, step = _input_format(x, str(node.name))
    return FixedLinear(
        name=str(node.name), matrix=matrix_of(node), bias=offset if offset.any() else None,
        input_bits=bits, input_scale=step, statistics=statistics,
        sources=provenance.sources(node), weight=provenance.weight(codes) or str(codes.name),
    )  # fmt: skip


def matrix_of(node: ir.Node) -> QuantisedMatrix:
    """Codes and scales of a QuantisedLinear."""
    codes, scale = (v.const_value for v in node.inputs[1:3] if v is not None)
    assert codes is not None
    assert scale is not None
    if isinstance(codes, LazyCodes):
        return codes.source.matrix()
    block = int(node.attributes["block_size"].value)
    array = np.asarray(codes.numpy()).astype(np.int8)
    scales = np.asarray(scale.numpy(), np.float32).reshape(-1, array.shape[1])
    bits = 4 if codes.dtype is ir.DataType.INT4 else 8
    return QuantisedMatrix(array, bits, scales, block or array.shape[0])


def _input_format(x: ir.Value, layer: str) -> tuple[int, float | None]:
    """Width and step of a linear's input."""
    maker = x.producer()
    if maker is None or maker.domain != DOMAIN or "top" not in maker.attributes:
        raise UsageError("the input of a quantised linear is not quantised", where=layer)
    bits = round(np.log2(float(maker.attributes["top"].value) + 1)) + 1
    if maker.op_type == vocabulary.QUANTISE_TOKEN:
        return int(bits), None
    step = matcher.constant(maker.inputs[1])
    assert step is not None
    return int(bits), float(step)


def release(node: ir.Node) -> None:
    """Lets go of a layer's codes if they are still held."""
    for value in node.inputs[1:3]:
        if value is not None and isinstance(value.const_value, LazyCodes):
            value.const_value.source.release()


def linear_records(
    model: ir.Model, statistics: Mapping[str, LayerStatistics] | None = None
) -> Iterator[FixedLinear]:
    """The records of all layers in graph order, one in memory at a time."""
    nodes: Iterable[ir.Node] = quantised_linears(model)
    for node in nodes:
        yield linear_record(node, (statistics or {}).get(str(node.name)))
        release(node)
