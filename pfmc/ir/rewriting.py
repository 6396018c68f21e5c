"""Changing a graph and leaving it whole: new nodes, names, sources, and what is dead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pfmc.ir import provenance, vocabulary


def add_initialiser(
    graph: ir.Graph, name: str, tensor: ir.TensorProtocol, metadata: Mapping[str, str] | None = None
) -> ir.Value:
    """Adds a constant under `name`, or under ``name.1``, ``name.2`` … if that is taken."""
    numbers: dict[str, int] = graph.meta.setdefault(_NUMBERS, {})
    number = numbers.get(name, 0)  # where the last search for a free number ended
    unique = f"{name}.{number}" if number else name
    while unique in graph.initializers:
        number += 1
        unique = f"{name}.{number}"
    numbers[name] = number
    value = ir.Value(
        name=unique, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype)
    )
    value.const_value = tensor
    value.metadata_props.update(metadata or {})
    graph.register_initializer(value)
    return value


def add_array(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """Adds a small constant array, float32 or int64, under a name made unique."""
    return add_initialiser(graph, name, ir.Tensor(np.asarray(array)))


def substitute(
    at: ir.Node,
    old: Iterable[ir.Node],
    new: Sequence[ir.Node],
    output: ir.Value,
    by: ir.Value | None = None,
) -> None:
    """Inserts `new` before `at`, lets `by` take the place and the name of `output`, drops `old`.

    `by` is the first output of the last new node if it is not given. Of the nodes `old` those
    that nobody reads any more are removed. Metadata of the old nodes goes to the new ones.
    """
    graph = at.graph
    assert graph is not None
    members = list(dict.fromkeys([at, *old]))
    for node in new:
        inherit(node, members, at)
        for value in node.outputs:
            value.name = value.name or unique_name(graph, f"{output.name}:{node.op_type}")
    graph.insert_before(at, list(new))
    by = new[-1].outputs[0] if by is None else by
    take_place(graph, output, by)
    remove_dead(graph, members)


def take_place(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Gives the readers, the name, the type and the metadata of `old` to `new`."""
    name = old.name
    new.shape = new.shape if new.shape is not None else old.shape
    new.type = new.type if new.type is not None else old.type
    new.metadata_props.update(old.metadata_props)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name = unique_name(graph, f"{name}:old")
    new.name = name


_NAMES = "pfmc.names"
_NUMBERS = "pfmc.numbers"


def unique_name(graph: ir.Graph, stem: str) -> str:
    """`stem`, or ``stem.1``, ``stem.2`` …: a name no value of `graph` had when it was first asked.

    onnx_ir's own generated names may fall upon initialisers, so every new value is named here.
    The stem must hold a ``:``, which keeps it apart from the names that onnx_ir generates.
    """
    taken: set[str] | None = graph.meta.get(_NAMES)
    if taken is None:
        taken = {str(v.name) for v in (*graph.inputs, *graph.initializers.values())}
        taken.update(str(v.name) for node in graph for v in node.outputs)
        graph.meta[_NAMES] = taken
    name, number = stem, 0
    while name in taken:
        number += 1
        name = f"{stem}.{number}"
    taken.add(name)
    return name


def make_way(graph: ir.Graph, names: Iterable[str]) -> None:
    """Renames the values of `graph` that bear one of `names`, which is about to be given away.

    An input's or output's own name is kept in ``pfmc.value``.
    """
    wanted = set(names)
    inner = (v for node in graph for v in node.outputs)
    bearers = [v for v in (*graph.inputs, *graph.initializers.values(), *inner) if v.name in wanted]
    for value in bearers:
        value.metadata_props.setdefault(vocabulary.KEY_VALUE, str(value.name))
        value.name = unique_name(graph, f"{value.name}:renamed")


def inherit(node: ir.Node, old: Sequence[ir.Node], root: ir.Node) -> None:
    """Gives `node` the sources of all `old` nodes, and the scope and other metadata of `root`."""
    for key, text in root.metadata_props.items():
        if key != vocabulary.KEY_SOURCE:
            node.metadata_props.setdefault(key, text)
    provenance.union_sources(node, old)


def remove_dead(graph: ir.Graph, nodes: Iterable[ir.Node]) -> int:
    """Removes those of `nodes`, and then of their ancestors, whose outputs nobody reads."""
    queue, removed = list(nodes), 0
    while queue:
        node = queue.pop()
        if node.graph is not graph or any(_is_read(v) for v in node.outputs):
            continue
        parents = [v.producer() for v in node.inputs if v is not None]
        graph.remove(node, safe=True)
        removed += 1
        queue.extend(p for p in parents if p is not None)
    return removed


def _is_read(value: ir.Value) -> bool:
    return value.is_graph_output() or bool(value.uses())


def fresh(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    domain: str = "",
    outputs: int = 1,
    name: str | None = None,
) -> ir.Node:
    """A new node whose outputs inherit nothing; names are given when it is inserted."""
    return ir.node(op_type, inputs, attributes or {}, domain=domain, num_outputs=outputs, name=name)
