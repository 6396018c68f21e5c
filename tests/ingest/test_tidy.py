"""The small rewrites of ingest on hand-made graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfmc.errors import InputError
from pfmc.ingest import load, tidy
from pfmc.ingest.order import in_order
from pfmc.ingest.rewrite import Builder
from pfmc.ir import provenance

onnx = pytest.importorskip("onnx")
make = onnx.helper


def chain(*ops: str) -> ir.Graph:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2]))
    nodes: list[ir.Node] = []
    for index, op in enumerate(ops):
        source = nodes[-1].outputs[0] if nodes else x
        nodes.append(ir.node(op, [source], name=f"n{index}"))
        nodes[-1].outputs[0].name = f"v{index}"
    outputs = [nodes[-1].outputs[0]]
    return ir.Graph([x], outputs, nodes=nodes, opset_imports={"": 24})


@pytest.mark.parametrize(
    ("ops", "left"),
    [
        (("Identity", "Relu"), ["Relu"]),
        (("Relu", "Identity"), ["Relu"]),
        (("Relu", "Identity", "Identity", "Identity"), ["Relu"]),
        (("Identity",), ["Identity"]),
        (("Identity", "Identity"), ["Identity"]),
    ],
)
def test_identities_go_and_output_names_stay(ops: tuple[str, ...], left: list[str]) -> None:
    graph = chain(*ops)
    name = graph.outputs[0].name
    tidy.drop_identities(graph)
    assert [n.op_type for n in graph] == left
    assert graph.outputs[0].name == name
    assert graph.outputs[0] is graph[-1].outputs[0]


def test_dims() -> None:
    graph = chain("Relu")
    graph.inputs[0].shape = ir.Shape(["32", "batch", "unk__4", -1, 7, None, "past + 1"])
    tidy.numeric_dims(graph)
    shape = graph.inputs[0].shape
    assert shape is not None
    plain = [d if isinstance(d, int) else d.value for d in shape.dims]
    assert plain == [32, "batch", None, None, 7, None, "past + 1"]


def test_names_become_unique_and_present() -> None:
    graph = chain("Relu", "Relu", "Relu")
    for node in graph:
        node.name = "same"
    graph[0].outputs[0].name = None
    graph[1].outputs[0].name = "value_0"
    tidy.name_everything(graph)
    assert len({n.name for n in graph}) == 3
    assert graph[0].outputs[0].name == "value_1"


def test_builder_shares_constants_and_keeps_provenance() -> None:
    graph = chain("Relu", "Relu")
    graph[1].metadata_props.update({provenance.KEY_SOURCE: "n7", provenance.KEY_SCOPE: "a.b"})
    build = Builder(graph)
    build.at(graph[1])
    two = build.constant(np.array(2, np.int64))
    assert build.constant(np.array(2, np.int64)) is two
    assert build.constant(np.array(2, np.int32)) is not two
    assert build.constant(np.array([2], np.int64)) is not two
    made = build.op("Neg", [graph[0].outputs[0]])
    build.replace(graph[2], [made])
    assert [n.op_type for n in graph] == ["Relu", "Neg"]
    assert graph.outputs[0] is made
    assert made.name == "v1"
    assert provenance.sources(graph[1]) == ("n7",)
    assert provenance.scope(graph[1]) == "a.b"


@given(st.permutations(range(8)))
def test_in_order_sorts_any_order(order: list[int]) -> None:
    nodes = [make.make_node("Add", [f"v{i}", "x"], [f"v{i + 1}"]) for i in range(8)]
    found = in_order([nodes[i] for i in order])
    assert [n.output[0] for n in found] == [f"v{i + 1}" for i in range(8)]


def test_notes_of_the_file_that_are_wrong_are_corrected(
    linear: Any, save: Callable[[Any], Path]
) -> None:
    """Exporters write wrong value_info (onnxruntime-genai does); the operators decide."""
    notes = linear.graph.value_info
    notes.append(make.make_tensor_value_info("product", 1, [7, 9, "batch"]))
    notes.append(make.make_tensor_value_info("sum", 1, ["rows", 99]))
    del linear.graph.output[0].type.tensor_type.shape.dim[:]
    graph = load(save(linear)).model.graph
    shapes = {v.name: [str(d) for d in v.shape or ()] for n in graph for v in n.outputs}
    assert shapes == {"product": ["batch", "3"], "sum": ["rows", "3"], "y": ["batch", "3"]}


def test_standard_domain_has_one_spelling(linear: Any, save: Callable[[Any], Path]) -> None:
    linear.graph.node[0].domain = linear.opset_import[0].domain = "ai.onnx"
    graph = load(save(linear)).model.graph
    assert {n.domain for n in graph} == {""}
    assert dict(graph.opset_imports) == {"": 24}


def test_strings_in_constants_are_refused(linear: Any, save: Callable[[Any], Path]) -> None:
    linear.graph.node.append(make.make_node("Constant", [], ["s"], value_string="rm -rf"))
    with pytest.raises(InputError, match="value_string"):
        load(save(linear))


def test_empty_weights_embedded_and_external(linear: Any, save: Callable[[Any], Path]) -> None:
    nothing = onnx.TensorProto(name="none", data_type=1, dims=[0, 3], raw_data=b"")
    outside = onnx.TensorProto(name="out", data_type=1, dims=[0, 3])
    outside.data_location = onnx.TensorProto.EXTERNAL
    outside.external_data.add(key="location", value="empty.data")
    linear.graph.initializer.extend([nothing, outside])
    linear.graph.node.append(make.make_node("Add", ["none", "out"], ["z"]))
    linear.graph.output.append(make.make_tensor_value_info("z", 1, [0, 3]))
    path = save(linear)
    (path.parent / "empty.data").write_bytes(b"")
    graph = load(path).model.graph
    for name in ("none", "out"):
        tensor = graph.initializers[name].const_value
        assert tensor is not None
        assert tensor.numpy().shape == (0, 3)


@pytest.mark.parametrize(("op", "rank"), [("GroupNormalization", 2), ("Conv", 2), ("Trilu", 1)])
def test_an_input_without_the_axes_that_its_operator_names(op: str, rank: int) -> None:
    """Found by the fuzzer: a pass read the channels of a vector."""
    x = ir.Value(name="x", shape=ir.Shape([2] * rank), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node(op, [x, x, x], name="n")
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 24}, name="g")
    with pytest.raises(InputError, match=f"{rank} axes") as error:
        tidy.check_ranks(graph)
    assert error.value.where == "node 'n'"


def test_a_convolution_whose_weight_has_another_rank() -> None:
    """Found by the fuzzer: a pass read a kernel of three axes for an image of two."""
    kind = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=ir.Shape(["batch", 3, 8, 8]), type=kind)
    w = ir.Value(name="w", shape=ir.Shape([1, 32, 3, 8, 8]), type=kind)
    node = ir.node("Conv", [x, w], name="n")
    graph = ir.Graph([x, w], node.outputs, nodes=[node], opset_imports={"": 24}, name="g")
    with pytest.raises(InputError, match=r"Conv of operands of \[4, 5\] axes"):
        tidy.check_ranks(graph)
