"""Checks that the values of a graph can be computed in some order, and names a circle if not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx

from pfmc.errors import InputError, did_you_mean

_SHOWN = 8


def check_order(
    nodes: Sequence[onnx.NodeProto],
    producer: Mapping[str, int],
    defined: set[str],
    file: str,
) -> None:
    """Every input is defined, and the nodes have a topological order.

    Args:
        nodes: the nodes as they stand in the file, in any order.
        producer: value name -> index of the node that makes it.
        defined: inputs and initialisers.
        file: for the messages.

    Raises:
        InputError: an undefined value, or a cycle with the names of its nodes.
    """
    sorted_already = True
    for index, node in enumerate(nodes):
        for name in node.input:
            if not name or name in defined:
                continue
            made_by = producer.get(name)
            if made_by is None:
                raise _undefined(name, node, (*producer, *defined), file)
            sorted_already &= made_by < index
    if not sorted_already:
        _check_cycle(nodes, producer, file)


def _undefined(name: str, node: onnx.NodeProto, known: Sequence[str], file: str) -> InputError:
    hint = did_you_mean(name, known) if len(known) < 5000 else ""
    return InputError(
        f"The value {name[:120]!r} is used but defined nowhere",
        where=f"{file}: node {node.name[:120]!r} ({node.op_type})",
        mend=hint if hint.startswith("did") else "export the model again; the graph is incomplete",
    )


def _check_cycle(nodes: Sequence[onnx.NodeProto], producer: Mapping[str, int], file: str) -> None:
    order, waiting, needs = _sort(nodes, producer)
    if len(order) < len(nodes):
        cycle = _walk(needs, waiting)
        names = [nodes[i].name or nodes[i].output[0] for i in cycle]
        more = f" -> ... ({len(names)} nodes)" if len(names) > _SHOWN else ""
        raise InputError(
            f"The graph runs in a circle: {' -> '.join(names[:_SHOWN])}{more}",
            where=file,
            mend="export the model again; no program computes this graph",
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
