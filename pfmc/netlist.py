"""The netlist: a definition once, instances many; nets, ports and counted cells; checks and text.

A `Module` has ports and nets, and either instances of other modules or cells, or both. A port is
also a net of its module, of the same name. A cell is a *kind of part and how many of it*
(``rom_bank × 64``): single tiles live in columnar tables and weights in safetensors files, so a
netlist of 1e12 parameters stays as small as its hierarchy. Where a module has cells, they are
what drives its undriven nets and output ports.

Text form, golden in tests::

    netlist top
    module layer
      in  x 8
      out y 16
      cells rom_bank 4 bits=65536
    module top
      in  a 8
      out b 16
      inst first: layer(x=a, y=b) layer="model.0"
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, cast

import networkx as nx

from pfmc.errors import InternalError, UsageError, did_you_mean

Parameter = str | int | float
DIRECTIONS: Final = ("in", "out")


@dataclass(frozen=True)
class Port:
    """A port: its direction (``in`` or ``out``) and its width in bits."""

    name: str
    direction: str
    width: int


@dataclass(frozen=True)
class Net:
    """A net inside a module and its width in bits."""

    name: str
    width: int


@dataclass(frozen=True)
class Instance:
    """One use of a definition: port name -> net name, and what is special to this use."""

    name: str
    definition: str
    connections: Mapping[str, str]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """A kind of part and how many of it a module holds; parameters are per part."""

    kind: str
    count: int
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


@dataclass(frozen=True)
class Module:
    """A definition."""

    name: str
    ports: tuple[Port, ...] = ()
    nets: tuple[Net, ...] = ()
    instances: tuple[Instance, ...] = ()
    cells: tuple[Cell, ...] = ()

    @cached_property
    def widths(self) -> dict[str, int]:
        """Width in bits of every net and port, by name."""
        return {p.name: p.width for p in self.ports} | {n.name: n.width for n in self.nets}

    def port(self, name: str) -> Port:
        """The port `name`; raises KeyError."""
        return {p.name: p for p in self.ports}[name]

    def body(self) -> dict[str, object]:
        """Everything but the name, as plain JSON values: equal bodies may share a definition."""
        return {
            "ports": [[p.name, p.direction, p.width] for p in self.ports],
            "nets": [[n.name, n.width] for n in self.nets],
            "instances": [
                [i.name, i.definition, dict(i.connections), dict(i.parameters)]
                for i in self.instances
            ],
            "cells": [[c.kind, c.count, dict(c.parameters)] for c in self.cells],
        }

    def digest(self) -> str:
        """sha256 of the body: the structure without the module's own name."""
        return hashlib.sha256(_canonical(self.body()).encode()).hexdigest()


def _canonical(body: object) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True)
class Netlist:
    """A hierarchy of definitions with one `top`."""

    top: str
    modules: Mapping[str, Module]

    def module(self, name: str) -> Module:
        """The definition `name`.

        Raises:
            UsageError: there is none; the message names the nearest.
        """
        if name not in self.modules:
            raise UsageError(
                f"the netlist has no definition {name!r}", mend=did_you_mean(name, self.modules)
            )
        return self.modules[name]

    def graph(self, module: str | None = None) -> nx.DiGraph[str]:
        """The connections inside one definition, for paths, balancing and inspection.

        Nodes: instance names (attributes ``kind="instance"``, ``definition``) and ``port:NAME``
        (``kind="port"``, ``direction``). An edge runs from the driver of a net to each reader and
        has ``nets`` (names, in order) and ``width`` (their sum in bits).

        Args:
            module: the definition; the top if None.
        """
        chosen = self.module(module or self.top)
        graph: nx.DiGraph[str] = nx.DiGraph()
        for port in chosen.ports:
            graph.add_node(f"port:{port.name}", kind="port", direction=port.direction)
        for instance in chosen.instances:
            graph.add_node(instance.name, kind="instance", definition=instance.definition)
        drivers, readers = _ends(self, chosen)
        for net, sources in drivers.items():
            for source in sources:
                for reader in readers.get(net, ()):
                    _join(graph, source, reader, net, chosen.widths[net])
        return graph

    def uses(self) -> dict[str, int]:
        """How many times each definition is used in the whole hierarchy; the top counts once.

        Raises:
            InternalError: the definitions use one another in a circle.
        """
        counts = {self.top: 1}
        for name in _order(self):
            for instance in self.module(name).instances:
                used = counts.get(name, 0)
                counts[instance.definition] = counts.get(instance.definition, 0) + used
        return counts

    def cells(self) -> dict[str, int]:
        """How many cells of each kind the whole hierarchy holds, sorted by kind."""
        totals: dict[str, int] = {}
        for name, times in self.uses().items():
            for cell in self.module(name).cells:
                totals[cell.kind] = totals.get(cell.kind, 0) + times * cell.count
        return dict(sorted(totals.items()))

    def problems(self) -> list[str]:
        """What is wrong: undefined definitions, circles, dangling, undriven or mismatched nets."""
        if self.top not in self.modules:
            return [f"the top {self.top!r} is not defined"]
        found = [p for name, m in self.modules.items() for p in _module_problems(self, name, m)]
        circle = _circle(self)
        return found + ([f"definitions in a circle: {' -> '.join(circle)}"] if circle else [])

    def check(self) -> None:
        """Refuses a netlist with problems.

        Raises:
            InternalError: names the first problems.
        """
        found = self.problems()
        if found:
            more = f" (and {len(found) - 5} more)" if len(found) > 5 else ""
            raise InternalError("the netlist is not sound: " + "; ".join(found[:5]) + more)

    def to_text(self) -> str:
        """The text form, definitions sorted by name, the top last."""
        names = sorted(n for n in self.modules if n != self.top)
        lines = [f"netlist {self.top}"]
        for name in [*names, *([self.top] if self.top in self.modules else [])]:
            lines.extend(_text(self.modules[name]))
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        """Canonical JSON of the netlist; `from_json` reads it back."""
        body = {"schema_version": 1, "top": self.top,
                "modules": {n: m.body() for n, m in self.modules.items()}}  # fmt: skip
        return _canonical(body)

    def digest(self) -> str:
        """sha256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def from_json(text: str) -> Netlist:
    """Reads what `Netlist.to_json` wrote.

    Raises:
        UsageError: not such a JSON, or of another schema version.
    """
    try:
        body = json.loads(text)
        if body["schema_version"] != 1:
            raise UsageError(f"netlist of schema version {body['schema_version']}, we read 1")
        modules = {name: _module(name, m) for name, m in body["modules"].items()}
        return Netlist(body["top"], modules)
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"not a netlist: {error}") from error


def _module(name: str, body: Mapping[str, object]) -> Module:
    def rows(key: str) -> list[list[object]]:
        return cast(list[list[object]], body[key])

    return Module(
        name,
        tuple(Port(str(n), str(d), cast(int, w)) for n, d, w in rows("ports")),
        tuple(Net(str(n), cast(int, w)) for n, w in rows("nets")),
        tuple(
            Instance(str(n), str(d), cast(dict[str, str], c), cast(dict[str, Parameter], p))
            for n, d, c, p in rows("instances")
        ),
        tuple(
            Cell(str(k), cast(int, n), cast(dict[str, Parameter], p)) for k, n, p in rows("cells")
        ),
    )


def _text(module: Module) -> Iterator[str]:
    yield f"module {module.name}"
    for port in module.ports:
        yield f"  {port.direction:<3} {port.name} {port.width}"
    for net in module.nets:
        yield f"  net {net.name} {net.width}"
    for cell in module.cells:
        yield f"  cells {cell.kind} {cell.count}{_parameters(cell.parameters)}"
    for i in module.instances:
        wires = ", ".join(f"{port}={net}" for port, net in i.connections.items())
        yield f"  inst {i.name}: {i.definition}({wires}){_parameters(i.parameters)}"


def _parameters(parameters: Mapping[str, Parameter]) -> str:
    return "".join(f" {k}={json.dumps(v)}" for k, v in sorted(parameters.items()))


Ends = dict[str, list[str]]


def _ends(netlist: Netlist, module: Module) -> tuple[Ends, Ends]:
    """Net name -> its drivers, and net name -> its readers; ports are ``port:NAME``."""
    drivers: Ends = {}
    readers: Ends = {}
    for port in module.ports:
        side = drivers if port.direction == "in" else readers
        side.setdefault(port.name, []).append(f"port:{port.name}")
    for instance in module.instances:
        definition = netlist.modules.get(instance.definition)
        directions = {p.name: p.direction for p in definition.ports} if definition else {}
        for port_name, net in instance.connections.items():
            side = drivers if directions.get(port_name) == "out" else readers
            side.setdefault(net, []).append(instance.name)
    return drivers, readers


def _join(graph: nx.DiGraph[str], source: str, reader: str, net: str, width: int) -> None:
    if not graph.has_edge(source, reader):
        graph.add_edge(source, reader, nets=(), width=0)
    edge = graph.edges[source, reader]
    if net not in edge["nets"]:
        edge["nets"] += (net,)
        edge["width"] += width


def _module_problems(netlist: Netlist, name: str, module: Module) -> Iterator[str]:
    if name != module.name:
        yield f"{name}: the definition calls itself {module.name!r}"
    for port in module.ports:
        if port.direction not in DIRECTIONS:
            yield f"{name}.{port.name}: direction {port.direction!r}"
    nets = [*(p.name for p in module.ports), *(n.name for n in module.nets)]
    yield from _doubles(name, "net", nets)
    yield from _doubles(name, "instance", [i.name for i in module.instances])
    for instance in module.instances:
        yield from _instance_problems(netlist, module, instance)
    yield from _net_problems(netlist, module)


def _doubles(module: str, what: str, names: list[str]) -> Iterator[str]:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            yield f"{module}: two {what}s are called {name!r}"
        seen.add(name)


def _instance_problems(netlist: Netlist, module: Module, instance: Instance) -> Iterator[str]:
    where = f"{module.name}.{instance.name}"
    definition = netlist.modules.get(instance.definition)
    if definition is None:
        near = did_you_mean(instance.definition, netlist.modules)
        yield f"{where}: undefined definition {instance.definition!r}, {near}"
        return
    ports = {p.name: p for p in definition.ports}
    for port, net in instance.connections.items():
        if port not in ports:
            yield f"{where}: {definition.name} has no port {port!r}, {did_you_mean(port, ports)}"
        elif net not in module.widths:
            yield f"{where}.{port}: unknown net {net!r}"
        elif module.widths[net] != ports[port].width:
            yield (
                f"{where}.{port}: width mismatch, port {ports[port].width}, "
                f"net {net} {module.widths[net]}"
            )
    for needed in ports.values():
        if needed.direction == "in" and needed.name not in instance.connections:
            yield f"{where}: input {needed.name!r} is not connected"


def _net_problems(netlist: Netlist, module: Module) -> Iterator[str]:
    drivers, readers = _ends(netlist, module)
    for net in module.widths:
        sources = drivers.get(net, [])
        if len(sources) > 1:
            yield f"{module.name}.{net}: driven by {' and '.join(sources)}"
        if module.cells:
            continue
        if not sources:
            yield f"{module.name}.{net}: undriven net"
        if not readers.get(net):
            yield f"{module.name}.{net}: dangling net, nothing reads it"


def _hierarchy(netlist: Netlist) -> nx.DiGraph[str]:
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(netlist.modules)
    for name, module in netlist.modules.items():
        for instance in module.instances:
            graph.add_edge(name, instance.definition)
    return graph


def _circle(netlist: Netlist) -> list[str]:
    try:
        edges = nx.find_cycle(_hierarchy(netlist))
    except nx.NetworkXNoCycle:
        return []
    return [str(edges[0][0]), *(str(edge[1]) for edge in edges)]


def _order(netlist: Netlist) -> list[str]:
    """Definitions from the top down, each before those it uses."""
    circle = _circle(netlist)
    if circle:
        raise InternalError(f"definitions in a circle: {' -> '.join(circle)}")
    order = list(nx.lexicographical_topological_sort(_hierarchy(netlist)))
    return [name for name in order if name in netlist.modules]
