"""Puts new nodes and constants in place of old ones; names and provenance are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from pfmc.ir import provenance
from pfmc.ir.vocabulary import DOMAIN


class Builder:
    """Writes nodes in front of a chosen node of `graph`; equal small constants are shared.

    In a function, whose body can hold no initialiser, constants become ``Constant`` nodes.
    """

    def __init__(self, graph: ir.Graph | ir.Function) -> None:
        self._body = graph
        self._graph = graph if isinstance(graph, ir.Graph) else None
        self._taken = {v.name for v in _names(graph)}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._anchor: ir.Node | None = None

    def at(self, node: ir.Node) -> None:
        """New nodes go in front of `node` and inherit its provenance."""
        self._anchor = node

    def unique(self, stem: str) -> str:
        """A value name not taken yet."""
        name, count = stem, 0
        while name in self._taken:
            count += 1
            name = f"{stem}_{count}"
        self._taken.add(name)
        return name

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, object] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
        suffix: str = "",
    ) -> ir.Value:
        """Inserts a node and returns its first output."""
        return self.ops(op_type, inputs, attributes, domain=domain, outputs=outputs, suffix=suffix)[
            0
        ]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, object] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
        suffix: str = "",
    ) -> Sequence[ir.Value]:
        """Inserts a node and returns its outputs."""
        anchor = self._anchor
        assert anchor is not None, "at() first"
        stem = f"{anchor.name or anchor.op_type}/{suffix or op_type}"
        node = ir.node(
            op_type,
            inputs,
            dict(attributes or {}),  # type: ignore[arg-type]
            domain=domain,
            num_outputs=outputs,
            name=self.unique(stem),
        )
        for index, value in enumerate(node.outputs):
            value.name = self.unique(f"{stem}/{index}" if outputs > 1 else f"{stem}/out")
        provenance.union_sources(node, [anchor])
        self._body.insert_before(anchor, node)
        return node.outputs

    def own(self, op_type: str, inputs: Sequence[ir.Value | None]) -> ir.Value:
        """Inserts an operator of domain ``pfmc``."""
        return self.op(op_type, inputs, domain=DOMAIN)

    def constant(self, array: np.ndarray, stem: str = "constant") -> ir.Value:
        """A small constant, shared with all equal ones."""
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants or self._graph is None:
            self._constants[key] = self._new_constant(array, stem)
        return self._constants[key]

    def _new_constant(self, array: np.ndarray, stem: str) -> ir.Value:
        if self._graph is None:
            return self.op("Constant", [], {"value": ir.Tensor(array)})
        return self.initialiser(ir.Tensor(array), self.unique(f"pfmc_{stem}"))

    def initialiser(self, tensor: ir.TensorProtocol, name: str, weight: str = "") -> ir.Value:
        """A new initialiser holding `tensor`; `weight` is its original weight name."""
        assert self._graph is not None, "functions hold no initialisers"
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        tensor.name = name
        if weight:
            value.metadata_props[provenance.KEY_WEIGHT] = weight
        self._graph.initializers.add(value)
        return value

    def replace(self, node: ir.Node, results: Sequence[ir.Value | None]) -> None:
        """The outputs of `node` become `results`, which take over their names; `node` goes.

        None stands for an output that nobody reads.
        """
        for old, new in zip(node.outputs, results, strict=True):
            if new is None:
                continue
            name, shape, kind = old.name, old.shape, old.type
            old.name = None
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            if name:
                new.name = name
            new.shape = shape if shape is not None else new.shape
            new.type = kind if kind is not None else new.type
        self._body.remove(node, safe=True)


def _names(graph: ir.Graph | ir.Function) -> list[ir.Value]:
    values = [*graph.inputs, *(v for n in graph for v in n.outputs)]
    if isinstance(graph, ir.Graph):
        values += graph.initializers.values()
    return values
