"""Refuses a parsed model that is broken, hostile or beyond us, before anything is built from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import onnx
from onnx import checker, defs

from pfmc.errors import InputError
from pfmc.ingest.order import check_order
from pfmc.ingest.tensors import check_dims, check_dtype, check_tensor
from pfmc.ir.vocabulary import OPSET

OPSETS = range(7, 27)
IR_VERSIONS = range(3, 14)
MAX_NODES = 1_000_000
MAX_NAME = 1 << 16
CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})
RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial"}
    | {"Bernoulli"}
)
_STANDARD = ("", "ai.onnx")

Key: TypeAlias = tuple[str, str]
Body: TypeAlias = onnx.GraphProto | onnx.FunctionProto


@dataclass
class Guard:
    """The checks of one model.

    Attributes:
        proto: the parsed model.
        file: its name, for the messages.
        dialect: operators outside the standard that ingest can lower, as (domain, name).
    """

    proto: onnx.ModelProto
    file: str
    dialect: frozenset[Key]
    opset: int = 0
    functions: dict[Key, onnx.FunctionProto] = field(default_factory=dict)

    def check(self) -> None:
        """Runs all checks, cheapest first.

        Raises:
            InputError: at the first kind of defect; unsupported operators are all listed at once.
        """
        self._texts()
        self._header()
        self._functions()
        self._operators()
        self._growth()
        self._graph()
        for key, function in self.functions.items():
            self._body(function, f"function {_spell(key)}", set(function.input))

    def _at(self, what: str) -> str:
        return f"{self.file}: {what}"

    def _texts(self) -> None:
        """All names are text: protobuf hands out broken UTF-8 as bytes."""
        for string in _strings(self.proto):
            if not isinstance(string, str):
                raise InputError(
                    f"A name in the file is not UTF-8 text: {string[:80]!r}", where=self.file
                )

    def _header(self) -> None:
        proto = self.proto
        if not proto.HasField("graph") or not proto.graph.output:
            raise InputError("Not a usable ONNX model: it has no outputs", where=self.file)
        if proto.training_info:
            raise InputError("The file holds training graphs", where=self.file, mend=_INFERENCE)
        if proto.ir_version not in IR_VERSIONS:
            raise InputError(
                f"The file format version (IR) is {proto.ir_version}; "
                f"{_range(IR_VERSIONS)} are read",
                where=self.file,
                mend="export or convert the model with a current onnx",
            )
        self.opset = self._check_opset(proto.opset_import, "the model")

    def _check_opset(self, imports: Iterable[onnx.OperatorSetIdProto], what: str) -> int:
        versions = {o.version for o in imports if o.domain in _STANDARD}
        if len(versions) != 1:
            raise InputError(
                "The standard operator set must be imported exactly once", where=self._at(what)
            )
        (version,) = versions
        if version not in OPSETS:
            raise InputError(
                f"Opset {version} is not supported; {_range(OPSETS)} are",
                where=self._at(what),
                mend="export with opset_version=18 to 24",
            )
        return version

    def _functions(self) -> None:
        for function in self.proto.functions:
            key = (function.domain, function.name)
            if key in self.functions:
                raise InputError("A function is defined twice", where=self._at(_spell(key)))
            self.functions[key] = function
            if any(o.domain in _STANDARD for o in function.opset_import):
                self._check_opset(function.opset_import, f"function {_spell(key)}")

    def _operators(self) -> None:
        """Lists every operator that is unknown, random or control flow, with counts and nodes."""
        bad: dict[str, list[str]] = {}
        for node, opset in self._all_nodes():
            reason = self._unsupported(node, opset)
            if reason:
                bad.setdefault(reason, []).append(node_name(node))
        if not bad:
            return
        lines = [
            f"{reason} x {len(names)}: {_some(names)}" for reason, names in sorted(bad.items())
        ]
        flow = any("control flow" in reason for reason in bad)
        raise InputError(
            f"{len(bad)} kind(s) of operators cannot be compiled:\n    " + "\n    ".join(lines),
            where=self.file,
            mend=_NO_FLOW if flow else _NO_CUSTOM,
        )

    def _all_nodes(self) -> Iterator[tuple[onnx.NodeProto, int]]:
        """Every node with the opset it is written in."""
        for node in self.proto.graph.node:
            yield node, self.opset
        for function in self.functions.values():
            for node in function.node:
                yield node, self._opset_of(function)

    def _opset_of(self, body: Body) -> int:
        if isinstance(body, onnx.GraphProto):
            return self.opset
        own = [o.version for o in body.opset_import if o.domain in _STANDARD]
        return own[0] if own else self.opset

    def _unsupported(self, node: onnx.NodeProto, opset: int) -> str:
        """Why this node cannot be compiled, starting with the operator; empty if it can."""
        key = (node.domain, node.op_type)
        if key in self.functions or (key in self.dialect and not _subgraphs(node)):
            return ""
        name = _spell(key)
        if node.domain not in _STANDARD:
            return f"{name} (unknown domain or operator)"
        if node.op_type in CONTROL_FLOW or _subgraphs(node):
            return f"{name} (control flow)"
        if node.op_type in RANDOM:
            return f"{name} (draws random numbers)"
        if not _known(node.op_type, opset):
            return f"{name} (not in opset {opset})"
        return ""

    def _growth(self) -> None:
        """Bounds the number of nodes after inlining all functions, and finds recursion."""
        sizes: dict[Key, int] = {}
        total = self._grown(self.proto.graph.node, sizes, ())
        if total > MAX_NODES:
            raise InputError(
                f"With its functions inlined the model would have {total} nodes; "
                f"at most {MAX_NODES}",
                where=self.file,
                mend="remove needless nesting of functions",
            )

    def _grown(
        self, nodes: Sequence[onnx.NodeProto], sizes: dict[Key, int], path: tuple[Key, ...]
    ) -> int:
        total = 0
        for key, count in Counter((n.domain, n.op_type) for n in nodes).items():
            total += count * (self._size(key, sizes, path) if key in self.functions else 1)
        return total

    def _size(self, key: Key, sizes: dict[Key, int], path: tuple[Key, ...]) -> int:
        if key in path or len(path) > 256:
            chain = " -> ".join(_spell(k) for k in (*path[path.index(key) :], key)[:8])
            raise InputError(f"Functions call each other in a circle: {chain}", where=self.file)
        if key not in sizes:
            sizes[key] = self._grown(self.functions[key].node, sizes, (*path, key))
        return sizes[key]

    def _graph(self) -> None:
        graph = self.proto.graph
        if len(graph.sparse_initializer):
            raise InputError("The graph has sparse initialisers", where=self.file, mend=_INFERENCE)
        for value in (*graph.input, *graph.output):
            self._check_value(value)
        inputs = [v.name for v in graph.input]
        initialisers = [t.name for t in graph.initializer]
        self._once(inputs, "graph input")
        self._once(initialisers, "initialiser")
        self._once([v.name for v in graph.output], "graph output")
        for tensor in graph.initializer:
            check_tensor(tensor, self._at(f"tensor {tensor.name!r}"))
        self._body(graph, "the graph", {*inputs, *initialisers})

    def _once(self, names: list[str], what: str) -> None:
        if "" in names:
            raise InputError(f"A {what} has no name", where=self.file)
        if len(set(names)) != len(names):
            double = Counter(names).most_common(1)[0][0]
            raise InputError(f"Two {what}s have the same name", where=self._at(repr(double)))
        long = next((n for n in names if len(n) > MAX_NAME), "")
        if long:
            raise InputError(f"A {what} has a name of {len(long)} characters", where=self.file)

    def _check_value(self, value: onnx.ValueInfoProto) -> None:
        where = self._at(f"value {value.name!r}")
        if value.type.WhichOneof("value") != "tensor_type":
            kind = value.type.WhichOneof("value") or "of no type"
            raise InputError(f"A graph input or output is no tensor but {kind}", where=where)
        check_dtype(value.type.tensor_type.elem_type, where)
        dims = value.type.tensor_type.shape.dim
        check_dims([d.dim_value for d in dims if d.HasField("dim_value")], where)

    def _body(self, body: Body, what: str, defined: set[str]) -> None:
        """Names are defined once and before they are used in some order; attributes are sound."""
        outputs: dict[str, int] = {}
        opset = self._opset_of(body)
        for index, node in enumerate(body.node):
            self._node(node, opset, isinstance(body, onnx.FunctionProto))
            for name in filter(None, node.output):
                if name in outputs or name in defined:
                    raise InputError(
                        f"The value {name!r} is defined twice", where=self._at(node_name(node))
                    )
                outputs[name] = index
        results = body.output if isinstance(body, onnx.FunctionProto) else _names(body.output)
        check_order(body.node, outputs, defined, self.file)
        for name in results:
            if name not in outputs and name not in defined:
                raise InputError(
                    f"The output {name!r} is computed by no node", where=self._at(what)
                )

    def _node(self, node: onnx.NodeProto, opset: int, in_function: bool) -> None:
        where = self._at(node_name(node))
        seen = set()
        for attribute in node.attribute:
            if attribute.name in seen:
                raise InputError(f"Attribute {attribute.name!r} is given twice", where=where)
            seen.add(attribute.name)
            if not _decodes((attribute.s, *attribute.strings)):
                raise InputError(f"Attribute {attribute.name!r} is not UTF-8 text", where=where)
            if attribute.ref_attr_name and not in_function:
                raise InputError("An attribute refers to a function, outside of any", where=where)
            for tensor in (
                *((attribute.t,) if attribute.HasField("t") else ()),
                *attribute.tensors,
            ):
                check_tensor(tensor, f"{where}, attribute {attribute.name!r}")
        self._schema(node, opset, where)

    def _schema(self, node: onnx.NodeProto, written: int, where: str) -> None:
        """Inputs, outputs and attributes of a standard operator against its schema."""
        if (node.domain, node.op_type) in self.functions or node.domain not in _STANDARD:
            return
        if (node.domain, node.op_type) in self.dialect:
            return
        for opset in sorted({written, min(written, OPSET)}, reverse=True):
            try:
                checker.check_node(node, _context(self.proto.ir_version, opset))
            except checker.ValidationError as error:
                raise InputError(_first_line(str(error), opset), where=where) from error


_INFERENCE = "export the model for inference"
_NO_FLOW = "export with fixed control flow (torch.onnx.export with dynamo=True unrolls it)"
_NO_CUSTOM = "export with standard operators, or give the custom ones as ONNX functions"
_CONTEXTS: dict[tuple[int, int], checker.C.CheckerContext] = {}


def _context(ir_version: int, opset: int) -> checker.C.CheckerContext:
    key = (ir_version, opset)
    if key not in _CONTEXTS:
        made = checker.C.CheckerContext()
        made.ir_version, made.opset_imports = ir_version, {"": opset}
        _CONTEXTS[key] = made
    return _CONTEXTS[key]


def _first_line(text: str, opset: int) -> str:
    line = text.partition("\n")[0].strip()
    return f"A node does not fit its operator in opset {opset}: {line[:300]}"


def _strings(proto: onnx.ModelProto) -> Iterator[str | bytes]:
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


def _decodes(values: Iterable[bytes]) -> bool:
    try:
        for value in values:
            value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _known(op_type: str, opset: int) -> bool:
    try:
        schema = defs.get_schema(op_type, opset, "")
    except defs.SchemaError:
        return False
    return not schema.deprecated


def _subgraphs(node: onnx.NodeProto) -> bool:
    return any(a.HasField("g") or len(a.graphs) for a in node.attribute)


def _names(values: Iterable[onnx.ValueInfoProto]) -> list[str]:
    return [v.name for v in values]


def node_name(node: onnx.NodeProto) -> str:
    """How a node is named in messages: its name, else its first output."""
    name = node.name or (node.output[0] if node.output else "")
    return f"node {name[:120]!r} ({node.op_type[:60]})"


def _spell(key: Key) -> str:
    domain, name = key
    return f"{domain}::{name}" if domain not in _STANDARD else name


def _some(names: Sequence[str], count: int = 3) -> str:
    more = ", ..." if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _range(versions: range) -> str:
    return f"{versions.start} to {versions.stop - 1}"
