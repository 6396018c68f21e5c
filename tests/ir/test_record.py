"""A record of a graph gives the same graph back after passes changed the original."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from pfmc.ingest.load import load
from pfmc.ir import text
from pfmc.ir.record import Record
from pfmc.passes import pipeline, recipe


def _bytes(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


def test_it_is_what_a_copy_would_be(tiny: Path) -> None:
    model = load(tiny).model
    record, copy, before = Record(model), model.clone(), text.model_text(model)
    pipeline.canonicalise(model, recipe.load("stream", ()).passes)
    assert text.model_text(model) != before
    for _ in range(2):
        again = record.model()
        assert text.model_text(again) == before
        assert _bytes(again) == _bytes(copy)
    pipeline.canonicalise(again, recipe.load("stream", ()).passes)
    assert text.model_text(record.model()) == before


def test_subgraphs_are_copied() -> None:
    x = ir.Value(name="x")
    bodies = {}
    for name in ("then_branch", "else_branch"):
        relu = ir.node("Relu", [x])
        relu.outputs[0].name = "q"
        bodies[name] = ir.Graph([], relu.outputs, nodes=[relu], name="b")
    choice = ir.node("If", [ir.Value(name="c")], bodies)
    choice.outputs[0].name = "y"
    graph = ir.Graph(
        [x, *(v for v in choice.inputs if v is not None)], choice.outputs, nodes=[choice],
        opset_imports={"": 24}, name="g",
    )  # fmt: skip
    model = ir.Model(graph, ir_version=11)
    record, before = Record(model), _bytes(model)
    choice.attributes["else_branch"].as_graph().outputs.clear()
    assert _bytes(record.model()) == before


@pytest.mark.parametrize("count", [1, 3])
def test_it_keeps_values_that_nothing_defines(count: int) -> None:
    """A broken graph is recorded as it is: the reproducer must show it."""
    lost = ir.Value(name="lost")
    nodes = [ir.node("Relu", [lost]) for _ in range(count)]
    for i, node in enumerate(nodes):
        node.outputs[0].name = f"y{i}"
    graph = ir.Graph([], [n.outputs[0] for n in nodes], nodes=nodes, opset_imports={"": 24})
    again = Record(ir.Model(graph, ir_version=11)).model().graph
    assert len({id(n.inputs[0]) for n in again}) == 1
    assert [str(n.inputs[0].name) for n in again if n.inputs[0] is not None] == ["lost"] * count
