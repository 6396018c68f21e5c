"""Finds the KV memory that a model has already, and gives it canonical names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from pfmc.ir import matcher
from pfmc.ir.shapes import Shapes
from pfmc.passes.masks import KEY_SINK

KINDS = ("key", "value")


@dataclass(frozen=True)
class Held:
    """Keys or values of one attention that outlive a call.

    Attributes:
        past: the graph input that holds them, or None.
        present: what the attention sees of them in this call.
        cross: whether they stand for the encoder's positions, and are written once.
    """

    past: ir.Value | None
    present: ir.Value
    cross: bool


def held(node: ir.Node, position: int, crossing: bool) -> Held:
    """What attention `node` sees as its input `position` (1 keys, 2 values)."""
    value = node.inputs[position]
    assert value is not None
    if len(node.inputs) > 5 and (past := node.inputs[position + 3]) is not None:
        if len(node.outputs) <= position:
            node.resize_outputs(3)  # it reads a past and told nobody its present
        return Held(past, node.outputs[position], False)
    value = unpadded(node, value)
    if value.is_graph_input():
        return Held(value, _copy(value), True)
    joined = matcher.producer(value, "Concat")
    if joined is not None and len(joined.inputs) == 2:
        past = joined.inputs[0]
        along = matcher.attribute(joined, "axis") in (2, -2)
        if along and past is not None and past.is_graph_input():
            return Held(past, value, False)
    return Held(None, value, crossing)


def unpadded(node: ir.Node, value: ir.Value) -> ir.Value:
    """Keys or values without the one more that stands for a sink."""
    pad = matcher.producer(value, "Pad") if KEY_SINK in node.metadata_props else None
    inner = pad.inputs[0] if pad is not None else None
    return value if inner is None else inner


def _copy(value: ir.Value) -> ir.Value:
    """The graph output that hands a memory on unchanged, or the memory itself."""
    for use in value.uses():
        if use.node.op_type == "Identity" and use.node.outputs[0].is_graph_output():
            return use.node.outputs[0]
    return value


class Names:
    """Canonical names for the memory of a graph: see `give`.

    Decoders: ``past_key_values.{layer}.key`` and ``present.{layer}.key``. Where a decoder attends
    to an encoder too: ``past_key_values.{layer}.decoder.key`` for its own positions and
    ``past_key_values.{layer}.encoder.key`` for the encoder's.
    """

    def __init__(self, graph: ir.Graph, attentions: Iterable[ir.Node]) -> None:
        self.graph = graph
        known = Shapes(graph)
        self.found: list[tuple[ir.Node, Held, Held]] = []
        for node in attentions:
            q, k = known.shape(node.inputs[0]), known.shape(node.inputs[1])
            crossing = q is not None and k is not None and q[2:3] != k[2:3]
            crossing = crossing and KEY_SINK not in node.metadata_props
            self.found.append((node, held(node, 1, crossing), held(node, 2, crossing)))

    @property
    def remembering(self) -> list[ir.Node]:
        """The attentions whose past is a graph input."""
        return [n for n, k, v in self.found if k.past is not None and v.past is not None]

    @property
    def computed(self) -> list[ir.Node]:
        """The attentions whose past the graph makes itself."""
        pasts = [(n, h.past) for n, *pair in self.found for h in pair]
        return [n for n, past in pasts if past is not None and not past.is_graph_input()]

    @property
    def paired(self) -> bool:
        """Whether a decoder attends to an encoder."""
        return any(k.cross for _, k, _ in self.found)

    def give(self) -> int:
        """Names pasts and presents; the old names go to ``pfmc.value``. Returns how many."""
        renamed = [(v, n) for v, n in self._pairs() if v.name != n]
        olds = [str(v.name) for v, _ in renamed]
        matcher.make_way(self.graph, (*olds, *(n for _, n in renamed)))
        for value, name in renamed:
            value.name = name
        return len(renamed)

    def _pairs(self) -> Iterator[tuple[ir.Value, str]]:
        counts = {False: 0, True: 0}
        for node, *pair in self.found:
            lasting = [h for h in pair if h.past is not None or h.present.is_graph_output()]
            if len(lasting) < 2:
                continue
            cross = pair[0].cross
            part = ("encoder." if cross else "decoder.") if self.paired else ""
            for kind, one in zip(KINDS, pair, strict=True):
                stem = f"{counts[cross]}.{part}{kind}"
                if one.past is not None:
                    yield one.past, f"past_key_values.{stem}"
                if one.present is not one.past:
                    self._hand_out(node, one)
                    yield one.present, f"present.{stem}"
            counts[cross] += 1

    def _hand_out(self, node: ir.Node, one: Held) -> None:
        if not one.present.is_graph_output():
            self.graph.outputs.append(one.present)
