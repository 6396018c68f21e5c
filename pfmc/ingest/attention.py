"""What the lowerings of attention operators share: heads, masks, the standard ``Attention``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from pfmc.ingest.lowering import Lowering, float_type, last_dim, rank


@dataclass(frozen=True)
class Operands:
    """Inputs of the standard ``Attention``, 4-D.

    `past_key` and `past_value` are joined in front of `key` and `value`.
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    mask: ir.Value | None = None
    past_key: ir.Value | None = None
    past_value: ir.Value | None = None


def attend(
    low: Lowering, inputs: Operands, *, causal: bool, presents: tuple[int, ...] = (1, 2)
) -> tuple[ir.Value, ...]:
    """Standard Attention on 4-D operands: output, and present key and value if there are any.

    `presents` are the node's outputs that hold the present.
    """
    attributes = options(low, causal)
    past = inputs.past_key is not None
    if past != (inputs.past_value is not None):
        raise low.refuse("past_key and past_value must be given together")
    operands: list[ir.Value | None] = [
        inputs.query, inputs.key, inputs.value, inputs.mask, inputs.past_key, inputs.past_value
    ]  # fmt: skip
    while operands[-1] is None:
        operands.pop()
    if past:
        return tuple(low.build.ops("Attention", operands, attributes, outputs=3))
    output = low.build.op("Attention", operands, attributes)
    if not any(low.used(i) for i in presents):
        return (output,)
    return output, *(low.build.op("Identity", [v]) for v in (inputs.key, inputs.value))


def options(low: Lowering, causal: bool) -> dict[str, object]:
    """The attributes of the standard operator that follow from the node's."""
    found: dict[str, object] = {"is_causal": int(causal)}
    for name in ("scale", "softcap"):
        if number := low.number(name, 0.0):
            found[name] = number
    return found


def additive(low: Lowering, seen: ir.Value, hidden: float, like: ir.Value) -> ir.Value:
    """0 where `seen`, else `hidden`, in the element type of `like`, whose lowest is the limit."""
    kind = float_type(like)
    limit = max(hidden, float(ir.DataType.from_numpy(kind).min)) if hidden < 0 else hidden
    values = [low.build.constant(np.array(v, dtype=kind)) for v in (0.0, limit)]
    return low.build.op("Where", [seen, *values])


LOWEST = float(np.finfo(np.float32).min)


def for_rows(low: Lowering, mask: ir.Value, steps: ir.Value) -> ir.Value:
    """A mask ``[B, 1, 1, T]`` for every query.

    ONNX Runtime 1.31 does not broadcast the axis of the queries, hence the Expand.
    """
    one = low.ints(1)
    shape = low.build.op("Concat", [one, one, steps, one], {"axis": 0})
    return low.build.op("Expand", [mask, shape])


def padding_mask(low: Lowering, index: int, keys: ir.Value) -> ir.Value:
    """Input `index` of the node as an additive mask ``[B, 1, S, T]``.

    It is ``[B, T]`` or ``[B, S, T]`` (1: seen), or one-dimensional: ``[B]`` lengths, ``[2 B]``
    ends and starts, or ``[3 B + 2]`` lengths and sums. `keys` is T as a vector of one element.
    """
    mask, source = low.need(index, "mask"), low.need(0, "query")
    axes = rank(mask)
    if axes not in (1, 2, 3):
        raise low.refuse("a mask of unknown rank, or of rank 4, is not supported")
    seen = _by_ends(low, mask, keys) if axes == 1 else _as_bool(low, mask)
    axis = low.ints(1) if axes == 3 else low.ints(1, 2)
    seen = low.build.op("Unsqueeze", [seen, axis])
    made = additive(low, seen, low.number("mask_filter_value", -10000.0), source)
    return made if axes == 3 else for_rows(low, made, low.size(source, 1))


def _as_bool(low: Lowering, mask: ir.Value) -> ir.Value:
    """Shown where the mask is above zero."""
    if mask.dtype == ir.DataType.BOOL:
        return mask
    return low.build.op("Cast", [mask], {"to": int(ir.DataType.BOOL)})


def _by_ends(low: Lowering, mask: ir.Value, keys: ir.Value) -> ir.Value:
    """``[B, T]``: columns below the first B numbers and, in the form ``[2 B]``, from the next."""
    source = low.need(0, "query")
    batch = low.size(source, 0)
    ends = low.build.op("Slice", [mask, low.ints(0), batch, low.ints(0)])
    zero, one = (low.build.constant(np.array(v, np.int64)) for v in (0, 1))
    columns = low.build.op("Range", [zero, low.number_of(keys), one])
    seen = low.build.op("Less", [columns, _column(low, ends)])
    if _is_lengths(source, mask):
        return seen
    double = low.build.op("Mul", [batch, low.ints(2)])
    starts = low.build.op("Slice", [mask, batch, double, low.ints(0)])
    if last_dim(mask) is None or not isinstance(_batch(source), int):
        # only in the form [2 B] the second numbers are starts; without them these are zeros
        is_double = low.build.op("Equal", [low.size(mask, 0), double])
        filled = low.build.op("Concat", [mask, low.build.op("Sub", [mask, mask])], {"axis": 0})
        starts = low.build.op("Slice", [filled, batch, double, low.ints(0)])
        flag = low.build.op("Cast", [is_double], {"to": int(mask.dtype or ir.DataType.INT32)})
        starts = low.build.op("Mul", [starts, flag])
    from_start = low.build.op("GreaterOrEqual", [columns, _column(low, starts)])
    return low.build.op("And", [seen, from_start])


def _column(low: Lowering, numbers: ir.Value) -> ir.Value:
    long = low.build.op("Cast", [numbers], {"to": int(ir.DataType.INT64)})
    return low.build.op("Unsqueeze", [long, low.ints(1)])


def _batch(value: ir.Value) -> int | ir.SymbolicDim | None:
    return value.shape[0] if value.shape is not None and len(value.shape) else None


def _is_lengths(source: ir.Value, mask: ir.Value) -> bool:
    """Whether a one-dimensional mask holds one number for each sequence, or sums behind them."""
    batch, count = _batch(source), mask.shape[0] if mask.shape is not None else None
    if isinstance(batch, int) and isinstance(count, int):
        return count != 2 * batch
    symbols = isinstance(batch, ir.SymbolicDim) and isinstance(count, ir.SymbolicDim)
    return symbols and batch == count and str(batch) not in ("", "None", "?")
