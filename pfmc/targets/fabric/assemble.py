"""Builds the netlist of a model: each node an instance, each value a net, equal blocks shared.

Blocks are module scopes up to their first number (``model.layers.0``): names inside a block are
made relative to it, so six equal decoder layers become one definition with six instances, and
each instance carries its scope and its layers' names as parameters. What several blocks read and
no fixed linear made (a mask, rotary tables) belongs to none of them: it stands outside.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from pfmc.errors import InternalError
from pfmc.hardware import FabricOp
from pfmc.ir import vocabulary
from pfmc.netlist import Cell, Instance, Module, Net, Netlist, Parameter, Port

_BLOCK = re.compile(r"^(.*?(?:^|\.)\d+)(?:\.|$)")
_WORD_BITS = 16
_INTEGER_BITS = 32


def assemble(
    model: ir.Model, definitions: Mapping[str, Module], fabric: Sequence[FabricOp]
) -> Netlist:
    """The netlist of `model` on a target.

    Width of a net: that of the fixed linear's port it meets, else 16 bits for real numbers, 32
    for integers, 1 for flags: a port carries one number of the stream at a time.

    Args:
        model: QUANTISED (or CANONICAL).
        definitions: fixed linear's name -> its module, with one input and one output port; equal
            modules (same `Module.digest`) become one definition.
        fabric: `pfmc.targets.fabric.work.fabric_ops` of the same model; they become the cells.

    Raises:
        InternalError: a fixed linear has no definition, a node no fabric operation, or the result
            is not sound.
    """
    builder = _Builder(definitions, _work(model, fabric))
    builder.measure(model)
    top = _Scope("top")
    for block, nodes in _groups(model):
        if block:
            top.add(builder.block_instance(block, nodes))
        else:
            top.add(builder.node_instance(nodes[0], ""))
    netlist = builder.finish(model, top)
    netlist.check()
    return netlist


def _work(model: ir.Model, fabric: Sequence[FabricOp]) -> dict[ir.Node, FabricOp]:
    """The operation of each dynamic node; both are in graph order."""
    nodes = [n for n in model.graph if not _fixed(n)]
    for node, op in itertools.zip_longest(nodes, fabric[: len(nodes)]):
        if node is None or op is None or op.name != str(node.name):
            raise InternalError("a node has no fabric operation", where=str(node and node.name))
    return dict(zip(nodes, fabric, strict=False))


def block_of(node: ir.Node) -> str:
    """The block a node belongs to: its scope up to the first number; empty if there is none."""
    scope = str(node.name) if _fixed(node) else node.metadata_props.get(vocabulary.KEY_SCOPE, "")
    match = _BLOCK.match(scope)
    return match[1] if match else ""


def blocks(model: ir.Model) -> dict[ir.Node, str]:
    """The block of every node; what several blocks share is moved out of the one that names it."""
    found = {n: block_of(n) for n in model.graph}
    made: set[ir.Node] = set()  # nodes with a fixed linear of their own block before them
    for node in model.graph:
        before = [v.producer() for v in node.inputs if v is not None]
        inside = any(p in made and found[p] == found[node] for p in before if p is not None)
        if inside or _fixed(node):
            made.add(node)
    for node in reversed(list(model.graph)):
        users = {found[u] for v in node.outputs for u, _ in v.uses()}
        shared = len(users - {found[node]}) > 0
        if found[node] and node not in made and shared:
            found[node] = ""
    return found


def _fixed(node: ir.Node) -> bool:
    return node.domain == vocabulary.DOMAIN and node.op_type in vocabulary.LINEARS


def _groups(model: ir.Model) -> list[tuple[str, list[ir.Node]]]:
    """Blocks with their nodes, and single nodes outside blocks, in graph order."""
    assigned = blocks(model)
    found: list[tuple[str, list[ir.Node]]] = []
    started: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        block = assigned[node]
        if block and block in started:
            started[block].append(node)
            continue
        found.append((block, [node]))
        if block:
            started[block] = found[-1][1]
    return found


@dataclass
class _Wired:
    """An instance and the ONNX values on its ports."""

    instance: Instance
    inputs: dict[str, ir.Value]
    outputs: dict[str, ir.Value]


@dataclass
class _Scope:
    name: str
    wired: list[_Wired] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)

    def add(self, wired: _Wired) -> None:
        """Takes an instance in, under a name of its own."""
        name, number = wired.instance.name, 1
        while name in self.taken:
            number += 1
            name = f"{wired.instance.name}_{number}"
        self.taken.add(name)
        wired.instance = replace(wired.instance, name=name)
        self.wired.append(wired)


class _Builder:
    def __init__(self, definitions: Mapping[str, Module], work: Mapping[ir.Node, FabricOp]) -> None:
        self.layers, self.work = definitions, work
        self.modules: dict[str, Module] = {}
        self.by_digest: dict[str, str] = {}
        self.width: dict[ir.Value, int] = {}

    def define(self, module: Module, stem: str) -> str:
        """The name under which this body is defined, new or shared."""
        key = f"{stem} {module.digest()}"
        if key not in self.by_digest:
            name, count = stem, 1
            while name in self.modules:
                count += 1
                name = f"{stem}_{count}"
            self.by_digest[key] = name
            self.modules[name] = replace(module, name=name)
        return self.by_digest[key]

    def measure(self, model: ir.Model) -> None:
        """Finds the width of every value."""
        for node in vocabulary.fixed_linears(model):
            module = self.layer(node)
            x = node.inputs[0]
            if x is not None:
                self.width[x] = _single(module, "in").width
            self.width[node.outputs[0]] = _single(module, "out").width

    def layer(self, node: ir.Node) -> Module:
        if str(node.name) not in self.layers:
            raise InternalError("a fixed linear has no definition", where=str(node.name))
        return self.layers[str(node.name)]

    def bits(self, value: ir.Value) -> int:
        if value in self.width:
            return self.width[value]
        if value.dtype == ir.DataType.BOOL:
            return 1
        return _INTEGER_BITS if value.dtype and value.dtype.is_integer() else _WORD_BITS

    def node_instance(self, node: ir.Node, name: str) -> _Wired:
        """An instance of a fixed linear's module or of a fabric unit."""
        name = name or _identifier(str(node.name))
        inputs = [v for v in node.inputs if v is not None and v.const_value is None]
        outputs = [v for v in node.outputs if v.name]
        parameters: dict[str, Parameter] = {}
        if _fixed(node):
            module = self.layer(node)
            ins, outs = [_single(module, "in").name], [_single(module, "out").name]
            inputs, stem = inputs[:1], _identifier(module.name)
            parameters = {"layer": str(node.name)}
        else:
            ins, outs = _names("x", len(inputs)), _names("y", len(outputs))
            module, stem = self.unit(node, ins, inputs, outs, outputs), _unit_name(node)
            parameters = {"node": str(node.name)}
        definition = self.define(module, stem)
        return _Wired(
            Instance(name, definition, {}, parameters),
            dict(zip(ins, inputs, strict=True)), dict(zip(outs, outputs, strict=True)),
        )  # fmt: skip

    def unit(
        self, node: ir.Node, ins: list[str], inputs: list[ir.Value],
        outs: list[str], outputs: list[ir.Value],
    ) -> Module:  # fmt: skip
        op = self.work[node]
        ports = [Port(n, "in", self.bits(v)) for n, v in zip(ins, inputs, strict=True)]
        ports += [Port(n, "out", self.bits(v)) for n, v in zip(outs, outputs, strict=True)]
        cell = Cell(op.kind, 1, {"operator": node.op_type, **op.work})
        return Module("", tuple(ports), (), (), (cell,))

    def block_instance(self, block: str, nodes: list[ir.Node]) -> _Wired:
        """One block as an instance of its own, perhaps shared, definition."""
        scope = _Scope(block)
        counts: dict[str, int] = {}
        for node in nodes:
            scope.add(self.node_instance(node, _relative(node, block, counts)))
        inside = {v for w in scope.wired for v in w.outputs.values()}
        outer = {v for v in inside if _used_outside(v, set(nodes))}
        names = _net_names(scope.wired, {})
        ins = _ordered(v for w in scope.wired for v in w.inputs.values() if v not in inside)
        outs = [v for v in names if v in outer]
        module = self.module("", scope, names, ins, outs)
        relative = tuple(replace(i, parameters={}) for i in module.instances)
        definition = self.define(
            replace(module, instances=relative), "block_" + _identifier(_stem(block))
        )
        parameters: dict[str, Parameter] = {"scope": block}
        for instance in module.instances:
            if "layer" in instance.parameters:
                parameters[instance.name] = instance.parameters["layer"]
        return _Wired(
            Instance(_identifier(block), definition, {}, parameters),
            {names[v]: v for v in ins}, {names[v]: v for v in outs},
        )  # fmt: skip

    def module(
        self, name: str, scope: _Scope, names: Mapping[ir.Value, str],
        ins: Sequence[ir.Value], outs: Sequence[ir.Value],
    ) -> Module:  # fmt: skip
        ports = [Port(names[v], "in", self.bits(v)) for v in ins]
        ports += [Port(names[v], "out", self.bits(v)) for v in outs]
        edge = {p.name for p in ports}
        nets = [Net(n, self.bits(v)) for v, n in names.items() if n not in edge]
        read = {v for w in scope.wired for v in w.inputs.values()} | set(outs)
        instances = [_connect(w, names, read) for w in scope.wired]
        used = {n for i in instances for n in i.connections.values()}
        kept = tuple(n for n in nets if n.name in used)
        return Module(name, tuple(ports), kept, tuple(instances))

    def finish(self, model: ir.Model, top: _Scope) -> Netlist:
        given = {v: _identifier(str(v.name)) for v in model.graph.inputs}
        given |= {v: _identifier(str(v.name)) for v in model.graph.outputs}
        names = _net_names(top.wired, given)
        read = {v for w in top.wired for v in w.inputs.values()} | set(model.graph.outputs)
        ins = [v for v in model.graph.inputs if v in read]
        outs = _ordered(v for v in model.graph.outputs if v not in set(model.graph.inputs))
        name = _identifier(model.graph.name or "model")
        while name in self.modules:
            name += "_top"
        module = self.module(name, top, names, ins, outs)
        return Netlist(name, {**self.modules, name: module})


def _single(module: Module, direction: str) -> Port:
    ports = [p for p in module.ports if p.direction == direction]
    if len(ports) != 1:
        raise InternalError(
            f"a fixed linear's module has {len(ports)} {direction} ports", where=module.name
        )
    return ports[0]


def _names(stem: str, count: int) -> list[str]:
    return [stem] if count == 1 else [f"{stem}{i}" for i in range(count)]


def _unit_name(node: ir.Node) -> str:
    return "unit_" + re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", node.op_type).lower()


def _identifier(name: str) -> str:
    """A name that every netlist language takes."""
    plain = re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_") or "n"
    return f"n{plain}" if plain[0].isdigit() else plain


def _stem(block: str) -> str:
    """The block's name without its number."""
    return re.sub(r"\.?\d+$", "", block) or "block"


def _relative(node: ir.Node, block: str, counts: dict[str, int]) -> str:
    """The instance's name inside its block: scope below it, operator and occurrence."""
    if _fixed(node):
        stem = str(node.name)[len(block) :]
    else:
        scope = node.metadata_props.get(vocabulary.KEY_SCOPE, "")[len(block) :]
        stem = f"{scope}.{_unit_name(node)[5:]}"
    stem = _identifier(stem)
    counts[stem] = counts.get(stem, 0) + 1
    return stem if counts[stem] == 1 else f"{stem}_{counts[stem]}"


def _used_outside(value: ir.Value, nodes: set[ir.Node]) -> bool:
    return value.is_graph_output() or any(n not in nodes for n, _ in value.uses())


def _ordered(values: Iterable[ir.Value]) -> list[ir.Value]:
    return list(dict.fromkeys(values))


def _net_names(wired: Sequence[_Wired], given: Mapping[ir.Value, str]) -> dict[ir.Value, str]:
    """Names nets after their driver (``instance_port``), else after their first reader."""
    names = dict(given)
    taken = set(names.values())

    def name(value: ir.Value, instance: str, port: str) -> None:
        if value not in names:
            plain = f"{instance}_{port}"
            while plain in taken:
                plain += "_"
            names[value] = plain
            taken.add(plain)

    for w in wired:
        for port, value in w.outputs.items():
            name(value, w.instance.name, port)
    for w in wired:
        for port, value in w.inputs.items():
            name(value, w.instance.name, port)
    return names


def _connect(wired: _Wired, names: Mapping[ir.Value, str], read: set[ir.Value]) -> Instance:
    """The instance with its nets; outputs that nothing reads stay open."""
    nets = {port: names[v] for port, v in wired.inputs.items()}
    nets |= {port: names[v] for port, v in wired.outputs.items() if v in read}
    return replace(wired.instance, connections=nets)
