"""Where every node and weight came from: ids, module scopes and original weight names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import onnx_ir as ir

from pfmc.ir.vocabulary import KEY_SCOPE, KEY_SOURCE, KEY_VALUE, KEY_WEIGHT

OWN_PREFIX = "pfmc."
FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"
NAME_SCOPES = "pkg.torch.onnx.name_scopes"
NAMESPACE = "namespace"
SCOPE_KEYS = frozenset({KEY_SCOPE, NAME_SCOPES, NAMESPACE})  # all that `stamp` reads on a node
WEIGHT_KEYS = frozenset({KEY_WEIGHT, FOLDED_FROM})  # and all that it reads on an initialiser
_NOWHERE = "_empty_nn_module_stack_from_metadata_hook"  # torch's word for "outside all modules"

# names that an exporter made up hold no dot: "val_76", "704", "_to_copy_1"; or "onnx::MatMul_123"
_INVENTED = re.compile(r"^(onnx::.*|[^.]*)$")
_QUOTED = re.compile(r"'([^']*)'")  # the words of a Python list of strings
_ROLES = {"MatMul": "weight", "Gemm": "weight", "Gather": "weight", "Add": "bias"}


def stamp(model: ir.Model) -> None:
    """Gives each node of `model` its id ``n<index>`` and scope, each initialiser its weight name.

    To be called once, on the untouched graph, because the ids are positions in the source file.
    Everything the exporter wrote beside it (stack traces with paths of the exporting machine,
    doc strings, framework metadata) is read for the scope and then removed.
    """
    for index, node in enumerate(model.graph):
        found = _read_scope(node)
        _strip(node)
        node.metadata_props[KEY_SOURCE] = f"n{index}"
        if found:
            node.metadata_props[KEY_SCOPE] = found
    for value in model.graph.initializers.values():
        name = _read_weight(value)
        _strip(value)
        if name:
            value.metadata_props[KEY_WEIGHT] = name
    _strip_rest(model)


def _strip_rest(model: ir.Model) -> None:
    for value in _values(model.graph):
        if not value.is_initializer():
            _strip(value)
    for function in model.functions.values():
        for node in function:
            _strip(node)
            node.metadata_props.pop(KEY_SOURCE, None)
            node.metadata_props.pop(KEY_SCOPE, None)
        for value in _values(function):
            _strip(value)
        _strip(function)
    model.doc_string = model.graph.doc_string = None
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def _values(graph: ir.Graph | ir.Function) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _strip(thing: ir.Node | ir.Value | ir.Function) -> None:
    """Removes all metadata but ours."""
    thing.doc_string = None
    foreign = [key for key in thing.metadata_props if not key.startswith(OWN_PREFIX)]
    for key in foreign:
        del thing.metadata_props[key]


def _read_scope(node: ir.Node) -> str:
    """The module scope of `node`, from its metadata, its name or the names of its weights."""
    known = node.metadata_props
    if KEY_SCOPE in known:
        return known[KEY_SCOPE]
    if NAME_SCOPES in known:
        return _scope_of_list(known[NAME_SCOPES])
    if NAMESPACE in known:
        return _scope_of_namespace(known[NAMESPACE])
    if node.name and node.name.startswith("/"):
        return ".".join(node.name.split("/")[1:-1])
    return _scope_of_weights(node)


def _scope_of_list(text: str) -> str:
    """``"['', 'model', 'model.layers.0', 'linear']"`` gives ``"model.layers.0"``."""
    names = _QUOTED.findall(text)
    return _innermost(names)


def _innermost(names: list[str]) -> str:
    """The last module before the operator itself."""
    return next((n for n in reversed(names[:-1]) if n and n != _NOWHERE), "")


def _scope_of_namespace(text: str) -> str:
    """``": Net/model: Model/model.fc: Linear/linear: aten.linear"`` gives ``"model.fc"``."""
    names = [part.partition(":")[0].strip() for part in text.split("/")]
    return _innermost(names)


def _scope_of_weights(node: ir.Node) -> str:
    for value in node.inputs:
        if value is not None and value.is_initializer() and not invented(value.name or ""):
            return (value.name or "").rpartition(".")[0]
    return ""


def _read_weight(value: ir.Value) -> str:
    """The original name of an initialiser; empty if it is an anonymous constant."""
    if KEY_WEIGHT in value.metadata_props:
        return value.metadata_props[KEY_WEIGHT]
    folded = _folded_from(value.metadata_props.get(FOLDED_FROM, ""))
    if folded:
        return folded
    name = value.name or ""
    return name if not invented(name) else _weight_of_use(value)


def _folded_from(text: str) -> str:
    """``"['a.weight']"`` gives ``"a.weight"``; several names are joined by spaces."""
    names = _QUOTED.findall(text)
    return " ".join(sorted(n for n in names if not invented(n)))


def _weight_of_use(value: ir.Value) -> str:
    """The weight name that the place of use suggests: ``scope.weight`` for a product."""
    tensor = value.const_value
    if tensor is None or not len(tensor.shape):
        return ""
    for use in value.uses():
        role = _ROLES.get(use.node.op_type, "")
        if use.node.op_type == "Gemm" and use.idx == 2:
            role = "bias"
        if role == "weight" and len(tensor.shape) < 2:
            continue
        where = scope(use.node)
        if role and where:
            return f"{where}.{role}"
    return ""


def invented(name: str) -> bool:
    """Whether `name` was made up by an exporter and says nothing about the module."""
    return _INVENTED.match(name) is not None


def scope(node: ir.Node) -> str:
    """The module scope of `node`, e.g. ``"model.layers.0.self_attn"``; empty if unknown."""
    return node.metadata_props.get(KEY_SCOPE, "")


def weight(value: ir.Value) -> str:
    """The original weight name(s) of an initialiser, space-separated; empty if unknown."""
    return value.metadata_props.get(KEY_WEIGHT, "")


def sources(node: ir.Node) -> tuple[str, ...]:
    """The ids of the source nodes that `node` came from, in file order, e.g. ``("n12", "n13")``."""
    return tuple(node.metadata_props.get(KEY_SOURCE, "").split())


def order(identifier: str) -> tuple[int, str]:
    """The sorting key of a source id: its index in the file, then its text."""
    digits = identifier[1:]
    return (int(digits), identifier) if digits.isdecimal() else (1 << 62, identifier)


def union_sources(new_node: ir.Node, old_nodes: Iterable[ir.Node]) -> ir.Node:
    """Gives `new_node` the ids of all `old_nodes` besides its own, and returns it.

    Its scope, where it has none, becomes the longest scope common to the old nodes. In a function,
    whose nodes have no ids yet, it gets none: inlining gives it those of the call.
    """
    olds = list(old_nodes)
    ids = {i for node in (new_node, *olds) for i in sources(node)}
    if ids:
        new_node.metadata_props[KEY_SOURCE] = " ".join(sorted(ids, key=order))
    if not scope(new_node) and (shared := common_scope(*olds)):
        new_node.metadata_props[KEY_SCOPE] = shared
    return new_node


def common_scope(*nodes: ir.Node) -> str:
    """The longest dotted scope that holds all `nodes` of known scope."""
    paths = [s.split(".") for s in map(scope, nodes) if s]
    if not paths:
        return ""
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) != 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


__all__ = [
    "KEY_SCOPE",
    "KEY_SOURCE",
    "KEY_VALUE",
    "KEY_WEIGHT",
    "common_scope",
    "invented",
    "order",
    "scope",
    "sources",
    "stamp",
    "union_sources",
    "weight",
]
