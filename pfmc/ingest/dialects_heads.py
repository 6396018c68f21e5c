"""Lowers MultiHeadAttention, Attention and DecoderMaskedMultiHeadAttention of com.microsoft."""

from __future__ import annotations

import onnx_ir as ir

from pfmc.ingest.attention import Operands, attend, padding_mask
from pfmc.ingest.lowering import Lowering, last_dim, rank


def multi_head_attention(low: Lowering) -> None:
    """Attention of heads; query, key and value 3-D, key and value 4-D, or packed 5-D."""
    low.forbid(cache_indirection=9)
    heads = low.positive("num_heads")
    query, key, value = _three(low, heads)
    keys = low.size(key, 2)
    past_key, past_value = low.input(6), low.input(7)
    if past_key is not None:
        keys = low.build.op("Add", [_filled(low, 8, past_key), keys])
    mask = low.input(5)
    if low.input(4) is not None:
        mask = low.add(padding_mask(low, 4, keys), mask)
    causal = low.integer("unidirectional") == 1
    finish(low, Operands(query, key, value, mask, past_key, past_value), 8, causal=causal)


def _filled(low: Lowering, index: int, past: ir.Value) -> ir.Value:
    """How much of the memory is filled, as a vector: all, or input `index` of a shared buffer."""
    count = low.input(index)
    if count is None:
        return low.size(past, 2)
    vector = low.reshape(count, (1,))
    return low.build.op("Cast", [vector], {"to": int(ir.DataType.INT64)})


def finish(low: Lowering, inputs: Operands, index: int, *, causal: bool) -> None:
    """Attention, with past and present as they are, or as buffers filled up to input `index`."""
    past = (inputs.past_key, inputs.past_value)
    if low.input(index) is None or past[0] is None or past[1] is None:
        outputs = attend(low, inputs, causal=causal)
        low.done(low.join_heads(outputs[0]), *outputs[1:])
        return
    start = _filled(low, index, past[0])
    axis, far = low.ints(2), low.ints((1 << 63) - 1)
    parts = [low.build.op("Slice", [v, low.ints(0), start, axis]) for v in past if v is not None]
    shorter = Operands(inputs.query, inputs.key, inputs.value, inputs.mask, *parts)
    outputs = attend(low, shorter, causal=causal)
    stop = low.size(outputs[1], 2)
    buffers = []
    for old, new in zip(past, outputs[1:], strict=True):
        rest = low.build.op("Slice", [old, stop, far, axis])
        buffers.append(low.build.op("Concat", [new, rest], {"axis": 2}))
    low.done(low.join_heads(outputs[0]), *buffers)


def _three(low: Lowering, heads: int) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Query, key and value, each ``[B, H, S, D]``, the joint bias added."""
    query, key, value = low.need(0, "query"), low.input(1), low.input(2)
    if rank(query) == 5:
        parts = _unpack(low, query, 3)
        query, key, value = (low.reshape(part, (0, 0, -1)) for part in parts)
    elif key is None:
        raise low.refuse("the input 'key' is missing")
    elif rank(key) == 5:
        key, value = (low.reshape(part, (0, 0, -1)) for part in _unpack(low, key, 2))
    if key is None or value is None:
        raise low.refuse("the input 'value' is missing")
    packed = low.input(2) is None
    axes = 3 if packed else rank(key)
    if axes not in (3, 4) or rank(low.need(0, "query")) not in (None, 3, 5):
        raise low.refuse("packed or unknown layouts of query, key and value are not supported")
    query, key, value = _biased(low, query, key, value, heads, axes)
    if axes == 3:
        key, value = low.split_heads(key, heads), low.split_heads(value, heads)
    return low.split_heads(query, heads), key, value


def _unpack(low: Lowering, packed: ir.Value, count: int) -> list[ir.Value]:
    """``[B, S, H, count, D]`` as `count` values ``[B, S, H, D]``."""
    attributes = {"axis": 3, "num_outputs": count}
    parts = low.build.ops("Split", [packed], attributes, outputs=count)
    return [low.build.op("Squeeze", [part, low.ints(3)]) for part in parts]


def _biased(
    low: Lowering, query: ir.Value, key: ir.Value, value: ir.Value, heads: int, axes: int
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """The three operands with their part of the joint bias ``[3 * hidden]`` added.

    Keys and values in heads already have no bias added, as in ONNX Runtime.
    """
    bias, first = low.input(3), low.need(0, "query")
    if bias is None:
        return query, key, value
    width, total = last_dim(first), last_dim(bias)
    if rank(first) == 5 and width is not None:
        width *= heads
    if width is None or total is None or total <= 2 * width:
        raise low.refuse("the bias cannot be split: shapes are unknown")
    sizes = low.ints(width, width, total - 2 * width)
    parts = low.build.ops("Split", [bias, sizes], {"axis": 0}, outputs=3)
    if axes == 4:
        return low.add(query, parts[0]), key, value
    return low.add(query, parts[0]), low.add(key, parts[1]), low.add(value, parts[2])


def fused_attention(low: Lowering) -> None:
    """MatMul of the joint projection, then Attention of heads; past and present as one tensor."""
    low.zero("do_rotary")
    source, weights = low.need(0, "input"), low.need(1, "weights")
    joint = low.add(low.build.op("MatMul", [source, weights]), low.input(2))
    self_attention(low, joint, mask=3, past=4, bias=5, filled=6)


def self_attention(
    low: Lowering, joint: ir.Value, *, mask: int, past: int, bias: int = -1, filled: int = -1
) -> None:
    """Attention of the joint projection ``[B, S, 3 * hidden]``; the inputs by index."""
    heads = low.positive("num_heads")
    parts = low.build.ops("Split", [joint, low.ints(*_qkv_sizes(low))], {"axis": -1}, outputs=3)
    query, key, value = (low.split_heads(part, heads) for part in parts)
    both = low.input(past)
    if filled >= 0 and low.input(filled) is not None:
        raise low.refuse("past and present in one shared buffer are not supported")
    keys = low.size(key, 2)
    if both is not None:
        keys = low.build.op("Add", [low.size(both, 3), keys])
    added = low.input(bias) if bias >= 0 else None
    if low.input(mask) is not None:
        added = low.add(padding_mask(low, mask, keys), added)
    operands = Operands(query, key, value, added, *_unstack(low, both))
    causal = low.integer("unidirectional") == 1
    outputs = attend(low, operands, causal=causal, presents=(1,))
    if not low.used(1):
        low.done(low.join_heads(outputs[0]))
        return
    stacked = [low.build.op("Unsqueeze", [part, low.ints(0)]) for part in outputs[1:]]
    low.done(low.join_heads(outputs[0]), low.build.op("Concat", stacked, {"axis": 0}))


def _qkv_sizes(low: Lowering) -> tuple[int, ...]:
    """The widths of query, key and value in the joint projection."""
    given, width = low.node.attributes.get("qkv_hidden_sizes"), last_dim(low.input(1))
    if given is not None and given.type == ir.AttributeType.INTS and len(given.as_ints()) == 3:
        return tuple(given.as_ints())
    if width is None or width % 3:
        raise low.refuse("the widths of query, key and value cannot be told from the weights")
    return (width // 3,) * 3


def _unstack(low: Lowering, past: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    """Past keys and values, which come as one tensor ``[2, B, H, P, D]``."""
    if past is None:
        return None, None
    halves = low.build.ops("Split", [past], {"axis": 0, "num_outputs": 2}, outputs=2)
    key, value = (low.build.op("Squeeze", [half, low.ints(0)]) for half in halves)
    return key, value


def decoder_attention(low: Lowering) -> None:
    """Attention of one query, over given keys or over a buffer filled up to a given length."""
    low.forbid(beam_width=8, cache_indirection=9)
    low.zero("output_qk")
    heads, key = low.positive("num_heads"), low.need(1, "key")
    query, _, _ = _biased_query(low)
    mask, past_key, past_value = low.input(4), low.input(5), low.input(6)
    crossed = rank(key) == 4
    if crossed == (past_key is not None) or (not crossed and low.input(7) is None):
        raise low.refuse("its inputs are neither those of cross nor of self-attention in a buffer")
    value = low.need(2, "value")
    if not crossed:
        _, key, value = _biased_query(low)
        key, value = low.split_heads(key, heads), low.split_heads(value, heads)
    keys = low.size(key, 2)
    if past_key is not None:
        keys = low.build.op("Add", [_filled(low, 7, past_key), keys])
    if low.input(3) is not None:
        mask = low.add(padding_mask(low, 3, keys), mask)
    query = low.split_heads(query, heads)
    finish(low, Operands(query, key, value, mask, past_key, past_value), 7, causal=False)


def _biased_query(low: Lowering) -> tuple[ir.Value, ir.Value, ir.Value]:
    query, key, value = (low.need(i, n) for i, n in enumerate(("query", "key", "value")))
    bias, width = low.input(10), last_dim(query)
    if bias is None:
        return query, key, value
    if width is None or rank(key) == 4:
        raise low.refuse("the bias cannot be split: shapes are unknown")
    sizes = low.ints(width, width, (last_dim(bias) or 3 * width) - 2 * width)
    parts = low.build.ops("Split", [bias, sizes], {"axis": 0}, outputs=3)
    return low.add(query, parts[0]), low.add(key, parts[1]), low.add(value, parts[2])
