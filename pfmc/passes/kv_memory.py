"""Gives causal decoders a memory of keys and values, with canonical names."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np
import onnx_ir as ir

from pfmc.ir import matcher, shapes, vocabulary
from pfmc.ir.shapes import Shapes
from pfmc.passes.base import Context, Declined, Pass, PassResult
from pfmc.passes.full_memory import NOTE, assume_full
from pfmc.passes.kv_names import KINDS, Names, unpadded
from pfmc.passes.masks import KEY_MASK, KEY_SINK, KEY_WINDOW, data_inputs
from pfmc.passes.rules import where

_CARRIERS = frozenset(
    [
        "Cast",
        "Unsqueeze",
        "Squeeze",
        "Reshape",
        "Expand",
        "Transpose",
        "Concat",
        "Cos",
        "Sin",
        "Neg",
    ]
)
_WITH_CONSTANT = frozenset({"Mul", "Div", "Add", "Sub", "MatMul"})


_RESIZERS = frozenset({"Tile", "Slice", "Split"})


class _RefusedError(Exception):
    """The model is left as it is, with the reason."""

    def __init__(self, reason: str, at: ir.Node | None = None) -> None:
        super().__init__(reason)
        self.at = at


@dataclass(frozen=True)
class KvMemory(Pass):
    """Gives a causal decoder its memory of keys and values.

    Every causal ``Attention`` of the model gets the graph inputs ``past_key_values.{i}.key`` and
    ``.value`` ``[batch, kv_heads, past, head_dim]`` and the outputs ``present.{i}.key`` and
    ``.value``. Positions counted from zero (``Range(0, S)``, or the first S rows of a table) are
    counted from ``past``; a padding mask ``[batch, S]`` becomes ``[batch, past + S]``. With an
    empty past the model computes what it did. A model that has its memory already only gets the
    canonical names (`pfmc.passes.kv_names`); the old ones stand in ``pfmc.value`` of the graph's
    inputs and outputs. A sink's key and value are not remembered.

    Sequences that a GroupQueryAttention takes to be of different lengths are taken to be full.

    Declined: encoders, models of fixed length, masks that are neither causal nor padding, and
    positions that are used for more than a rotary or a table.

    Attributes:
        past: the name of the new dimension.
    """

    name: ClassVar[str] = "kv-memory"
    past: str = "past"

    def apply(self, model: ir.Model, context: Context) -> PassResult:
        """Wires the memory, or names it, or says why not."""
        full = assume_full(model.graph)
        notes = tuple(Declined(self.name, where(node), NOTE) for node in full[:1])
        work = _Work(model.graph, self.past)
        try:
            changed = work.run()
        except _RefusedError as refusal:
            at = where(refusal.at) if refusal.at is not None else str(model.graph.name or "model")
            refused = (*notes, Declined(self.name, at, str(refusal)))
            return PassResult(model, len(full) + work.named, refused)
        layers = len(work.attentions)
        return PassResult(model, len(full) + changed, notes, {"layers": layers})


_Present: TypeAlias = tuple[str, shapes.Dims, ir.Value]


class _Work:
    def __init__(self, graph: ir.Graph, past: str) -> None:
        self.graph, self.past = graph, past
        self.named = 0
        self.attentions = [n for n in graph if vocabulary.is_op(n, "Attention")]

    def run(self) -> int:
        if not self.attentions:
            raise _RefusedError("the model has no attention")
        names = Names(self.graph, self.attentions)
        if names.computed:
            raise _RefusedError("a memory that the graph computes", names.computed[0])
        remembering = names.remembering
        alone = [n for n in self.attentions if n not in remembering]
        if remembering and any(_looks_back(n) for n in alone):
            raise _RefusedError("only some attentions have a memory", alone[0])
        if remembering:
            return names.give()
        if names.paired:
            self.named = names.give()
        self._wire()
        return len(self.attentions) + self.named

    def _free_name(self) -> str:
        """The name of the new dimension, with a number where an input has one of that name."""
        dims = [self.shapes.shape(v) or () for v in self.graph.inputs]
        taken = {name for d in dims for name in shapes.symbols_of(d)}
        names = (f"{self.past}{n or ''}" for n in itertools.count())
        return next(n for n in names if n not in taken)

    # ------------------------------------------------------------ a model without memory

    def _wire(self) -> None:
        self.shapes = Shapes(self.graph)
        self.past = self._free_name()
        queries = self._queries()
        padding = self._padding()
        starts = list(self._positions(queries))
        if not starts and not self._has_position_input():
            raise _RefusedError("the positions are not found: neither counted nor an input")
        stems = [f"{i}.{kind}" for i in range(len(self.attentions)) for kind in KINDS]
        roles = ("past_key_values", "present")
        matcher.make_way(self.graph, (f"{role}.{stem}" for role in roles for stem in stems))
        for i, node in enumerate(self.attentions):
            self._remember(i, node, queries)
        self._lengthen(padding, queries)
        self._shift(starts)

    def _queries(self) -> shapes.Poly:
        """The number of positions, one symbol."""
        found = set()
        for node in self.attentions:
            if not _looks_back(node):
                raise _RefusedError("an attention that is not causal: no decoder", node)
            q, k = self.shapes.shape(node.inputs[0]), self._known(node, 1)
            if q is None or k is None or len(q) != 4 or q[2] != k[2]:
                raise _RefusedError("an attention of unknown lengths", node)
            if not isinstance(k[1], int) or not isinstance(k[3], int):
                raise _RefusedError("an attention of unknown heads", node)
            found.add(q[2])
        (length,) = found if len(found) == 1 else (None,)
        if isinstance(length, int):
            raise _RefusedError("the sequence length is fixed: export with dynamic shapes")
        if length is None or len(shapes.symbols_of([length])) != 1:
            raise _RefusedError("the sequence length is not one dimension of an input")
        return length

    def _known(self, node: ir.Node, position: int) -> shapes.Dims | None:
        """The shape of the keys (1) or values (2) of an attention, without a sink's."""
        value = node.inputs[position]
        return None if value is None else self.shapes.shape(unpadded(node, value))

    def _padding(self) -> set[ir.Value]:
        """The mask inputs; every mask must be causal, or hide columns of such an input."""
        found: set[ir.Value] = set()
        for node in self.attentions:
            mask = node.inputs[3] if len(node.inputs) > 3 else None
            kind = node.metadata_props.get(KEY_MASK, "")
            known = kind in ("causal", "causal+padding") or (
                KEY_WINDOW in node.metadata_props and "bias" not in kind
            )
            if mask is None and kind == "causal":
                continue
            readers = data_inputs(mask) if mask is not None else []
            if not known or len(readers) != 1:
                raise _RefusedError("an explicit mask, whose meaning with a past is unknown", node)
            found.update(readers)
        return found

    def _positions(self, queries: shapes.Poly) -> Iterator[ir.Node]:
        """The Ranges and Slices that count positions from zero."""
        masks = self._mask_nodes()
        for node in self.graph:
            if node in masks or not self._counts(node, queries):
                continue
            if (reason := _misuse(node.outputs[0], masks)) is not None:
                raise _RefusedError(f"positions are used for more than positions: {reason}", node)
            yield node

    def _counts(self, node: ir.Node, queries: shapes.Poly) -> bool:
        contents = [self.shapes.content(v) for v in node.inputs[:4]]
        if vocabulary.is_op(node, "Range"):
            return contents[0] == (0,) and contents[1] == (queries,) and contents[2] == (1,)
        if vocabulary.is_op(node, "Slice") and matcher.is_constant(node.inputs[0]):
            return contents[1] == (0,) and contents[2] == (queries,)
        return False

    def _mask_nodes(self) -> set[ir.Node]:
        found: set[ir.Node] = set()
        queue = [n.inputs[3] for n in self.attentions if len(n.inputs) > 3]
        while queue:
            value = queue.pop()
            node = value.producer() if value is not None else None
            if node is not None and node not in found:
                found.add(node)
                queue.extend(node.inputs)
        return found

    def _has_position_input(self) -> bool:
        return any("position" in str(v.name) for v in self.graph.inputs)

    def _remember(self, i: int, node: ir.Node, queries: shapes.Poly) -> None:
        """Gives one attention its past and present."""
        past, present = [], []
        dims = self._known(node, 1)
        assert dims is not None
        for kind, value in zip(KINDS, node.inputs[1:3], strict=True):
            assert value is not None
            value = unpadded(node, value)
            width = (self.shapes.shape(value) or dims)[3]
            batch, heads = dims[0], dims[1]
            shape: shapes.Dims = (batch, heads, shapes.symbol(self.past), width)
            past.append(self._input(f"past_key_values.{i}.{kind}", shape, value.dtype))
            longer = shapes.add(shapes.symbol(self.past), queries)
            now: shapes.Dims = (batch, heads, longer, width)
            present.append((f"present.{i}.{kind}", now, value))
        if KEY_SINK in node.metadata_props:
            self._join(past, present)
            return
        inputs = [*node.inputs[:4], *([None] * (4 - len(node.inputs))), *past]
        attributes = {name: found.value for name, found in node.attributes.items()}
        new = matcher.fresh("Attention", inputs, attributes, outputs=3)
        new.metadata_props.update(node.metadata_props)
        name = node.name
        matcher.substitute(node, [], [new], node.outputs[0], new.outputs[0])
        new.name = name
        for value, entry in zip(new.outputs[1:], present, strict=True):
            self._hand_out(value, entry)

    def _join(self, past: list[ir.Value], present: list[_Present]) -> None:
        """Joins past and new ahead of a sink's key and value, which are not remembered."""
        for before, entry in zip(past, present, strict=True):
            old = entry[2]
            users = [u for u in old.uses() if u.node.op_type == "Pad" and u.idx == 0]
            joined = matcher.fresh("Concat", [before, old], {"axis": 2})
            matcher.inherit(joined, [users[0].node], users[0].node)
            self.graph.insert_before(users[0].node, [joined])
            for use in users:
                use.node.replace_input_with(0, joined.outputs[0])
            self._hand_out(joined.outputs[0], entry)

    def _hand_out(self, value: ir.Value, entry: _Present) -> None:
        title, dims, old = entry
        value.name = title
        value.shape = _written(dims)
        value.type = ir.TensorType(old.dtype or ir.DataType.FLOAT)
        self._output(value, old)

    def _input(self, name: str, shape: shapes.Dims, kind: ir.DataType | None) -> ir.Value:
        value = ir.Value(
            name=name, shape=_written(shape), type=ir.TensorType(kind or ir.DataType.FLOAT)
        )
        self.graph.inputs.append(value)
        return value

    def _output(self, value: ir.Value, old: ir.Value) -> None:
        """Adds an output, in the place of `old` if that is one already."""
        for position, known in enumerate(self.graph.outputs):
            if known is old:
                value.metadata_props[vocabulary.KEY_VALUE] = str(old.name)
                self.graph.outputs[position] = value
                return
        self.graph.outputs.append(value)

    def _lengthen(self, padding: set[ir.Value], queries: shapes.Poly) -> None:
        """Makes the mask inputs as long as past and present together."""
        for value in padding:
            assert value.shape is not None
            total = shapes.add(shapes.symbol(self.past), queries)
            value.shape = ir.Shape([value.shape[0], str(total)])

    def _shift(self, starts: list[ir.Node]) -> None:
        """Adds the length of the past to where positions start and end."""
        if not starts:
            return
        first = next(iter(self.graph))
        source = next(v for v in self.graph.inputs if v.name == "past_key_values.0.key")
        span = matcher.fresh("Shape", [source], {"start": 2, "end": 3})
        zero = matcher.add_array(self.graph, "past:axis", np.zeros(1, np.int64))
        number = matcher.fresh("Squeeze", [span.outputs[0], zero])
        for node, name in ((span, "past:length"), (number, "past:number")):
            matcher.inherit(node, starts, starts[0])
            node.outputs[0].name = matcher.unique_name(self.graph, name)
            node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        self.graph.insert_before(first, [span, number])
        for node in starts:
            self._shift_one(node, span.outputs[0], number.outputs[0])

    def _shift_one(self, node: ir.Node, vector: ir.Value, number: ir.Value) -> None:
        places = (0, 1) if node.op_type == "Range" else (1, 2)
        past = number if node.op_type == "Range" else vector
        end = node.inputs[places[1]]
        more = matcher.fresh("Add", [past, end])
        matcher.inherit(more, [node], node)
        more.outputs[0].name = matcher.unique_name(self.graph, f"{node.outputs[0].name}:end")
        more.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        self.graph.insert_before(node, [more])
        node.replace_input_with(places[0], past)
        node.replace_input_with(places[1], more.outputs[0])


def _looks_back(node: ir.Node) -> bool:
    """Whether the attention is causal: by its attribute, or by the mask that holds its sink."""
    sunk = KEY_SINK in node.metadata_props
    kind = node.metadata_props.get(KEY_MASK, "")
    causal = "causal" in kind or KEY_WINDOW in node.metadata_props
    return matcher.attribute(node, "is_causal", 0) == 1 or (sunk and causal)


def _written(dims: shapes.Dims) -> ir.Shape:
    return ir.Shape([d if isinstance(d, int) else str(d) for d in dims])


def _misuse(value: ir.Value, masks: set[ir.Node]) -> str | None:
    """Where positions end up that is neither a rotary, nor a table, nor an embedding sum."""
    queue, seen = [value], {value}
    while queue:
        value = queue.pop()
        if value.is_graph_output():
            return f"output {value.name!r}"
        for use in value.uses():
            if _is_end(use.node, use.idx):
                continue
            if use.node in masks or not _carries(use.node):
                return where(use.node)
            queue.extend(v for v in use.node.outputs if v not in seen)
            seen.update(use.node.outputs)
    return None


def _is_end(node: ir.Node, position: int) -> bool:
    if vocabulary.is_op(node, vocabulary.ROTARY, vocabulary.DOMAIN):
        return position in (1, 2)
    if vocabulary.is_op(node, "GatherND") and matcher.attribute(node, "batch_dims", 0) == 0:
        single = matcher.static_dim(node.inputs[1], -1) == 1  # rows of a table
        return position == 1 and single and matcher.is_constant(node.inputs[0])
    if vocabulary.is_op(node, "Gather") or vocabulary.is_op(node, "GatherElements"):
        return position == 1 and matcher.is_constant(node.inputs[0])
    if vocabulary.is_op(node, "Add"):  # a table of positions added to the embedding
        other = node.inputs[1 - position]
        maker = other.producer() if other is not None else None
        return maker is not None and maker.op_type in ("Gather", "Add")
    return False


def _carries(node: ir.Node) -> bool:
    if node.op_type in _CARRIERS or (node.op_type in _RESIZERS and _keeps_rows(node)):
        return True
    return node.op_type in _WITH_CONSTANT and any(matcher.is_constant(v) for v in node.inputs)


def _keeps_rows(node: ir.Node) -> bool:
    """Whether the node cuts or repeats axes of fixed length only: never the positions."""
    source = node.inputs[0]
    rank = matcher.rank(source)
    if rank is None:
        return False
    if node.op_type == "Split":
        axes: tuple[int, ...] | None = (matcher.attribute(node, "axis", 0),)
    elif node.op_type == "Slice":
        axes = matcher.integers(node.inputs[3]) if len(node.inputs) > 3 else None
    else:
        times = matcher.integers(node.inputs[1])
        axes = None if times is None else tuple(a for a, n in enumerate(times) if n != 1)
    return axes is not None and all(matcher.static_dim(source, a) is not None for a in axes)
