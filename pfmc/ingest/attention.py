"""Lowers the attention operators of com.microsoft to standard ``Attention`` and ``pfmc::Rotary``.

Meaning: onnxruntime docs/ContribOperators.md. Sequences of one batch are taken to have equal
lengths (attention_mask all ones), as a compiled decoder runs them; `seqlens_k` and
`total_sequence_length` then follow from the shapes of the inputs and are not read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from pfmc.ingest.lowering import Lowering, last_dim, rank
from pfmc.ir.vocabulary import ROTARY


@dataclass(frozen=True)
class Turn:
    """How to rotate queries and keys: tables, positions and the part of a head they cover.

    `cos` and `sin` are ``[max positions, width / 2]``; `positions` is ``[S]`` or ``[B, S]``;
    `width` of the `head` elements are rotated (the first ones).
    """

    cos: ir.Value
    sin: ir.Value
    positions: ir.Value | None
    width: int
    head: int
    interleaved: bool


def group_query_attention(low: Lowering) -> None:
    """GroupQueryAttention with packed or separate QKV, rotary inside, past and present."""
    low.forbid(head_sink=11, k_scale=12, v_scale=13)
    low.zero("smooth_softmax", "k_quant_type", "v_quant_type", "softcap")
    heads, groups = low.positive("num_heads"), low.positive("kv_num_heads")
    query, key, value = _separate(low, heads, groups)
    past_key, past_value = low.input(3), low.input(4)
    for past in (past_key, past_value):
        _say_width(past, query[1])
    if low.integer("do_rotary"):
        turn = _turn_of(low, past_key, query[1])
        query4, key4 = rotate(low, query[0], turn), rotate(low, key, turn)
    else:
        query4, key4 = query[0], key
    window = low.integer("local_window_size", -1)
    mask = low.input(10)
    if window > 0:
        mask = low.add(_window_mask(low, query4, past_key, window), mask)
    outputs = _attend(low, (query4, key4, value, mask, past_key, past_value), causal=True)
    low.done(low.join_heads(outputs[0]), *outputs[1:])


def _say_width(past: ir.Value | None, head: int) -> None:
    """Writes the head width into the shape of a memory that leaves it open (genai exports do)."""
    if past is None or past.shape is None or len(past.shape) != 4:
        return
    if not isinstance(past.shape[3], int):
        past.shape = ir.Shape([*past.shape[:3], head])


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


def _turn_of(low: Lowering, past_key: ir.Value | None, head: int) -> Turn:
    cos, sin = low.need(7, "cos_cache"), low.need(8, "sin_cache")
    positions = low.input(9)
    if positions is None:
        positions = _positions(low, low.need(0, "query"), past_key)
    width = 2 * (last_dim(cos) or 0)
    return Turn(cos, sin, positions, width, head, bool(low.integer("rotary_interleaved")))


def _positions(low: Lowering, query: ir.Value, past: ir.Value | None) -> ir.Value:
    """The positions ``past, past + 1, ...`` of the new tokens, ``[S]``; shared by all layers."""
    key = ("positions", query.shape and str(query.shape[1]), past is not None)
    if key not in low.shared:
        start = low.size(past, 2) if past is not None else low.ints(0)
        stop = low.build.op("Add", [start, low.size(query, 1)])
        none = low.build.constant(np.array([0], dtype=np.int64))
        ends = [low.build.op("Squeeze", [v, none]) for v in (start, stop)]
        one = low.build.constant(np.array(1, dtype=np.int64))
        made = low.build.op("Range", [*ends, one])
        low.shared[key] = (made, made)
    return low.shared[key][0]


def rotate(low: Lowering, value: ir.Value, turn: Turn) -> ir.Value:
    """``value[B, H, S, D]`` with its first `turn.width` elements per head rotated."""
    if not 0 < turn.width <= turn.head:
        raise low.refuse(f"the rotary table turns {turn.width} of {turn.head} elements of a head")
    if turn.interleaved:
        return _rotate_interleaved(low, value, turn)
    cos, sin = _tables(low, turn)
    if turn.width == turn.head:
        return low.build.own(ROTARY, [value, cos, sin])
    sizes = low.ints(turn.width, turn.head - turn.width)
    turned, rest = low.build.ops("Split", [value, sizes], {"axis": -1}, outputs=2)
    turned = low.build.own(ROTARY, [turned, cos, sin])
    return low.build.op("Concat", [turned, rest], {"axis": -1})


def _rotate_interleaved(low: Lowering, value: ir.Value, turn: Turn) -> ir.Value:
    """Pairs of neighbours instead of halves: the standard operator does it."""
    cos, sin = (low.build.op("Gather", [t, turn.positions]) for t in (turn.cos, turn.sin))
    if rank(turn.positions) != 2:
        batch = low.build.op("Concat", [low.size(value, 0), low.ints(1, 1)], {"axis": 0})
        cos, sin = (low.build.op("Expand", [t, batch]) for t in (cos, sin))
    attributes = {"interleaved": 1, "rotary_embedding_dim": turn.width % turn.head}
    return low.build.op("RotaryEmbedding", [value, cos, sin], attributes)


def _tables(low: Lowering, turn: Turn) -> tuple[ir.Value, ir.Value]:
    """cos and sin at the positions, both halves, broadcasting against ``[B, H, S, D]``."""
    assert turn.positions is not None
    key = ("tables", turn.cos.name, turn.sin.name, turn.positions.name)
    if key not in low.shared:
        pair = [_rows(low, table, turn.positions) for table in (turn.cos, turn.sin)]
        low.shared[key] = (pair[0], pair[1])
    return low.shared[key]


def _rows(low: Lowering, table: ir.Value, positions: ir.Value) -> ir.Value:
    half = low.build.op("Gather", [table, positions])
    whole = low.build.op("Concat", [half, half], {"axis": -1})
    if rank(positions) != 2:
        return whole
    return low.build.op("Unsqueeze", [whole, low.ints(1)])


def _window_mask(low: Lowering, query: ir.Value, past: ir.Value | None, window: int) -> ir.Value:
    """``[S, T]`` additive mask that hides keys `window` or more positions back."""
    steps = low.size(query, 2)
    start = low.size(past, 2) if past is not None else low.ints(0)
    total = low.build.op("Add", [start, steps])
    none, one = low.ints(0), low.build.constant(np.array(1, dtype=np.int64))
    first, last = (low.build.op("Squeeze", [v, none]) for v in (start, total))
    zero = low.build.constant(np.array(0, dtype=np.int64))
    rows = low.build.op("Range", [first, last, one])
    columns = low.build.op("Range", [zero, last, one])
    back = low.build.op("Sub", [low.build.op("Unsqueeze", [rows, low.ints(1)]), columns])
    seen = low.build.op("Less", [back, low.build.constant(np.array(window, dtype=np.int64))])
    return _additive(low, seen, float(np.finfo(np.float32).min))


def _additive(low: Lowering, seen: ir.Value, hidden: float) -> ir.Value:
    """0 where `seen`, else `hidden`, in the query's element type."""
    source = low.need(0, "query")
    dtype = source.dtype.numpy() if source.dtype is not None else np.dtype(np.float32)
    limit = max(hidden, float(np.finfo(dtype).min)) if dtype.kind == "f" else hidden
    values = [low.build.constant(np.array(v, dtype=dtype)) for v in (0.0, limit)]
    return low.build.op("Where", [seen, *values])


def _attend(
    low: Lowering,
    inputs: tuple[ir.Value, ir.Value, ir.Value, ir.Value | None, ir.Value | None, ir.Value | None],
    *,
    causal: bool,
) -> tuple[ir.Value, ...]:
    """Standard Attention on 4-D operands: output, present key, present value."""
    attributes: dict[str, object] = {"is_causal": int(causal)}
    scale = low.number("scale", 0.0)
    if scale:
        attributes["scale"] = scale
    present = low.used(1) or low.used(2)
    past = inputs[4] is not None
    if past != (inputs[5] is not None):
        raise low.refuse("past_key and past_value must be given together")
    operands: list[ir.Value | None] = list(inputs)
    while operands[-1] is None:
        operands.pop()
    if past or not present:
        count = 3 if past else 1
        return tuple(low.build.ops("Attention", operands, attributes, outputs=count))
    output = low.build.op("Attention", operands, attributes)
    return output, low.build.op("Identity", [inputs[1]]), low.build.op("Identity", [inputs[2]])


def multi_head_attention(low: Lowering) -> None:
    """MultiHeadAttention with separate query, key and value (3-D, or key and value 4-D)."""
    low.forbid(past_sequence_length=8, cache_indirection=9)
    heads = low.positive("num_heads")
    query, key, value = low.need(0, "query"), low.need(1, "key"), low.need(2, "value")
    if rank(query) not in (None, 3) or rank(key) not in (3, 4) or rank(value) != rank(key):
        raise low.refuse("packed or unknown layouts of query, key and value are not supported")
    query, key, value = _biased(low, query, key, value)
    if rank(low.need(1, "key")) == 3:
        key, value = low.split_heads(key, heads), low.split_heads(value, heads)
    mask = low.input(5)
    if low.input(4) is not None:
        mask = low.add(_padding_mask(low, 4), mask)
    operands = (low.split_heads(query, heads), key, value, mask, low.input(6), low.input(7))
    outputs = _attend(low, operands, causal=bool(low.integer("unidirectional")))
    low.done(low.join_heads(outputs[0]), *outputs[1:])


def _biased(
    low: Lowering, query: ir.Value, key: ir.Value, value: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """The three operands with their part of the joint bias ``[3 * hidden]`` added."""
    bias, width = low.input(3), last_dim(query)
    if bias is None:
        return query, key, value
    total = last_dim(bias)
    if width is None or total is None or total <= 2 * width or rank(key) != 3:
        raise low.refuse("the bias cannot be split: shapes are unknown")
    sizes = low.ints(width, width, total - 2 * width)
    parts = low.build.ops("Split", [bias, sizes], {"axis": 0}, outputs=3)
    return low.add(query, parts[0]), low.add(key, parts[1]), low.add(value, parts[2])


def fused_attention(low: Lowering) -> None:
    """Attention of com.microsoft: the projections of query, key and value are inside."""
    low.forbid(past_sequence_length=6)
    low.zero("do_rotary", "past_present_share_buffer")
    heads = low.positive("num_heads")
    source, weights = low.need(0, "input"), low.need(1, "weights")
    joint = low.add(low.build.op("MatMul", [source, weights]), low.input(2))
    parts = low.build.ops("Split", [joint, low.ints(*_qkv_sizes(low))], {"axis": -1}, outputs=3)
    query, key, value = (low.split_heads(part, heads) for part in parts)
    mask = low.input(5)
    if low.input(3) is not None:
        mask = low.add(_padding_mask(low, 3), mask)
    past_key, past_value = _unstack(low)
    operands = (query, key, value, mask, past_key, past_value)
    outputs = _attend(low, operands, causal=bool(low.integer("unidirectional")))
    if not low.used(1):
        low.done(low.join_heads(outputs[0]))
        return
    both = [low.build.op("Unsqueeze", [part, low.ints(0)]) for part in outputs[1:]]
    low.done(low.join_heads(outputs[0]), low.build.op("Concat", both, {"axis": 0}))


def _qkv_sizes(low: Lowering) -> tuple[int, ...]:
    """The widths of query, key and value in the joint projection."""
    given, width = low.node.attributes.get("qkv_hidden_sizes"), last_dim(low.input(1))
    if given is not None and given.type == ir.AttributeType.INTS and len(given.as_ints()) == 3:
        return tuple(given.as_ints())
    if width is None or width % 3:
        raise low.refuse("the widths of query, key and value cannot be told from the weights")
    return (width // 3,) * 3


def _unstack(low: Lowering) -> tuple[ir.Value | None, ir.Value | None]:
    """Past keys and values, which come as one tensor ``[2, B, H, P, D]``."""
    past = low.input(4)
    if past is None:
        return None, None
    halves = low.build.ops("Split", [past], {"axis": 0, "num_outputs": 2}, outputs=2)
    key, value = (low.build.op("Squeeze", [half, low.ints(0)]) for half in halves)
    return key, value


def _padding_mask(low: Lowering, index: int) -> ir.Value:
    """Input `index`, a mask ``[B, T]`` (1: seen), as an additive mask ``[B, 1, S, T]``.

    ONNX Runtime 1.31 does not broadcast the axis of the queries, hence the Expand.
    """
    mask = low.need(index, "mask")
    if rank(mask) != 2:
        raise low.refuse("only a mask of shape [batch, keys] is supported")
    seen = low.build.op("Cast", [mask], {"to": int(ir.DataType.BOOL)})
    seen = low.build.op("Unsqueeze", [seen, low.ints(1, 2)])
    mask = _additive(low, seen, low.number("mask_filter_value", -10000.0))
    steps = low.size(low.need(0, "query"), 1)
    one = low.ints(1)
    shape = low.build.op("Concat", [one, one, steps, one], {"axis": 0})
    return low.build.op("Expand", [mask, shape])


def rotary_embedding(low: Lowering) -> None:
    """RotaryEmbedding on ``[B, S, H * D]`` or ``[B, H, S, D]``."""
    low.zero("is_packed_batching")
    value, positions = low.need(0, "input"), low.need(1, "position_ids")
    cos, sin = low.need(2, "cos_cache"), low.need(3, "sin_cache")
    width = 2 * (last_dim(cos) or 0)
    flat, heads = rank(value) == 3, low.integer("num_heads")
    if rank(value) not in (3, 4) or width <= 0 or last_dim(value) is None:
        raise low.refuse("the shape of the input or of cos_cache is unknown")
    head = last_dim(value) or 0
    if flat:
        head = head // heads if heads else width
        value = low.split_heads(value, (last_dim(value) or 0) // head)
    if rank(positions) == 1:
        positions = _offset_positions(low, value, positions)
    turn = Turn(cos, sin, positions, width, head, bool(low.integer("interleaved")))
    turned = rotate(low, value, turn)
    low.done(low.join_heads(turned) if flat else turned)


def _offset_positions(low: Lowering, value: ir.Value, offset: ir.Value) -> ir.Value:
    """``offset[1] + 0, 1, ... S - 1``."""
    zero, one = (low.build.constant(np.array(v, dtype=np.int64)) for v in (0, 1))
    steps = low.build.op("Squeeze", [low.size(value, 2), low.ints(0)])
    return low.build.op("Add", [low.build.op("Range", [zero, steps, one]), offset])
