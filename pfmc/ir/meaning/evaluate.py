"""Demand-driven numpy evaluation of a part of a graph, for folding and for probing masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from pfmc.errors import InputError
from pfmc.ir.meaning.attributes import describe

Part: TypeAlias = ir.Model | ir.Graph | Iterable[ir.Node]
"""What `evaluate` takes its nodes from."""


def evaluate(
    graph: Part,
    feeds: Mapping[str, np.ndarray],
    outputs: Sequence[str],
) -> list[np.ndarray]:
    """The values named `outputs`, computed from `feeds` and the graph's constants.

    Only the ancestors of `outputs` run, and the walk stops at `feeds`, which may name any value,
    not only graph inputs.

    Args:
        graph: a graph, a model, or nodes in any order.
        feeds: value name to array.
        outputs: value names.

    Raises:
        InputError: a value is unbound, or an operator has no meaning here.
    """
    from pfmc.ir.meaning import compile_node

    made: dict[str, ir.Node] = {v.name: n for n in _nodes(graph) for v in n.outputs if v.name}
    constants = _initialisers(graph)
    known: dict[str, np.ndarray] = {name: np.asarray(value) for name, value in feeds.items()}
    pending = list(reversed(outputs))
    opened: set[str] = set()
    while pending:
        name = pending[-1]
        if name in known:
            pending.pop()
            continue
        node = made.get(name)
        if node is None:
            known[name] = _constant(name, constants, made)
            continue
        needed = [v for v in node.inputs if v is not None and _bound(v, known) is None]
        if needed and name in opened:
            raise InputError(f"value {name!r} depends on itself", where=describe(node))
        if needed:
            opened.add(name)
            pending.extend(v.name or "" for v in needed)
            continue
        inputs = [None if v is None else _bound(v, known) for v in node.inputs]
        with np.errstate(all="ignore"):  # ONNX knows no warnings: log(0) is -inf
            results = compile_node(node)(inputs)
        for value, array in zip(node.outputs, results, strict=False):
            if value.name and array is not None:
                known.setdefault(value.name, np.asarray(array))
    return [known[name] for name in outputs]


def _nodes(graph: Part) -> ir.Graph | Iterable[ir.Node]:
    return graph.graph if isinstance(graph, ir.Model) else graph


def _initialisers(graph: Part) -> Mapping[str, ir.Value]:
    inner = _nodes(graph)
    return inner.initializers if isinstance(inner, ir.Graph) else {}


def _bound(value: ir.Value, known: dict[str, np.ndarray]) -> np.ndarray | None:
    name = value.name or ""
    if name not in known and value.const_value is not None:
        known[name] = np.asarray(value.const_value.numpy())
    return known.get(name)


def _constant(
    name: str, constants: Mapping[str, ir.Value], made: Mapping[str, ir.Node]
) -> np.ndarray:
    value = constants.get(name)
    if value is not None and value.const_value is not None:
        return np.asarray(value.const_value.numpy())
    users = [n for n in made.values() if any(v is not None and v.name == name for v in n.inputs)]
    raise InputError(
        f"value {name!r} is unbound",
        where=f"read by {describe(users[0])}" if users else "",
        mend="give it in feeds",
    )
