"""Merged decoders: a graph of two branches over the same weights, of which one is compiled.

optimum's ``decoder_model_merged.onnx`` is one `If` on the input ``use_cache_branch``: the first
branch reads a KV memory, the second computes everything anew. The first also serves an empty
memory, so it is the one that is kept: its nodes take the place of the `If`, the input goes.
"""

from __future__ import annotations

from typing import Final

import onnx

SWITCH: Final = "use_cache_branch"
"""The graph input that chooses; true for the branch with memory."""
_DEPTH: Final = 8


def specialise(proto: onnx.ModelProto) -> bool:
    """Puts the branch with memory in the place of every `If` on `SWITCH`; says whether it did.

    What does not look as optimum writes it stays, for the guard to refuse.
    """
    graph = proto.graph
    if not any(value.name == SWITCH for value in graph.input):
        return False
    found = False
    for _ in range(_DEPTH):
        if not _unwrap(graph):
            break
        found = True
    if found and not any(SWITCH in node.input for node in graph.node):
        for index, value in enumerate(graph.input):
            if value.name == SWITCH:
                del graph.input[index]
                break
    return found


def _unwrap(graph: onnx.GraphProto) -> bool:
    """Unwraps every `If` on the switch at the top level; says whether there was one."""
    nodes: list[onnx.NodeProto] = []
    changed = False
    for node in graph.node:
        branch = _branch(node)
        if branch is None:
            nodes.append(node)
            continue
        changed = True
        nodes += _inlined(graph, node, branch)
    if changed:
        kept = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
        del graph.node[:]
        graph.node.extend(kept)
    return changed


def _branch(node: onnx.NodeProto) -> onnx.GraphProto | None:
    """The branch with memory of an `If` on the switch."""
    if node.op_type != "If" or node.domain or list(node.input) != [SWITCH]:
        return None
    branch: onnx.GraphProto | None = next(
        (a.g for a in node.attribute if a.name == "then_branch"), None
    )
    if branch is None or len(branch.output) != len(node.output):
        return None
    names = [v.name for v in branch.output]
    for part in (node, *branch.node):
        names += (*part.input, *part.output)
    return branch if all(isinstance(name, str) for name in names) else None  # else no UTF-8


def _inlined(
    graph: onnx.GraphProto, node: onnx.NodeProto, branch: onnx.GraphProto
) -> list[onnx.NodeProto]:
    """The branch's nodes, making the values that the `If` made; its weights join the graph's."""
    graph.initializer.extend(branch.initializer)
    graph.sparse_initializer.extend(branch.sparse_initializer)
    graph.value_info.extend(branch.value_info)
    made = {name for n in branch.node for name in n.output}
    wanted: dict[str, str] = {}
    copies = []
    for inner, outer in zip(branch.output, node.output, strict=True):
        if not outer:  # nobody reads it
            continue
        if inner.name in made and inner.name not in wanted:
            wanted[inner.name] = outer
        elif wanted.get(inner.name, inner.name) != outer:
            copies.append(onnx.helper.make_node("Identity", [inner.name], [outer]))
    for part in branch.node:
        for names in (part.input, part.output):
            for index, name in enumerate(names):
                names[index] = wanted.get(name, name)
    for copy in copies:
        copy.input[0] = wanted.get(copy.input[0], copy.input[0])
    return [*branch.node, *copies]
