"""Dynamic work of a decoder, against counts done by hand (width 8, 2 heads of 4, 1 KV head)."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from pfmc.distill.shapes import probe_shapes
from pfmc.errors import InputError, InternalError
from pfmc.hardware import FabricOp
from pfmc.ir import check
from pfmc.targets.fabric import operators
from pfmc.targets.fabric.keys import at
from pfmc.targets.fabric.work import fabric_ops, fixed_positions


def ops_of(decoder: ir.Model) -> list[FabricOp]:
    return fabric_ops(decoder, probe_shapes(decoder))


def one(ops: list[FabricOp], kind: str) -> FabricOp:
    return next(op for op in ops if op.kind == kind)


def test_every_node_is_counted_once(decoder: ir.Model) -> None:
    ops = ops_of(decoder)
    nodes = [n for n in decoder.graph if n.op_type != "FixedLinear"]
    assert [op.name for op in ops[:-1]] == [n.name for n in nodes]
    kinds = {k: sum(op.kind == k for op in ops) for k in {op.kind for op in ops}}
    assert kinds == {
        "embedding": 1, "norm": 5, "requantise": 9, "wiring": 16, "attention": 2,
        "elementwise": 6, "sampling": 1,
    }  # fmt: skip


def test_attention_by_hand(decoder: ir.Model) -> None:
    attention = one(ops_of(decoder), "attention")
    assert dict(attention.work) == {
        "macs8_per_context": 2 * 4, "macs16_per_context": 2 * 4, "exps_per_context": 2,
        "adds_per_context": 4, "roots": 2, "muls": 8, "heads": 2, "moved_values": 8,
        "kv_read_values_per_context": 8, "kv_write_values": 8, "kv_held_values_per_context": 8,
    }  # fmt: skip
    assert attention.scope == "model.layers.0.attn"
    assert attention.sources[0].startswith("n")


def test_vector_units_by_hand(decoder: ir.Model) -> None:
    ops = ops_of(decoder)
    assert dict(one(ops, "norm").work) == {
        "muls": 24,
        "adds": 8,
        "roots": 1,
        "moved_values": 8,
        "stored_values": 8,
    }
    assert dict(one(ops, "requantise").work) == {
        "muls": 8,
        "adds": 16,
        "roots": 1,
        "linears": 3,
        "moved_values": 8,
    }
    assert dict(one(ops, "embedding").work) == {
        "embedding_values": 8,
        "moved_values": 8,
        "stored_values": 80,
    }
    assert dict(one(ops, "sampling").work) == {"adds": 10}
    gate = next(op for op in ops if "SwiGLU" in op.name)
    assert dict(gate.work) == {"table_reads": 16, "muls": 16, "moved_values": 16}


def test_unknown_operator_is_refused(decoder: ir.Model) -> None:
    shapes = probe_shapes(decoder)
    node = next(n for n in decoder.graph if n.op_type == "Add")
    node.op_type = "FancyAdd"
    with pytest.raises(InputError, match="no unit for FancyAdd") as error:
        fabric_ops(decoder, shapes)
    assert node.name in str(error.value)


def test_value_without_shape_is_refused(decoder: ir.Model) -> None:
    shapes = probe_shapes(decoder)
    del shapes[next(n for n in decoder.graph if n.op_type == "Add").outputs[0].name]
    with pytest.raises(InternalError, match="no probed shape"):
        fabric_ops(decoder, shapes)


def test_only_a_model_of_fixed_size_has_fixed_positions(decoder: ir.Model) -> None:
    shapes = probe_shapes(decoder)
    assert fixed_positions(decoder, shapes) is None
    still = {name: (probe[1], probe[1]) for name, probe in shapes.items()}
    assert fixed_positions(decoder, still) == 5
    attention = one(fabric_ops(decoder, still), "attention")
    assert attention.work["macs8"] == 8 * 14  # all 14 positions it always attends to
    assert attention.work["kv_held_values"] == 8 * 14
    assert not any(key.endswith("_per_context") for key in attention.work)


def test_a_local_attention_sees_its_window_only(decoder: ir.Model) -> None:
    """Beyond the window the context costs no more, neither products nor memory."""
    for node in decoder.graph:
        if node.op_type == "Attention":
            node.metadata_props["pfmc.window"] = "16"
    near = one(ops_of(decoder), "attention")
    assert near.work["window"] == 16.0
    for key in ("macs8", "kv_read_values", "kv_held_values"):
        assert at(near, key, 8) * 2 == at(near, key, 16) == at(near, key, 4096) > 0


def test_a_softcap_is_a_table_look_up_a_score(decoder: ir.Model) -> None:
    for node in decoder.graph:
        if node.op_type == "Attention":
            node.attributes.add(ir.AttrFloat32("softcap", 30.0))
    work = one(ops_of(decoder), "attention").work
    assert work["table_reads_per_context"] == work["exps_per_context"]


def _work(body: str, **arrays: np.ndarray) -> dict[str, float]:
    """The work of the one node of a graph over ``x[1, S, 8]``, a position."""
    graph = onnx.parser.parse_graph(f"g (float[1,S,8] x) => (float[1,S,W] y) {{ {body} }}")
    graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in arrays.items())
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)])
    model = ir.from_proto(proto)
    for i, node in enumerate(model.graph):
        node.name = f"n{i}"
    (op,) = fabric_ops(model, probe_shapes(model))
    return dict(op.work)


AXIS = {"last": np.array([-1], np.int64)}


@pytest.mark.parametrize(
    ("body", "arrays", "wanted"),
    [
        ("y = Tan(x)", {}, {"table_reads": 8, "moved_values": 8}),
        ("y = Mean(x, x, x)", {}, {"adds": 16, "muls": 8, "moved_values": 8}),
        ("y = Sum(x, x, x)", {}, {"adds": 16, "moved_values": 8}),
        ("y = Max(x, x)", {}, {"adds": 8, "moved_values": 8}),
        ("y = ReduceL1(x, last)", AXIS, {"adds": 16, "moved_values": 1}),
        ("y = ReduceL2(x, last)", AXIS, {"adds": 8, "muls": 8, "roots": 1, "moved_values": 1}),
        ("y = ReduceProd(x, last)", AXIS, {"muls": 8, "moved_values": 1}),
        (
            "y = ReduceLogSumExp(x, last)", AXIS,
            {"exps": 8, "adds": 17, "table_reads": 1, "moved_values": 1},
        ),
    ],
)  # fmt: skip
def test_operators_by_hand(
    body: str, arrays: dict[str, np.ndarray], wanted: dict[str, float]
) -> None:
    assert _work(body, **arrays) == wanted


def test_every_legal_operator_has_a_price() -> None:
    """What the canonical form allows on real numbers, the fabric can build."""
    flags = {
        "And", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual",
        "NonZero", "Not", "Or", "Xor",
    }  # fmt: skip
    special = {"Attention", "MatMul", "Gather", "GatherElements", "GatherND"}
    priced = {*operators.PER_OUTPUT, *operators.PER_INPUT, *operators.WIRING} | special
    assert check.STANDARD - flags <= priced
    assert flags <= operators.CONTROL


def _attention(inputs: str, call: str, output: str) -> dict[str, float]:
    graph = onnx.parser.parse_graph(f"g ({inputs}) => ({output}) {{ {call} }}")
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)])
    model = ir.from_proto(proto)
    for i, node in enumerate(model.graph):
        node.name = f"n{i}"
    return dict(one(fabric_ops(model, probe_shapes(model)), "attention").work)


def test_a_memory_that_is_only_read_is_not_written() -> None:
    """A decoder's later step: the keys of the encoder's positions stand in a graph input."""
    held = "float[1,2,T,4] past_key, float[1,2,T,4] past_value"
    call = "y = Attention(q, past_key, past_value)"
    work = _attention(f"float[1,2,1,4] q, {held}", call, "float[1,2,1,4] y")
    assert "kv_write_values" not in work
    assert work["heads"] == 2
