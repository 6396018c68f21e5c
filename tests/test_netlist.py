"""The netlist: golden text, round trip, checks, graph, counting through the hierarchy."""

from __future__ import annotations

from dataclasses import replace

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfmc.errors import InternalError, UsageError
from pfmc.netlist import Cell, Instance, Module, Net, Netlist, Port, from_json

LEAF = Module(
    "linear",
    (Port("x", "in", 8), Port("y", "out", 16)),
    cells=(Cell("rom_bank", 4, {"bits": 65536}), Cell("mac_lane", 64)),
)
ADD = Module(
    "add", (Port("a", "in", 16), Port("b", "in", 16), Port("y", "out", 16)), cells=(Cell("add", 1),)
)
TOP = Module(
    "top",
    (Port("i", "in", 8), Port("o", "out", 16)),
    (Net("left", 16), Net("right", 16)),
    (
        Instance("q", "linear", {"x": "i", "y": "left"}, {"layer": "m.q"}),
        Instance("k", "linear", {"x": "i", "y": "right"}, {"layer": "m.k"}),
        Instance("sum", "add", {"a": "left", "b": "right", "y": "o"}),
    ),
)
NETLIST = Netlist("top", {m.name: m for m in (LEAF, ADD, TOP)})

GOLDEN = """\
netlist top
module add
  in  a 16
  in  b 16
  out y 16
  cells add 1
module linear
  in  x 8
  out y 16
  cells rom_bank 4 bits=65536
  cells mac_lane 64
module top
  in  i 8
  out o 16
  net left 16
  net right 16
  inst q: linear(x=i, y=left) layer="m.q"
  inst k: linear(x=i, y=right) layer="m.k"
  inst sum: add(a=left, b=right, y=o)
"""


def test_text_is_golden() -> None:
    assert NETLIST.to_text() == GOLDEN


def test_sound_netlist_has_no_problems() -> None:
    assert NETLIST.problems() == []
    NETLIST.check()


def test_json_round_trip_and_digest() -> None:
    again = from_json(NETLIST.to_json())
    assert again == NETLIST
    assert again.digest() == NETLIST.digest()
    other = Netlist("top", {**NETLIST.modules, "linear": replace(LEAF, cells=LEAF.cells[:1])})
    assert other.digest() != NETLIST.digest()
    with pytest.raises(UsageError, match="not a netlist"):
        from_json("{}")
    with pytest.raises(UsageError, match="schema version 2"):
        from_json('{"schema_version": 2}')


def test_module_digest_ignores_its_name() -> None:
    assert replace(LEAF, name="other").digest() == LEAF.digest()
    assert LEAF.digest() != ADD.digest()


def test_graph_has_paths_and_widths() -> None:
    graph = NETLIST.graph()
    assert nx.has_path(graph, "port:i", "port:o")
    assert graph.edges["q", "sum"] == {"nets": ("left",), "width": 16}
    assert nx.dag_longest_path_length(graph, weight=None) == 3
    assert graph.nodes["q"] == {"kind": "instance", "definition": "linear"}
    with pytest.raises(UsageError, match="did you mean 'linear'"):
        NETLIST.graph("liner")


def test_cells_are_counted_through_the_hierarchy() -> None:
    outer = Module("outer", (), (), (Instance("a", "mid", {}), Instance("b", "mid", {})))
    middle = Module("mid", (), (), tuple(Instance(f"l{i}", "cellbox", {}) for i in range(3)))
    box = Module("cellbox", cells=(Cell("rom_bank", 5),))
    netlist = Netlist("outer", {m.name: m for m in (outer, middle, box)})
    assert netlist.cells() == {"rom_bank": 30}
    assert netlist.uses() == {"outer": 1, "mid": 2, "cellbox": 6}


def with_top(**changes: object) -> Netlist:
    return Netlist("top", {**NETLIST.modules, "top": replace(TOP, **changes)})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("netlist", "problem"),
    [
        (Netlist("tip", {}), "the top 'tip' is not defined"),
        (
            with_top(instances=(Instance("q", "lineal", {}), *TOP.instances[1:])),
            "undefined definition 'lineal', did you mean 'linear'",
        ),
        (with_top(instances=TOP.instances[:2]), "o: undriven net"),
        (with_top(nets=(*TOP.nets, Net("loose", 4))), "loose: dangling net"),
        (with_top(nets=(Net("left", 15), TOP.nets[1])), "width mismatch, port 16, net left 15"),
        (
            with_top(instances=(*TOP.instances, Instance("z", "linear", {"y": "left"}))),
            "left: driven by q and z",
        ),
        (
            with_top(instances=(*TOP.instances, Instance("z", "linear", {"y": "left"}))),
            "input 'x' is not connected",
        ),
        (
            with_top(instances=(replace(TOP.instances[0], connections={"w": "i"}),)),
            "linear has no port 'w'",
        ),
        (
            with_top(instances=(replace(TOP.instances[0], connections={"x": "j"}),)),
            "unknown net 'j'",
        ),
        (with_top(nets=(*TOP.nets, Net("left", 16))), "two nets are called 'left'"),
        (with_top(instances=TOP.instances * 2), "two instances are called 'q'"),
        (with_top(ports=(Port("i", "inout", 8), TOP.ports[1])), "direction 'inout'"),
        (Netlist("top", {**NETLIST.modules, "x": LEAF}), "calls itself 'linear'"),
    ],
)
def test_problems_are_named(netlist: Netlist, problem: str) -> None:
    found = netlist.problems()
    assert any(problem in p for p in found), found
    with pytest.raises(InternalError, match="not sound"):
        netlist.check()


def test_circle_of_definitions() -> None:
    a = Module("a", instances=(Instance("i", "b", {}),))
    b = Module("b", instances=(Instance("i", "a", {}),))
    netlist = Netlist("a", {"a": a, "b": b})
    assert any("in a circle: a -> b -> a" in p for p in netlist.problems())
    with pytest.raises(InternalError, match="circle"):
        netlist.cells()


@given(st.integers(1, 40), st.integers(1, 64))
def test_chain_of_any_length_is_sound(length: int, width: int) -> None:
    link = Module("link", (Port("x", "in", width), Port("y", "out", width)), cells=(Cell("c", 2),))
    names = ["i", *(f"n{k}" for k in range(length - 1)), "o"]
    top = Module(
        "top",
        (Port("i", "in", width), Port("o", "out", width)),
        tuple(Net(n, width) for n in names[1:-1]),
        tuple(Instance(f"l{k}", "link", {"x": names[k], "y": names[k + 1]}) for k in range(length)),
    )
    netlist = Netlist("top", {"top": top, "link": link})
    netlist.check()
    assert netlist.cells() == {"c": 2 * length}
    assert nx.shortest_path_length(netlist.graph(), "port:i", "port:o") == length + 1
    assert from_json(netlist.to_json()) == netlist
