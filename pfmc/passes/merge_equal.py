"""Merges nodes that compute the same from the same inputs."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from pfmc.ir import matcher, vocabulary
from pfmc.passes.base import Context, Pass, PassResult

_NEVER = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli"}
    | {"Multinomial", "Dropout", "Attention", "MatMul", "Gemm", "Conv"}
    | {"LayerNormalization", "RMSNormalization"}
)
_SMALL = 64


@dataclass(frozen=True)
class MergeEqual(Pass):
    """Lets equal nodes be one: tables, masks and shape arithmetic that each layer made afresh.

    Products, attention and norms are never merged: each is a piece of hardware.
    """

    name: ClassVar[str] = "merge-equal"

    def apply(self, model: ir.Model, context: Context) -> PassResult:
        """One sweep in graph order with a table of what was seen."""
        graph, seen = model.graph, dict[Hashable, ir.Node]()
        ranks: dict[ir.Value, Hashable] = {}
        merged: dict[ir.Node, list[ir.Node]] = {}
        for node in list(graph):
            if not _may_merge(node):
                continue
            key = _key(node, ranks)
            first = seen.setdefault(key, node)
            if first is not node:
                _merge(graph, first, node)
                merged.setdefault(first, []).append(node)
        for first, others in merged.items():
            matcher.inherit(first, others, first)
        changed = sum(map(len, merged.values()))
        return PassResult(model, changed, (), {"merged": changed})


def _may_merge(node: ir.Node) -> bool:
    if node.domain not in ("", "ai.onnx", vocabulary.DOMAIN) or node.op_type in _NEVER:
        return False
    if node.domain == vocabulary.DOMAIN and node.op_type in vocabulary.LINEARS:
        return False
    if any(v.is_graph_output() for v in node.outputs):
        return False
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS, ir.AttributeType.TENSORS)
    return not any(a.type in kinds for a in node.attributes.values())


def _key(node: ir.Node, known: dict[ir.Value, Hashable]) -> Hashable:
    inputs = tuple(None if v is None else _value_key(v, known) for v in node.inputs)
    attributes = tuple((n, _plain(a)) for n, a in sorted(node.attributes.items()))
    return node.domain, node.op_type, len(node.outputs), attributes, inputs


def _value_key(value: ir.Value, known: dict[ir.Value, Hashable]) -> Hashable:
    if value not in known:
        known[value] = id(value)
        tensor = value.const_value
        if tensor is not None and not value.is_graph_input() and tensor.size <= _SMALL:
            known[value] = (tuple(tensor.shape), tensor.dtype, tensor.tobytes())
    return known[value]


def _plain(found: ir.Attr) -> Hashable:
    if found.type == ir.AttributeType.TENSOR:
        tensor = found.as_tensor()
        return tuple(tensor.shape), tensor.dtype, tensor.tobytes()
    return repr(found.value)


def _merge(graph: ir.Graph, first: ir.Node, again: ir.Node) -> None:
    for kept, dropped in zip(first.outputs, again.outputs, strict=True):
        dropped.replace_all_uses_with(kept)
    graph.remove(again, safe=True)
