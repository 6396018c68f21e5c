"""Takes for granted that every sequence fills its memory: the lengths of padded rows are dropped.

Ingest lowers GroupQueryAttention exactly (`pfmc.ingest.dialects_group`): a row of a padded batch
may fill less of its memory than another, and its new keys then stand elsewhere. A fixed machine
runs sequences that fill theirs; what moves rows by a `shift` of zero is not built.
"""

from __future__ import annotations

import onnx_ir as ir

from pfmc.ir import matcher, vocabulary
from pfmc.ir.vocabulary import DROPPED, KEY_FULL, KEY_SHIFT
from pfmc.passes.masks import data_inputs

NOTE = (
    "every sequence is taken to fill its memory (attention_mask all ones, memory as long as the "
    "past); padded batches and preallocated memories are not compiled"
)


def assume_full(graph: ir.Graph) -> list[ir.Node]:
    """Drops what only padded rows need; returns the attentions if anything was dropped.

    Nothing is done if the shift does not depend on the data of an input: then it is known, and
    may be anything.
    """
    shifts = [n.outputs[0] for n in graph if KEY_SHIFT in n.metadata_props]
    lengths = [data_inputs(v) for v in shifts]
    if not all(lengths) or not lengths:
        return []
    skipped = 0
    for node in list(graph):
        place = node.metadata_props.get(KEY_FULL)
        if place is not None and node.graph is graph:
            _skip(graph, node, place)
            skipped += 1
    for node in reversed(list(graph)):
        matcher.remove_dead(graph, [node])
    for value in [v for shift in lengths for v in shift]:
        if not value.uses() and value in graph.inputs:
            graph.inputs.remove(value)
    return [n for n in graph if vocabulary.is_op(n, "Attention")] if skipped else []


def _skip(graph: ir.Graph, node: ir.Node, place: str) -> None:
    """The readers of `node` read its input `place`, or nothing."""
    output = node.outputs[0]
    if place == DROPPED:
        for use in tuple(output.uses()):
            use.node.replace_input_with(use.idx, None)
        return
    source = node.inputs[int(place)]
    assert source is not None
    maker = source.producer()
    if maker is not None:
        matcher.inherit(maker, [node], maker)
    if output.is_graph_output():
        source.shape = output.shape if output.shape is not None else source.shape
        matcher.take_place(graph, output, source)
    else:
        output.replace_all_uses_with(source)
    _forget_shapes(source)


def _forget_shapes(value: ir.Value) -> None:
    """What is computed of `value` up to an attention may have lost its batch axis."""
    queue = [use.node for use in value.uses()]
    while queue:
        node = queue.pop()
        if node.domain or node.op_type in ("Attention", "MatMul"):
            continue
        for output in node.outputs:
            if output.shape is not None and not output.is_graph_output():
                output.shape = None
                queue.extend(use.node for use in output.uses())
