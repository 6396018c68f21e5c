"""Refuses a parsed model that is broken, hostile or beyond us, before anything is built from it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeAlias

import onnx
from onnx import checker, defs

from pfmc.errors import InputError
from pfmc.ingest import dialects_refused
from pfmc.ingest.findings import MAX_FINDINGS, Finding, refuse
from pfmc.ingest.order import disorder, label
from pfmc.ingest.tensors import check_dims, check_dtype, check_tensor, tensor_code
from pfmc.ingest.texts import decodes, strings
from pfmc.ir.vocabulary import OPSET

OPSETS = range(7, min(28, defs.onnx_opset_version()) + 1)
IR_VERSIONS = range(3, 15)
MAX_NODES = 1_000_000
MAX_NAME = 1 << 16
MAX_DEPTH = 256
EARLY = {"LayerNormalization": 17}
"""Operators that ONNX Runtime's optimiser writes, and runs, before the opset that has them."""
CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})
RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial"}
    | {"Bernoulli"}
)
_STANDARD = ("", "ai.onnx")
_GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
_ATTRIBUTES = frozenset({
    onnx.AttributeProto.FLOAT, onnx.AttributeProto.INT, onnx.AttributeProto.STRING,
    onnx.AttributeProto.TENSOR, onnx.AttributeProto.GRAPH, onnx.AttributeProto.FLOATS,
    onnx.AttributeProto.INTS, onnx.AttributeProto.STRINGS, onnx.AttributeProto.TENSORS,
    onnx.AttributeProto.GRAPHS,
})  # fmt: skip

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
    found: list[Finding] = field(default_factory=list)
    refused: set[tuple[str, str, int]] = field(default_factory=set)

    def check(self) -> None:
        """Runs all checks.

        Raises:
            InputError: everything that was found, at once.
        """
        refuse(self.findings(), self.file)

    def findings(self) -> tuple[Finding, ...]:
        """Everything that is wrong with the model, cheapest checks first; at most `MAX_FINDINGS`.

        A check whose ground is missing (no graph, names that are no text) is left out.
        """
        self.found.clear()
        with suppress(_EnoughError):  # what was found so far is what there is to say
            self._run()
        return tuple(self.found)

    def _run(self) -> None:
        self._texts()
        if self.found or not self._header():
            return
        self._functions()
        self._operators()
        self._growth()
        self._graph()
        for key, function in self.functions.items():
            self._once(list(function.input), "function input")
            self._attributes(onnx.NodeProto(op_type=key[1], attribute=function.attribute_proto))
            self._body(function, f"function {_spell(key)}", set(function.input))

    def _say(
        self, code: str, what: str, place: str = "", mend: str = "", *,
        nodes: tuple[str, ...] = (), tensors: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self._add(Finding(code, what, place, mend, nodes, tensors))

    def _add(self, finding: Finding) -> None:
        if len(self.found) >= MAX_FINDINGS:
            raise _EnoughError
        self.found.append(finding)

    def _texts(self) -> None:
        """All names are text: protobuf hands out broken UTF-8 as bytes."""
        for string in strings(self.proto):
            if not isinstance(string, str):
                self._say("PFM002", f"A name in the file is not UTF-8 text: {string[:80]!r}")

    def _header(self) -> bool:
        """Whether there is a graph of a known opset to look at."""
        proto = self.proto
        whole = proto.HasField("graph") and len(proto.graph.output) > 0
        if not whole:
            self._say("PFM003", "Not a usable ONNX model: it has no outputs")
        if proto.training_info:
            self._say("PFM004", "The file holds training graphs", mend=_INFERENCE)
        if proto.ir_version not in IR_VERSIONS:
            self._say(
                "PFM005",
                f"The file format version (IR) is {proto.ir_version}; "
                f"{_range(IR_VERSIONS)} are read",
                mend=f"save it with ir_version <= {IR_VERSIONS[-1]}",
            )
        self.opset = self._check_opset(proto.opset_import, "the model")
        return whole and self.opset in OPSETS

    def _check_opset(self, imports: Iterable[onnx.OperatorSetIdProto], what: str) -> int:
        versions = {o.version for o in imports if o.domain in _STANDARD}
        if len(versions) != 1:
            self._say("PFM006", "The standard operator set must be imported exactly once", what)
            return 0
        (version,) = versions
        if version not in OPSETS:
            self._say(
                "PFM007",
                f"Opset {version} is not supported; {_range(OPSETS)} are",
                what,
                "export with opset_version=18 to 24",
            )
        return version

    def _functions(self) -> None:
        for function in self.proto.functions:
            key = (function.domain, function.name)
            if key in self.functions:
                self._say("PFM105", "A function is defined twice", _spell(key))
                continue
            self.functions[key] = function
            if any(o.domain in _STANDARD for o in function.opset_import):
                self._check_opset(function.opset_import, f"function {_spell(key)}")

    def _operators(self) -> None:
        """Lists every operator that is unknown, random or control flow, with counts and nodes."""
        bad: dict[tuple[str, str], list[onnx.NodeProto]] = {}
        for node, opset in self._all_nodes():
            code, reason = self._unsupported(node, opset)
            if reason:
                bad.setdefault((reason, code), []).append(node)
                self.refused.add((node.domain, node.op_type, opset))
        flow = any(code == "PFM102" for _, code in bad)
        for (reason, code), nodes in sorted(bad.items()):
            self._say(
                code,
                f"{reason} x {len(nodes)}",
                _some([node_name(n) for n in nodes]),
                _NO_FLOW if flow else _NO_CUSTOM,
                nodes=tuple(label(n) for n in nodes),
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

    def _unsupported(self, node: onnx.NodeProto, opset: int) -> tuple[str, str]:
        """Code and reason, starting with the operator, why this node cannot be compiled."""
        key = (node.domain, node.op_type)
        if (key in self.functions or key in self.dialect) and not _subgraphs(node):
            return "", ""
        name = _spell(key)
        if key in self.functions:
            return "PFM102", f"{name} (a function that takes a graph)"
        if node.domain not in _STANDARD:
            known = dialects_refused.reason(*key)
            return "PFM101", f"{name} ({known or 'unknown domain or operator'})"
        if node.op_type in CONTROL_FLOW or _subgraphs(node):
            return "PFM102", f"{name} (control flow)"
        if node.op_type in RANDOM:
            return "PFM103", f"{name} (draws random numbers)"
        if not _known(node.op_type, opset):
            return "PFM104", f"{name} (not in opset {opset})"
        return "", ""

    def _growth(self) -> None:
        """Bounds the number of nodes after inlining all functions, and finds recursion."""
        sizes: dict[Key, int] = {}
        try:
            total = self._grown(self.proto.graph.node, sizes, ())
        except _RecursionFoundError as circle:
            self._say("PFM106", f"Functions call each other in a circle: {circle}")
            return
        if total > MAX_NODES:
            self._say(
                "PFM107",
                f"With its functions inlined the model would have {total} nodes; "
                f"at most {MAX_NODES}",
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
        if key in path or len(path) > MAX_DEPTH:
            start = path.index(key) if key in path else 0
            raise _RecursionFoundError(" -> ".join(_spell(k) for k in (*path[start:], key)[:8]))
        if key not in sizes:
            sizes[key] = self._grown(self.functions[key].node, sizes, (*path, key))
        return sizes[key]

    def _graph(self) -> None:
        graph = self.proto.graph
        if len(graph.sparse_initializer):
            self._say("PFM207", "The graph has sparse initialisers", mend=_INFERENCE)
        for value in (*graph.input, *graph.output):
            self._check_value(value)
        inputs = [v.name for v in graph.input]
        initialisers = [t.name for t in graph.initializer]
        self._once(inputs, "graph input")
        self._once(initialisers, "initialiser")
        self._once([v.name for v in graph.output], "graph output")
        for tensor in graph.initializer:
            self._tensor(tensor, f"tensor {tensor.name!r}", tensors=(tensor.name,))
        self._body(graph, "the graph", {*inputs, *initialisers})

    def _tensor(
        self, tensor: onnx.TensorProto, place: str, *,
        nodes: tuple[str, ...] = (), tensors: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        try:
            check_tensor(tensor, place)
        except InputError as error:
            self._say(tensor_code(tensor), error.what, place, error.mend, nodes=nodes,
                      tensors=tensors)  # fmt: skip

    def _once(self, names: list[str], what: str) -> None:
        if "" in names:
            self._say("PFM205", f"A {what} has no name")
        if len(set(names)) != len(names):
            for double in [n for n, count in Counter(names).items() if n and count > 1]:
                self._say("PFM201", f"Two {what}s have the same name", repr(double),
                          tensors=(double,))  # fmt: skip
        for long in [n for n in names if len(n) > MAX_NAME]:
            self._say("PFM205", f"A {what} has a name of {len(long)} characters")

    def _check_value(self, value: onnx.ValueInfoProto) -> None:
        place, tensors = f"value {value.name!r}", (value.name,)
        if value.type.WhichOneof("value") != "tensor_type":
            kind = value.type.WhichOneof("value") or "of no type"
            what = f"A graph input or output is no tensor but {kind}"
            self._say("PFM206", what, place, tensors=tensors)
            return
        code = "PFM301"
        try:
            check_dtype(value.type.tensor_type.elem_type, place)
            code = "PFM302"
            dims = value.type.tensor_type.shape.dim
            check_dims([d.dim_value for d in dims if d.HasField("dim_value")], place)
        except InputError as error:
            self._say(code, error.what, place, error.mend, tensors=tensors)

    def _body(self, body: Body, what: str, defined: set[str]) -> None:
        """Names are defined once and before they are used in some order; attributes are sound."""
        outputs: dict[str, int] = {}
        opset = self._opset_of(body)
        for index, node in enumerate(body.node):
            self._node(node, opset, isinstance(body, onnx.FunctionProto))
            for name in filter(None, node.output):
                if name in outputs or name in defined:
                    self._say("PFM201", f"The value {name!r} is defined twice", node_name(node),
                              nodes=(label(node),), tensors=(name,))  # fmt: skip
                outputs[name] = index
        for finding in disorder(body.node, outputs, defined):
            self._add(finding)
        results = body.output if isinstance(body, onnx.FunctionProto) else _names(body.output)
        for name in results:
            if name not in outputs and name not in defined:
                self._say("PFM203", f"The output {name!r} is computed by no node", what,
                          tensors=(name,))  # fmt: skip

    def _node(self, node: onnx.NodeProto, opset: int, in_function: bool) -> None:
        if self._attributes(node, in_function):
            self._schema(node, opset)

    def _attributes(self, node: onnx.NodeProto, in_function: bool = False) -> bool:
        """Whether the attributes of a node, or the defaults of a function, can be read."""
        seen = set()
        for attribute in node.attribute:
            what = ""
            if attribute.name in seen:
                what = f"Attribute {attribute.name!r} is given twice"
            elif not decodes((attribute.s, *attribute.strings)):
                what = f"Attribute {attribute.name!r} is not UTF-8 text"
            elif attribute.ref_attr_name and not in_function:
                what = "An attribute refers to a function, outside of any"
            elif node.op_type == "GatherND" and _counts_backwards(attribute):
                what = "batch_dims of a GatherND is negative or unknown: shape inference crashes"
            elif node.op_type == "Einsum" and _is_no_equation(attribute):
                what = "The equation of an Einsum is malformed or unknown: shape inference hangs"
            elif node.op_type == "LayerNormalization" and self._is_far_axis(attribute):
                what = "The axis of a LayerNormalization is far away: shape inference crashes"
            elif node.op_type == "Split" and _miscounts(attribute, len(node.output)):
                what = "num_outputs of a Split is not how many it has: shape inference crashes"
            elif attribute.type not in _ATTRIBUTES:
                what = f"Attribute {attribute.name!r} is of a kind that is not read"
            if what:
                self._say("PFM109", what, node_name(node), nodes=(label(node),))
                return False
            seen.add(attribute.name)
            for tensor in (
                *((attribute.t,) if attribute.HasField("t") else ()),
                *attribute.tensors,
            ):
                place = f"{node_name(node)}, attribute {attribute.name!r}"
                self._tensor(tensor, place, nodes=(label(node),))
        return True

    def _is_far_axis(self, attribute: onnx.AttributeProto) -> bool:
        """Whether onnx 1.23, which counts axes in int32, could end the process on it."""
        if attribute.name != "axis" or not attribute.ref_attr_name:
            return attribute.name == "axis" and abs(attribute.i) > _FAR
        calls = (n for n, _ in self._all_nodes() if (n.domain, n.op_type) in self.functions)
        given = [*(a for n in calls for a in n.attribute)]
        given += [a for f in self.functions.values() for a in f.attribute_proto]
        return any(abs(a.i) > _FAR for a in given)

    def _call(self, node: onnx.NodeProto, function: onnx.FunctionProto) -> None:
        what = _first_surplus(node, function)
        if what:
            self._say("PFM108", what, node_name(node), nodes=(label(node),))

    def _schema(self, node: onnx.NodeProto, written: int) -> None:
        """Inputs, outputs and attributes of a standard operator against its schema."""
        key = (node.domain, node.op_type)
        if key in self.functions:
            self._call(node, self.functions[key])
            return
        if node.domain not in _STANDARD or key in self.dialect:
            return
        if self.refused and (*key, written) in self.refused:
            return
        written = max(written, EARLY.get(node.op_type, 0))
        for opset in sorted({written, min(written, OPSET)}, reverse=True):
            try:
                checker.check_node(node, _context(self.proto.ir_version, opset))
            except checker.ValidationError as error:
                what = _first_line(str(error), opset)
                self._say("PFM108", what, node_name(node), nodes=(label(node),))
                return


def _counts_backwards(attribute: onnx.AttributeProto) -> bool:
    """Whether onnx 1.23, which reads this attribute unchecked, could end the process on it."""
    return attribute.name == "batch_dims" and (attribute.i < 0 or bool(attribute.ref_attr_name))


_FAR = _MOST_PARTS = 1 << 16


def _miscounts(attribute: onnx.AttributeProto, outputs: int) -> bool:
    """Whether onnx 1.23, which makes room for so many parts unchecked, could end the process."""
    if attribute.name != "num_outputs":
        return False
    fits = outputs <= attribute.i <= max(outputs, _MOST_PARTS)
    return bool(attribute.ref_attr_name) or not fits


_EQUATION = re.compile(rb"T(,T)*(->T)?".replace(b"T", rb"[A-Za-z ]*(\.\.\.)?[A-Za-z ]*"))


def _is_no_equation(attribute: onnx.AttributeProto) -> bool:
    """Whether onnx 1.23, which looks for the next letter for ever, could hang on it."""
    if attribute.name != "equation":
        return False
    return bool(attribute.ref_attr_name) or _EQUATION.fullmatch(attribute.s) is None


def _first_surplus(node: onnx.NodeProto, function: onnx.FunctionProto) -> str:
    if node.overload != function.overload:
        return f"Overload {node.overload!r} of a function is called that is not in the file"
    for what, given, formal in (
        ("inputs", node.input, function.input), ("outputs", node.output, function.output)
    ):  # fmt: skip
        if len(given) > len(formal):
            return f"{len(given)} {what} are given to a function of {len(formal)}"
    return ""


def check_inlined(nodes: Iterable[onnx.NodeProto]) -> None:
    """Nodes that stood in functions, against their schemas: a call may have left something out.

    Raises:
        InputError: a standard operator lacks an input or a required attribute.
    """
    for node in nodes:
        if node.domain not in _STANDARD or not _known(node.op_type, OPSET):
            continue
        try:
            checker.check_node(node, _context(IR_VERSIONS[-1], OPSET))
        except checker.ValidationError as error:
            what = _first_line(str(error), OPSET)
            raise InputError(what, where=node_name(node), mend=_INFERENCE) from error


class _EnoughError(Exception):
    """So much was found that looking on helps nobody."""


class _RecursionFoundError(Exception):
    """A function calls itself over others; the text is the chain."""


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


def _known(op_type: str, opset: int) -> bool:
    if op_type in EARLY:
        return True
    try:
        schema = defs.get_schema(op_type, opset, "")
    except defs.SchemaError:
        return False
    return not schema.deprecated


def _subgraphs(node: onnx.NodeProto) -> bool:
    return any(a.HasField("g") or len(a.graphs) or a.type in _GRAPHS for a in node.attribute)


def _names(values: Iterable[onnx.ValueInfoProto]) -> list[str]:
    return [v.name for v in values]


def node_name(node: onnx.NodeProto) -> str:
    """How a node is named in messages: its name, else its first output."""
    return f"node {label(node)[:120]!r} ({node.op_type[:60]})"


def _spell(key: Key) -> str:
    domain, name = key
    return f"{domain}::{name}" if domain not in _STANDARD else name


def _some(names: Sequence[str], count: int = 3) -> str:
    more = ", ..." if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _range(versions: range) -> str:
    return f"{versions.start} to {versions.stop - 1}"
