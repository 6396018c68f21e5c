"""How a text model's graph is driven: which inputs it wants and where its KV memory sits."""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx_ir as ir

from pfmc.errors import UsageError

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_PAST = re.compile(r"past|cache", re.IGNORECASE)


@dataclass(frozen=True)
class Memory:
    """One KV memory tensor: graph input and output, and its fixed sizes ``[batch, H, past, D]``."""

    past: str
    present: str
    heads: int
    width: int


@dataclass(frozen=True)
class Drive:
    """The inputs and outputs of a text model.

    Attributes:
        ids: input of token ids ``[batch, positions]``, int64.
        mask: attention mask input, or "".
        mask_float: whether the mask is floating point.
        positions: position ids input, or "".
        types: token type ids input, or "".
        logits: output ``[batch, positions, vocabulary]``.
        memories: KV memory tensors in graph order; empty without KV memory.
        batch: fixed batch, or None.
        length: fixed number of positions a call, or None.
        vocabulary: number of tokens.
    """

    ids: str
    mask: str
    mask_float: bool
    positions: str
    types: str
    logits: str
    memories: tuple[Memory, ...]
    batch: int | None
    length: int | None
    vocabulary: int


def size_of(value: ir.Value, axis: int) -> int | None:
    """The fixed size of an axis; None if it is symbolic (a numeric name counts as fixed)."""
    if value.shape is None:
        return None
    size = value.shape[axis]
    if isinstance(size, int):
        return size
    name = str(size.value)
    return int(name) if name.isdigit() else None


def _rank(value: ir.Value) -> int:
    return -1 if value.shape is None else len(value.shape)


def _cube(value: ir.Value) -> bool:
    return _rank(value) == 4 and value.dtype in _FLOATS


def _find(graph: ir.Graph, word: str) -> ir.Value | None:
    return next((v for v in graph.inputs if word in (v.name or "").lower()), None)


def _memories(graph: ir.Graph) -> tuple[Memory, ...]:
    """Pairs past inputs with present outputs: by layer and kind if both are named so, or in order.

    Raises:
        UsageError: their numbers differ, or the past has a fixed length.
    """
    pasts = [v for v in graph.inputs if _cube(v) and _PAST.search(v.name or "")]
    presents = [v for v in graph.outputs if _cube(v)]
    if not pasts:  # a prefill graph: it hands its memory on but takes none
        return ()
    if len(pasts) != len(presents):
        raise UsageError(
            f"the model has {len(pasts)} past inputs and {len(presents)} present outputs",
            mend="export it with one present output for each past input",
        )
    fixed = next((v for v in pasts if size_of(v, 2) is not None), None)
    if fixed is not None:
        raise UsageError(
            f"KV memory {fixed.name!r} has a fixed length", mend="export it with a free past length"
        )
    keyed = {_role(v): v for v in presents}
    roles = [_role(v) for v in pasts]
    named = None not in roles and set(roles) == set(keyed) and len(keyed) == len(pasts)
    partners = [keyed[r] for r in roles] if named else presents
    return tuple(
        Memory(a.name or "", b.name or "", _required(a, 1), _required(a, 3))
        for a, b in zip(pasts, partners, strict=True)
    )


def _role(value: ir.Value) -> tuple[int, str] | None:
    """(layer, "key" or "value") as the name tells, or None."""
    found = re.search(r"(\d+)\D*?(key|value)s?$", value.name or "", re.IGNORECASE)
    return None if found is None else (int(found.group(1)), found.group(2).lower())


def _required(value: ir.Value, axis: int) -> int:
    size = size_of(value, axis)
    if size is None:
        raise UsageError(
            f"KV memory {value.name!r} has no fixed size on axis {axis}",
            mend="export it with fixed head counts and head width",
        )
    return size


def _table_rows(ids: ir.Value) -> int | None:
    """Rows of the embedding table that `ids` index, looking through casts and reshapes."""
    pending = [ids]
    for value in pending:
        for node, position in value.uses():
            table = node.inputs[0]
            if node.op_type == "Gather" and position == 1 and table is not None:
                if table.const_value is not None and len(table.const_value.shape) == 2:
                    rows = table.const_value.shape[0]
                    return rows if isinstance(rows, int) else None
            elif node.op_type in ("Cast", "Identity", "Reshape") and position == 0:
                pending.append(node.outputs[0])
    return None


def find_logits(graph: ir.Graph, rows: int | None) -> tuple[str, int]:
    """The output of token scores ``[batch, positions, vocabulary]``, and how many tokens.

    Args:
        graph: of a model that writes; rows: of its embedding table, or None.

    Raises:
        UsageError: there is none.
    """
    outputs = [v for v in graph.outputs if v.dtype in _FLOATS and _rank(v) in (3, -1)]
    outputs.sort(key=lambda v: v.name != "logits")
    for value in outputs:
        width = size_of(value, 2) if _rank(value) == 3 else rows
        width = rows if width is None else width
        if width is not None and (rows is None or width >= rows):
            return value.name or "", rows or width
    raise UsageError(
        "the model has no output of token scores [batch, positions, vocabulary]",
        mend="export it with its language-model head; encoders cannot generate text",
    )


def detect(model: ir.Model) -> Drive:
    """Finds out how `model` is driven.

    Raises:
        UsageError: it is not a language model that this room can drive.
    """
    graph = model.graph
    ids = _find(graph, "input_ids") or next(
        (v for v in graph.inputs if v.dtype is ir.DataType.INT64 and _rank(v) == 2), None
    )
    if ids is None:
        names = ", ".join(v.name or "" for v in graph.inputs)
        raise UsageError("the model has no input of token ids", where=f"inputs: {names}")
    mask, positions = _find(graph, "mask"), _find(graph, "position")
    types = _find(graph, "token_type")
    memories = _memories(graph)
    known = {v.name for v in (ids, mask, positions, types) if v is not None}
    known |= {m.past for m in memories}
    strange = [v.name for v in graph.inputs if v.name not in known]
    if strange:
        raise UsageError(f"inputs {strange} are unknown to text generation")
    logits, vocabulary = find_logits(graph, _table_rows(ids))
    return Drive(
        ids=ids.name or "",
        mask="" if mask is None else mask.name or "",
        mask_float=mask is not None and mask.dtype in _FLOATS,
        positions="" if positions is None else positions.name or "",
        types="" if types is None else types.name or "",
        logits=logits,
        memories=memories,
        batch=size_of(ids, 0),
        length=size_of(ids, 1),
        vocabulary=vocabulary,
    )
