"""Records of quantised layers as targets receive them, read from a QUANTISED model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from pfmc.errors import InputError, UsageError
from pfmc.hardware import FixedLinear, LayerStatistics, QuantisedMatrix
from pfmc.ir import matcher, provenance, vocabulary
from pfmc.ir.vocabulary import DOMAIN
from pfmc.passes.lazy_codes import LazyCodes, form_of_text

KEY_FORMAT = "pfmc.format"
"""Metadata of a QuantisedLinear whose codes are no plain integers: format, bits, scale unit."""


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
    told = node.metadata_props.get(KEY_FORMAT)
    if told is None:
        return QuantisedMatrix(array, bits, scales, block or array.shape[0])
    form = form_of_text(told)
    return QuantisedMatrix(
        array, form.bits, scales, block or array.shape[0], format=form.name, unit=form.unit
    )


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
    for node in quantised_linears(model):
        yield linear_record(node, (statistics or {}).get(str(node.name)))
        release(node)
