"""Finds every name in a model, and tells text from bytes that only claim to be text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx


def strings(proto: onnx.ModelProto) -> Iterator[str | bytes]:
    """Every name of the model but those inside subgraphs, which are refused anyway."""
    yield from (proto.producer_name, proto.producer_version, proto.domain)
    yield from (o.domain for o in proto.opset_import)
    graph = proto.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        yield value.name
        for dim in value.type.tensor_type.shape.dim:
            yield dim.dim_param
    yield from (t.name for t in graph.initializer)
    for body in (graph, *proto.functions):
        yield body.name
        for node in body.node:
            yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
            for attribute in node.attribute:
                yield from (attribute.name, attribute.ref_attr_name)
    for function in proto.functions:
        yield from (function.domain, *function.input, *function.output, *function.attribute)
        yield from (a.name for a in function.attribute_proto)
        yield from (o.domain for o in function.opset_import)


def decodes(values: Iterable[bytes]) -> bool:
    """Whether all of `values` are UTF-8 text."""
    try:
        for value in values:
            value.decode()
    except UnicodeDecodeError:
        return False
    return True
