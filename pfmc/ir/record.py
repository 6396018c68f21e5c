"""What a graph was like: cheap to take before a pipeline, and made into a graph again on demand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import onnx_ir as ir


class _Value(NamedTuple):
    """What a value was; its tensor is never changed in place, so it is not copied."""

    name: str | None
    shape: ir.Shape | None
    type: ir.TypeProtocol | None
    tensor: ir.TensorProtocol | None
    metadata: dict[str, str]


class _Node(NamedTuple):
    """What a node was."""

    domain: str
    op_type: str
    overload: str
    name: str | None
    inputs: tuple[ir.Value | None, ...]
    outputs: tuple[ir.Value, ...]
    attributes: tuple[ir.Attr, ...]
    metadata: dict[str, str]


class Record:
    """A graph as it is now, whatever becomes of it; a fifth of the time of a copy.

    A graph with subgraphs is copied at once.
    """

    def __init__(self, model: ir.Model) -> None:
        graph = model.graph
        self._copy: ir.Model | None = None
        if any(a.type in _BODIES for n in graph for a in n.attributes.data.values()):
            self._copy = model.clone()
            return
        self._name, self._opsets = graph.name, dict(graph.opset_imports)
        self._functions = tuple(model.functions.values())
        self._origin = (model.ir_version, model.producer_name, model.producer_version)
        self._nodes = [_node(n) for n in graph]
        self._inputs, self._outputs = tuple(graph.inputs), tuple(graph.outputs)
        self._held = tuple(graph.initializers.values())
        self._values = {v: _value(v) for v in self._every()}

    def _every(self) -> Iterator[ir.Value]:
        yield from self._inputs
        yield from self._held
        for node in self._nodes:
            yield from node.outputs
            yield from (v for v in node.inputs if v is not None and v.producer() is None)

    def model(self) -> ir.Model:
        """A new model like the recorded one."""
        if self._copy is not None:
            return self._copy.clone()
        fresh = {old: _made(what) for old, what in self._values.items()}
        nodes = [_remade(what, fresh) for what in self._nodes]
        graph = ir.Graph(
            [fresh[v] for v in self._inputs],
            [fresh[v] for v in self._outputs],
            nodes=nodes,
            initializers=[fresh[v] for v in self._held],
            name=self._name,
            opset_imports=dict(self._opsets),
        )
        version, producer, release = self._origin
        return ir.Model(
            graph,
            ir_version=version,
            functions=[f.clone() for f in self._functions],
            producer_name=producer,
            producer_version=release,
        )


_BODIES = frozenset({ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS})


def _node(node: ir.Node) -> _Node:
    return _Node(
        node.domain, node.op_type, node.overload, node.name, tuple(node.inputs),
        tuple(node.outputs), tuple(node.attributes.data.values()), dict(node.metadata_props),
    )  # fmt: skip


def _value(value: ir.Value) -> _Value:
    return _Value(
        value.name, value.shape, value.type, value.const_value, dict(value.metadata_props)
    )


def _made(what: _Value) -> ir.Value:
    return ir.Value(
        name=what.name, shape=None if what.shape is None else what.shape.copy(), type=what.type,
        const_value=what.tensor, metadata_props=dict(what.metadata),
    )  # fmt: skip


def _remade(what: _Node, fresh: dict[ir.Value, ir.Value]) -> ir.Node:
    inputs: list[Any] = [None if v is None else fresh[v] for v in what.inputs]
    return ir.Node(
        what.domain, what.op_type, inputs, what.attributes, overload=what.overload, name=what.name,
        outputs=[fresh[v] for v in what.outputs], metadata_props=dict(what.metadata),
    )  # fmt: skip
