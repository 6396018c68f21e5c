"""Lowers GroupQueryAttention exactly, padded batches and preallocated memories included.

Meaning, measured on ONNX Runtime 1.31 (its docs/ContribOperators.md leaves some of it open). Row
b of the batch has ``ends = seqlens_k[b] + 1`` keys; its S new ones stand at ``start`` and after,
where ``start`` is 0 if ``total_sequence_length == S`` (a prompt) and ``ends - S`` otherwise. The
present holds ``max(P, total_sequence_length)`` rows: the past below ``start``, the new ones, zeros.

The lowering joins the new keys behind the whole past (P rows), as the canonical ``Attention`` does,
and corrects by ``shift = start - P``, zero where every row fills its memory. Each correcting node
says in `KEY_FULL` which input stands in its place if that is taken for granted
(`pfmc.passes.full_memory`, at the canonical stage).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from pfmc.ingest.attention import LOWEST, Operands, additive, for_rows, options
from pfmc.ingest.dialects_rotary import Turn, rotate
from pfmc.ingest.lowering import Lowering, last_dim
from pfmc.ir.vocabulary import DROPPED, KEY_FULL, KEY_SHIFT

_LONG = {"to": int(ir.DataType.INT64)}


@dataclass(frozen=True)
class _Rows:
    """Where the rows of a batch stand; int64.

    Attributes:
        steps, past: S and P, ``[1]``.
        start, ends: ``[B, 1]``.
        shift: ``start - P``, ``[B, 1]``.
        prompt: whether the memory starts anew, ``[1]``.
        total: ``total_sequence_length``, ``[1]``.
    """

    steps: ir.Value
    past: ir.Value
    start: ir.Value
    ends: ir.Value
    shift: ir.Value
    prompt: ir.Value
    total: ir.Value


def group_query_attention(low: Lowering) -> None:
    """Attention with past and present, pfmc::Rotary; rows of different lengths by a mask."""
    low.forbid(k_scale=12, v_scale=13, q_norm_weight=14, k_norm_weight=15)
    low.zero("qk_output", "sliding_window_cache")
    for name in ("k_quant_type", "v_quant_type"):
        if low.word(name, "NONE") != "NONE":
            raise low.refuse("a quantised memory is not supported")
    heads, groups = low.positive("num_heads"), low.positive("kv_num_heads")
    (query, head), key, value = _separate(low, heads, groups)
    past = (low.input(3), low.input(4))
    if (past[0] is None) != (past[1] is None):
        raise low.refuse("past_key and past_value must be given together")
    for memory in past:
        _say_width(low, memory, head)
    rows = _rows(low, past[0])
    if low.integer("do_rotary"):
        turn = _turn(low, rows, head)
        query, key = rotate(low, query, turn), rotate(low, key, turn)
    operands = Operands(query, key, value, _mask(low, rows), *past)
    outputs = _attend(low, operands)
    presents = (key, value) if past[0] is None else outputs[1:3]
    placed = [_placed(low, rows, v, i + 1, past[0] is not None) for i, v in enumerate(presents)]
    low.done(low.join_heads(outputs[0]), *placed)


def _say_width(low: Lowering, past: ir.Value | None, head: int) -> None:
    """Writes the head width into the shape of a memory that leaves it open (genai exports do)."""
    if past is None or past.shape is None or len(past.shape) != 4:
        return
    if not isinstance(past.shape[3], int):
        past.shape = ir.Shape([*past.shape[:3], head])
    elif past.shape[3] != head:
        raise low.refuse(f"a memory of width {past.shape[3]} for heads of width {head}")


def _separate(
    low: Lowering, heads: int, groups: int
) -> tuple[tuple[ir.Value, int], ir.Value, ir.Value]:
    """Query (with its head width), key and value, each ``[B, heads, S, D]``."""
    query, key, value = low.need(0, "query"), low.input(1), low.input(2)
    if (key is None) != (value is None):
        raise low.refuse("key and value must be given together")
    parts = heads if key is not None else heads + 2 * groups
    width = last_dim(query)
    head = width // parts if width else (last_dim(low.input(3)) or 0)
    if head <= 0 or (width and width % parts):
        raise low.refuse("the width of a head cannot be told from the shapes")
    if key is None or value is None:
        sizes = low.ints(heads * head, groups * head, groups * head)
        query, key, value = low.build.ops("Split", [query, sizes], {"axis": -1}, outputs=3)
    split = (low.split_heads(query, heads), head)
    return split, low.split_heads(key, groups), low.split_heads(value, groups)


def _attend(low: Lowering, inputs: Operands) -> tuple[ir.Value, ...]:
    """Standard Attention; a sink or smooth softmax scales its output.

    A further score c without a value multiplies the output by ``sigmoid(logsumexp(scores) - c)``.
    """
    attributes = options(low, bool(low.integer("causal", 1)))
    operands: list[ir.Value | None] = [
        inputs.query, inputs.key, inputs.value, inputs.mask, inputs.past_key, inputs.past_value
    ]  # fmt: skip
    while operands[-1] is None:
        operands.pop()
    sink = low.input(11)
    if sink is None and not low.integer("smooth_softmax"):
        count = 3 if inputs.past_key is not None else 1
        return tuple(low.build.ops("Attention", operands, attributes, outputs=count))
    attributes["qk_matmul_output_mode"] = 2
    y, key, value, scores = low.build.ops("Attention", operands, attributes, outputs=4)
    whole = low.build.op("ReduceLogSumExp", [scores, low.ints(-1)], {"keepdims": 1})
    if sink is not None:
        whole = low.build.op("Sub", [whole, low.reshape(sink, (1, -1, 1, 1))])
    return low.build.op("Mul", [y, low.build.op("Sigmoid", [whole])]), key, value


# -- rows of different lengths ---------------------------------------------------------------------


def _rows(low: Lowering, past: ir.Value | None) -> _Rows:
    """Where the rows stand; made once for all layers of equal lengths."""
    query = low.need(0, "query")
    seqlens, total = low.need(5, "seqlens_k"), low.need(6, "total_sequence_length")
    names = ("steps", "past", "start", "ends", "shift", "prompt", "total")
    if query.shape is not None and len(query.shape) != 3:
        raise low.refuse(f"a query of {len(query.shape)} axes instead of 3")
    symbols = (_named(query, 1), "" if past is None else _named(past, 2))
    keys = [("rows", seqlens.name, total.name, *symbols, name) for name in names]
    if keys[0] in low.shared:
        return _Rows(*(low.shared[key][0] for key in keys))
    steps = low.size(query, 1)
    before = low.size(past, 2) if past is not None else low.ints(0)
    counts = low.build.op("Cast", [low.reshape(seqlens, (-1, 1))], _LONG)
    ends = low.build.op("Add", [counts, low.ints(1)])
    whole = low.build.op("Cast", [low.reshape(total, (1,))], _LONG)
    prompt = low.build.op("Equal", [whole, steps])
    later = low.build.op("Sub", [ends, steps])
    start = low.build.op("Where", [prompt, low.ints(0), later])
    shift = low.build.op("Sub", [start, before])
    _note(shift, KEY_SHIFT, "1")
    kept = [steps, before, start, ends, shift, prompt, whole]
    low.shared.update({key: (value, value) for key, value in zip(keys, kept, strict=True)})
    return _Rows(*kept)


def _named(value: ir.Value, axis: int) -> str:
    """The length of an axis, or its name; one of neither is that of this value alone."""
    dim = value.shape[axis] if value.shape is not None and len(value.shape) > axis else None
    length = dim.value if isinstance(dim, ir.SymbolicDim) else dim
    return f"of {value.name}" if length is None else f"{length}"


def _note(value: ir.Value, key: str, text: str) -> ir.Value:
    maker = value.producer()
    assert maker is not None
    maker.metadata_props[key] = text
    return value


def _say(
    value: ir.Value, dims: Sequence[int | ir.SymbolicDim | None], kind: ir.DataType | None
) -> None:
    """Writes down the shape and type of a value."""
    value.shape, value.type = ir.Shape(dims), ir.TensorType(kind or ir.DataType.FLOAT)


def _if_full(value: ir.Value, place: int | None) -> ir.Value:
    """`value`, whose node is its input `place` (or nothing) if every row fills its memory."""
    return _note(value, KEY_FULL, DROPPED if place is None else str(place))


def _turn(low: Lowering, rows: _Rows, head: int) -> Turn:
    cos, sin = low.need(7, "cos_cache"), low.need(8, "sin_cache")
    width = 2 * (last_dim(cos) or 0)
    interleaved = bool(low.integer("rotary_interleaved"))
    return Turn(cos, sin, _positions(low, rows), width, head, interleaved)


def _positions(low: Lowering, rows: _Rows) -> ir.Value:
    """The positions of the new tokens, ``[B, S]``; shared by all layers.

    In a prompt ONNX Runtime reads only the first of the given positions, and counts on from it.
    """
    given = low.input(9)
    key = ("positions", rows.shift.name, given.name if given is not None else "")
    if key in low.shared:
        return low.shared[key][0]
    if given is None:
        counted = low.build.op("Unsqueeze", [_counted(low, rows.past, rows.steps), low.ints(0)])
        made = _if_full(low.build.op("Add", [counted, rows.shift]), 0)
    else:
        zeros, ones = low.ints(0, 0), low.ints(1, 1)
        first = low.build.op("Slice", [given, zeros, ones, low.ints(0, 1)])
        anew = low.build.op("Add", [_counted(low, low.ints(0), rows.steps), first])
        made = _if_full(low.build.op("Where", [rows.prompt, anew, given]), 2)
    query = low.need(0, "query")
    dims = [*query.shape[:2]] if query.shape is not None else [None, None]
    _say(made, dims, ir.DataType.INT64)
    low.shared[key] = (made, made)
    return made


def _counted(low: Lowering, start: ir.Value, count: ir.Value) -> ir.Value:
    """``start, start + 1, ...``, `count` of them."""
    stop = low.build.op("Add", [start, count])
    one = low.build.constant(np.array(1, np.int64))
    return low.build.op("Range", [low.number_of(start), low.number_of(stop), one])


def _mask(low: Lowering, rows: _Rows) -> ir.Value:
    """Additive mask: what the rows hold, the sliding window, and the given bias."""
    query, window, bias = low.need(0, "query"), low.integer("local_window_size", -1), low.input(10)
    key = ("mask", rows.shift.name, window)
    if key not in low.shared:
        shown, place = _shown(low, rows), _place(low, rows)
        if window > 0:
            seen = _if_full(low.build.op("And", [_near(low, rows, window), shown]), 0)
            made = additive(low, seen, LOWEST, query)
        else:
            made = for_rows(low, additive(low, shown, LOWEST, query), rows.steps)
            _if_full(made, None)
        low.shared[key] = (made, place)
    made, place = low.shared[key]
    if bias is None:
        return made
    at_place = _if_full(_of_places(low, rows, bias, place), 0)
    total = low.build.op("Add", [at_place, made])
    return total if window > 0 else _if_full(total, 0)


def _is_new(low: Lowering, rows: _Rows) -> tuple[ir.Value, ir.Value]:
    """The columns ``0 ... P + S - 1``, and which of them are new."""
    key = ("columns", rows.shift.name)
    if key not in low.shared:
        length = low.build.op("Add", [rows.past, rows.steps])
        columns = _counted(low, low.ints(0), length)
        low.shared[key] = (columns, low.build.op("GreaterOrEqual", [columns, rows.past]))
    return low.shared[key]


def _place(low: Lowering, rows: _Rows) -> ir.Value:
    """``[B, T]``: the position of every column; the new ones move by the shift."""
    columns, new = _is_new(low, rows)
    move = low.build.op("Where", [new, rows.shift, low.ints(0)])
    return low.build.op("Add", [columns, move])


def _shown(low: Lowering, rows: _Rows) -> ir.Value:
    """``[B, 1, 1, T]``: old columns below `start` and new ones below `ends` (old ones are too)."""
    columns, new = _is_new(low, rows)
    old = low.build.op("Less", [columns, rows.start])
    fresh = low.build.op("Less", [_place(low, rows), rows.ends])
    shown = low.build.op("And", [fresh, low.build.op("Or", [new, old])])
    return low.build.op("Unsqueeze", [shown, low.ints(1, 2)])


def _near(low: Lowering, rows: _Rows, window: int) -> ir.Value:
    """``[S, T]`` (``[B, 1, S, T]`` with a shift): keys less than `window` positions behind."""
    columns, new = _is_new(low, rows)
    own = low.build.op("Unsqueeze", [_counted(low, rows.past, rows.steps), low.ints(1)])
    behind = low.build.op("Sub", [own, columns])
    move = low.build.op("Where", [new, low.ints(0), rows.shift])
    move = low.build.op("Unsqueeze", [move, low.ints(1, 2)])
    behind = _if_full(low.build.op("Add", [behind, move]), 0)
    return low.build.op("Less", [behind, low.build.constant(np.array(window, np.int64))])


def _of_places(low: Lowering, rows: _Rows, bias: ir.Value, place: ir.Value) -> ir.Value:
    """The columns of ``bias[B or 1, H or 1, S, total]`` in the order of the joined keys."""
    query, one = low.need(0, "query"), low.ints(1)
    batch = low.build.op("Concat", [low.size(query, 0), one, one, one], {"axis": 0})
    whole = _if_full(low.build.op("Expand", [bias, batch]), 0)
    last = low.build.op("Sub", [low.size(bias, 3), low.ints(1)])
    inside = low.build.op("Min", [place, last])
    inside = low.build.op("Unsqueeze", [inside, low.ints(1, 2)])
    heads = low.build.op("Shape", [bias], {"start": 1, "end": 3})
    shape = low.build.op("Concat", [one, heads, one], {"axis": 0})
    found = low.build.op("Expand", [inside, shape])
    return low.build.op("GatherElements", [whole, found], {"axis": 3})


def _placed(
    low: Lowering, rows: _Rows, joined: ir.Value, output: int, remembered: bool
) -> ir.Value | None:
    """The present: the joined rows at their places, zeros behind them."""
    if not low.used(output):
        return None
    if not remembered:
        return low.build.op("Identity", [joined])
    key = ("places", rows.shift.name)
    if key not in low.shared:
        length = low.build.op("Max", [rows.past, rows.total])
        places = _counted(low, low.ints(0), length)
        moved = low.build.op("Sub", [places, rows.shift])
        old = low.build.op("Less", [places, rows.start])
        source = low.build.op("Where", [old, places, moved])
        last = low.build.op("Add", [rows.past, low.build.op("Sub", [rows.steps, low.ints(1)])])
        source = low.build.op("Max", [low.build.op("Min", [source, last]), low.ints(0)])
        end = low.build.op("Add", [rows.start, rows.steps])
        filled = low.build.op("Less", [places, end])
        shaped = [low.build.op("Unsqueeze", [v, low.ints(1, 3)]) for v in (source, filled)]
        low.shared[key] = (shaped[0], shaped[1])
    source, filled = low.shared[key]
    one = low.ints(1)
    sizes = [one, low.size(joined, 1), one, low.size(joined, 3)]
    found = low.build.op("Expand", [source, low.build.op("Concat", sizes, {"axis": 0})])
    moved = _if_full(low.build.op("GatherElements", [joined, found], {"axis": 2}), 0)
    shape = low.need(2 + output, "past").shape
    if shape is not None and len(shape) == 4:
        for value in (joined, found, moved):
            kind = ir.DataType.INT64 if value is found else low.need(0, "query").dtype
            _say(value, [*shape[:2], None, shape[3]], kind)
    return _if_full(low.build.op("Where", [filled, moved, low.scalar(0.0, joined)]), 1)
