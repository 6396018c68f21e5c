"""The netlist of a model: equal blocks share one definition, everything is connected."""

from __future__ import annotations

import networkx as nx
import numpy as np
import onnx_ir as ir
import pytest

from pfmc.distill.shapes import probe_shapes
from pfmc.errors import InternalError
from pfmc.ir import vocabulary
from pfmc.netlist import Cell, Module, Netlist, Port, from_json
from pfmc.targets.fabric.assemble import assemble, block_of, blocks
from pfmc.targets.fabric.work import fabric_ops


def definitions(model: ir.Model) -> dict[str, Module]:
    found = {}
    for node in vocabulary.fixed_linears(model):
        rows, cols = (int(d) for d in node.inputs[1].const_value.shape.numpy())
        ports = (Port("x", "in", 8), Port("y", "out", 24))
        cells = (Cell("weights", rows * cols),)
        found[node.name] = Module(f"linear_{rows}x{cols}", ports, cells=cells)
    return found


def netlist_of(model: ir.Model) -> Netlist:
    return assemble(model, definitions(model), fabric_ops(model, probe_shapes(model)))


def test_equal_layers_are_one_definition(decoder: ir.Model) -> None:
    netlist = netlist_of(decoder)
    assert netlist.problems() == []
    blocks = [i for i in netlist.module("tiny").instances if i.definition.startswith("block_")]
    assert [i.name for i in blocks] == ["model_layers_0", "model_layers_1"]
    assert {i.definition for i in blocks} == {"block_model_layers"}
    assert blocks[1].parameters["attn_q"] == "model.layers.1.attn.q"
    assert blocks[1].parameters["scope"] == "model.layers.1"
    weights = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16) + 8 * 10
    assert netlist.cells()["weights"] == weights


def test_linears_of_one_shape_are_one_definition(decoder: ir.Model) -> None:
    names = [n for n in netlist_of(decoder).modules if n.startswith("linear")]
    assert sorted(names) == [
        "linear_16x8", "linear_8x10", "linear_8x16", "linear_8x4", "linear_8x8"
    ]  # fmt: skip


def test_tokens_reach_logits(decoder: ir.Model) -> None:
    netlist = netlist_of(decoder)
    top = netlist.graph()
    logits = vocabulary.fixed_linears(decoder)[-1].outputs[0].name
    assert nx.has_path(top, "port:input_ids", f"port:{logits}")
    block = netlist.graph("block_model_layers")
    assert nx.is_directed_acyclic_graph(block)
    assert nx.has_path(block, "attn_q", "attn_attention")
    assert from_json(netlist.to_json()) == netlist


def test_a_differing_layer_gets_its_own_definition(decoder: ir.Model) -> None:
    shapes = probe_shapes(decoder)
    fabric = fabric_ops(decoder, shapes)
    made = definitions(decoder)
    name = "model.layers.1.attn.q"
    made[name] = Module("linear_8x8", made[name].ports, cells=(Cell("weights", 65),))
    netlist = assemble(decoder, made, fabric)
    assert "block_model_layers_2" in netlist.modules
    assert "linear_8x8_2" in netlist.modules


def test_text_is_the_same_twice(decoder: ir.Model) -> None:
    text = netlist_of(decoder).to_text()
    assert text == netlist_of(decoder).to_text()
    lines = text.splitlines()
    assert "inst model_layers_1: block_model_layers(" in text
    assert "  cells weights 64" in lines
    assert "module unit_rmsnormalization" in lines or "module unit_rms_normalization" in lines


def test_missing_definition_and_wrong_width_are_refused(decoder: ir.Model) -> None:
    fabric = fabric_ops(decoder, probe_shapes(decoder))
    made = definitions(decoder)
    with pytest.raises(InternalError, match="has no definition"):
        assemble(decoder, {}, fabric)
    with pytest.raises(InternalError, match="no fabric operation"):
        assemble(decoder, made, fabric[1:])
    wide = Module("w", (Port("x", "in", 9), Port("y", "out", 24)), cells=(Cell("weights", 1),))
    with pytest.raises(InternalError, match="width mismatch"):
        assemble(decoder, {**made, "model.layers.0.attn.q": wide}, fabric)


def test_block_of_a_scope(decoder: ir.Model) -> None:
    assert {block_of(n) for n in decoder.graph} == {"", "model.layers.0", "model.layers.1"}


def _value(name: str, shape: list[int | str]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


def test_what_blocks_share_belongs_to_none() -> None:
    x = _value("x", ["batch", "seq", 4])
    nodes, last = [], x
    mask = ir.node("Neg", [x], name="mask", outputs=[ir.Value(name="mask")])
    mask.metadata_props[vocabulary.KEY_SCOPE] = "m.0"
    constants = []
    for i in range(3):
        weight = ir.Value(name=f"w{i}", const_value=ir.tensor(np.ones((4, 4), np.float32)))
        bias = ir.Value(name=f"b{i}", const_value=ir.tensor(np.zeros(4, np.float32)))
        constants += [weight, bias]
        outputs = [ir.Value(name=f"y{i}")]
        linear = ir.node("FixedLinear", [last, weight, bias], domain="pfmc", name=f"m.{i}.q",
                         outputs=outputs)  # fmt: skip
        add = ir.node("Add", [outputs[0], mask.outputs[0]], name=f"add{i}",
                      outputs=[ir.Value(name=f"h{i}")])  # fmt: skip
        add.metadata_props[vocabulary.KEY_SCOPE] = f"m.{i}"
        nodes += [linear, add]
        last = add.outputs[0]
    graph = ir.Graph([x], [last], nodes=[mask, *nodes], initializers=constants,
                     opset_imports={"": 24}, name="g")  # fmt: skip
    model = ir.Model(graph, ir_version=11)
    assert list(blocks(model).values()) == ["", "m.0", "m.0", "m.1", "m.1", "m.2", "m.2"]
    made = {
        f"m.{i}.q": Module("q", (Port("x", "in", 16), Port("y", "out", 16)), cells=(Cell("c", 1),))
        for i in range(3)
    }
    netlist = assemble(model, made, fabric_ops(model, probe_shapes(model)))
    assert netlist.to_text() == GOLDEN


GOLDEN = """\
netlist g
module block_m
  in  q_x 16
  in  add_x1 16
  out add_y 16
  net q_y 16
  inst q: q(x=q_x, y=q_y)
  inst add: unit_add(x0=q_y, x1=add_x1, y=add_y)
module q
  in  x 16
  out y 16
  cells c 1
module unit_add
  in  x0 16
  in  x1 16
  out y 16
  cells elementwise 1 adds=4.0 moved_values=4.0 operator="Add"
module unit_neg
  in  x 16
  out y 16
  cells elementwise 1 adds=4.0 moved_values=4.0 operator="Neg"
module g
  in  x 16
  out h2 16
  net mask_y 16
  net m_0_add_y 16
  net m_1_add_y 16
  inst mask: unit_neg(x=x, y=mask_y) node="mask"
  inst m_0: block_m(q_x=x, add_x1=mask_y, add_y=m_0_add_y) q="m.0.q" scope="m.0"
  inst m_1: block_m(q_x=m_0_add_y, add_x1=mask_y, add_y=m_1_add_y) q="m.1.q" scope="m.1"
  inst m_2: block_m(q_x=m_1_add_y, add_x1=mask_y, add_y=h2) q="m.2.q" scope="m.2"
"""
