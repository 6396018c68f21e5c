"""Lowers the rotary embeddings of com.microsoft to ``pfmc::Rotary`` and ``RotaryEmbedding``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from pfmc.ingest.lowering import Lowering, last_dim, rank
from pfmc.ir.vocabulary import ROTARY

_WIDEST = 1 << 16  # pairs of elements of a head


@dataclass(frozen=True)
class Turn:
    """How to rotate queries and keys: tables, positions and the part of a head they cover.

    `cos` and `sin` are ``[max positions, width / 2]``; `positions` is ``[S]`` or ``[B, S]``, or
    None where the tables are ``[B, S, width / 2]`` already; `width` of the `head` elements are
    rotated (the first ones).
    """

    cos: ir.Value
    sin: ir.Value
    positions: ir.Value | None
    width: int
    head: int
    interleaved: bool


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
    cos, sin = turn.cos, turn.sin
    if turn.positions is not None:
        cos, sin = (low.build.op("Gather", [t, turn.positions]) for t in (cos, sin))
        batch = low.build.op("Concat", [low.size(value, 0), low.ints(1, 1)], {"axis": 0})
        cos, sin = (low.build.op("Expand", [t, batch]) for t in (cos, sin))  # ORT does not
    attributes = {"interleaved": 1, "rotary_embedding_dim": turn.width % turn.head}
    return low.build.op("RotaryEmbedding", [value, cos, sin], attributes)


def _tables(low: Lowering, turn: Turn) -> tuple[ir.Value, ir.Value]:
    """cos and sin at the positions, both halves, broadcasting against ``[B, H, S, D]``."""
    place = turn.positions.name if turn.positions is not None else ""
    key = ("tables", turn.cos.name, turn.sin.name, place)
    if key not in low.shared:
        pair = [_rows(low, table, turn.positions) for table in (turn.cos, turn.sin)]
        low.shared[key] = (pair[0], pair[1])
    return low.shared[key]


def _rows(low: Lowering, table: ir.Value, positions: ir.Value | None) -> ir.Value:
    half = table if positions is None else low.build.op("Gather", [table, positions])
    whole = low.build.op("Concat", [half, half], {"axis": -1})
    if positions is not None and rank(positions) != 2:
        return whole
    return low.build.op("Unsqueeze", [whole, low.ints(1)])


def rotary_embedding(low: Lowering) -> None:
    """pfmc::Rotary, or RotaryEmbedding if interleaved; on [B, S, H * D] or [B, H, S, D]."""
    positions = low.need(1, "position_ids")
    cos, sin = low.need(2, "cos_cache"), low.need(3, "sin_cache")
    _turn(low, cos, sin, positions)


def _turn(low: Lowering, cos: ir.Value, sin: ir.Value, positions: ir.Value | None) -> None:
    low.zero("is_packed_batching")
    value = low.need(0, "input")
    width = 2 * (last_dim(low.need(2, "cos_cache")) or 0)
    flat, heads = rank(value) == 3, low.integer("num_heads")
    if rank(value) not in (3, 4) or width <= 0 or last_dim(value) is None:
        raise low.refuse("the shape of the input or of cos_cache is unknown")
    head = last_dim(value) or 0
    if flat:
        head = head // heads if heads else width
        value = low.split_heads(value, (last_dim(value) or 0) // head)
    if rank(positions) == 1 and positions is not None:
        positions = _offset_positions(low, value, positions)
    turn = Turn(cos, sin, positions, width, head, bool(low.integer("interleaved")))
    turned = rotate(low, value, turn)
    low.done(low.join_heads(turned) if flat else turned)


def _offset_positions(low: Lowering, value: ir.Value, offset: ir.Value) -> ir.Value:
    """``offset[1] + 0, 1, ... S - 1``."""
    zero, one = (low.build.constant(np.array(v, dtype=np.int64)) for v in (0, 1))
    steps = low.number_of(low.size(value, 2))
    return low.build.op("Add", [low.build.op("Range", [zero, steps, one]), offset])


def multimodal_rotary_embedding(low: Lowering) -> None:
    """As RotaryEmbedding, each frequency with the position of its section (time, row, column)."""
    positions = low.need(1, "position_ids")
    tables = [low.need(2, "cos_cache"), low.need(3, "sin_cache")]
    half = last_dim(tables[0]) or 0
    given = low.node.attributes.get("mrope_section")
    sections = list(given.as_ints()) if given is not None else []
    if len(sections) != 3 or sum(sections) != half or rank(positions) != 3 or half > _WIDEST:
        raise low.refuse("mrope_section, cos_cache and position_ids do not fit each other")
    which = _sections(sections, half, low.integer("mrope_layout"))
    key = ("mrope", tables[0].name, tables[1].name, positions.name, tuple(which))
    if key not in low.shared:
        made = [_of_sections(low, table, positions, which) for table in tables]
        low.shared[key] = (made[0], made[1])
    _turn(low, *low.shared[key], None)


def _sections(sections: list[int], half: int, layout: int) -> np.ndarray:
    """For each frequency, which of the three positions it turns with."""
    if layout == 0:
        return np.repeat(np.arange(3), sections)
    which = np.zeros(half, np.int64)
    for stream in (1, 2):
        which[stream : 3 * sections[stream] : 3] = stream
    return which


def _of_sections(
    low: Lowering, table: ir.Value, positions: ir.Value, which: np.ndarray
) -> ir.Value:
    """``[B, S, width / 2]``: the table's rows at the three positions, each column from its own."""
    rows = low.build.op("Gather", [table, positions])
    parts = [low.build.op("Gather", [rows, low.build.constant(np.array(i))]) for i in range(3)]
    chosen = parts[0]
    for i in (1, 2):
        mask = low.build.constant(np.asarray(which == i))
        chosen = low.build.op("Where", [mask, parts[i], chosen])
    return chosen
