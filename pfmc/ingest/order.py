"""Finds what keeps the values of a graph from being computed in some order; sorts nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx

from pfmc.errors import did_you_mean
from pfmc.ingest.findings import Finding

_SHOWN = 8
_HINTS = 3


def disorder(
    nodes: Sequence[onnx.NodeProto], producer: Mapping[str, int], defined: set[str]
) -> Iterator[Finding]:
    """Every value that is used and defined nowhere, and a circle if there is one.

    Args:
        nodes: the nodes as they stand in the file, in any order.
        producer: value name -> index of the node that makes it.
        defined: inputs and initialisers.
    """
    sorted_already, undefined = True, 0
    for index, node in enumerate(nodes):
        for name in node.input:
            if not name or name in defined:
                continue
            made_by = producer.get(name)
            if made_by is None:
                known = (*producer, *defined) if undefined < _HINTS else ()
                yield _undefined(name, node, known)
                undefined += 1
            else:
                sorted_already &= made_by < index
    if not sorted_already:
        yield from _cycle(nodes, producer)


def _undefined(name: str, node: onnx.NodeProto, known: Sequence[str]) -> Finding:
    hint = did_you_mean(name, known) if 0 < len(known) < 5000 else ""
    return Finding(
        "PFM202",
        f"The value {name[:120]!r} is used but defined nowhere",
        f"node {node.name[:120]!r} ({node.op_type})",
        hint if hint.startswith("did") else "export the model again; the graph is incomplete",
        nodes=(label(node),),
        tensors=(name,),
    )


def label(node: onnx.NodeProto) -> str:
    """The name of a node, else its first output."""
    return node.name or (node.output[0] if node.output else "")


def _cycle(nodes: Sequence[onnx.NodeProto], producer: Mapping[str, int]) -> Iterator[Finding]:
    order, waiting, needs = _sort(nodes, producer)
    if len(order) < len(nodes):
        names = [label(nodes[i]) for i in _walk(needs, waiting)]
        more = f" -> ... ({len(names)} nodes)" if len(names) > _SHOWN else ""
        yield Finding(
            "PFM204",
            f"The graph runs in a circle: {' -> '.join(names[:_SHOWN])}{more}",
            mend="export the model again; no program computes this graph",
            nodes=tuple(names[:-1]),
        )


def in_order(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes of an acyclic graph so that each comes after the makers of its inputs."""
    producer = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    late = any(producer.get(n, -1) >= i for i, node in enumerate(nodes) for n in node.input)
    if not late:
        return list(nodes)
    return [nodes[i] for i in _sort(nodes, producer)[0]]


def _sort(
    nodes: Sequence[onnx.NodeProto], producer: Mapping[str, int]
) -> tuple[list[int], list[int], list[set[int]]]:
    """Kahn's algorithm: the order found, the unmet needs of each node, all its needs."""
    needs = [{producer[n] for n in node.input if n in producer} for node in nodes]
    users: list[list[int]] = [[] for _ in nodes]
    for index, need in enumerate(needs):
        for before in need:
            users[before].append(index)
    waiting = [len(need) for need in needs]
    order = [i for i, count in enumerate(waiting) if not count]
    for done in order:  # grows while it is walked
        for user in users[done]:
            waiting[user] -= 1
            if not waiting[user]:
                order.append(user)
    return order, waiting, needs


def _walk(needs: Sequence[set[int]], waiting: Sequence[int]) -> list[int]:
    """One cycle, found by walking backwards from any node that never became ready."""
    here = next(i for i, count in enumerate(waiting) if count)
    place: dict[int, int] = {}
    path: list[int] = []
    while here not in place:
        place[here] = len(path)
        path.append(here)
        here = min(i for i in needs[here] if waiting[i])
    cycle = path[place[here] :]
    return [*reversed(cycle), cycle[-1]]
