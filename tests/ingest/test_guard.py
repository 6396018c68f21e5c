"""Hostile and broken graphs: each is refused with one clear message, fast and in little memory."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pfmc.errors import InputError

onnx = pytest.importorskip("onnx")
make = onnx.helper
F32 = onnx.TensorProto.FLOAT


def node(op: str, inputs: list[str], outputs: list[str], **more: Any) -> Any:
    return make.make_node(op, inputs, outputs, **more)


def opset(model: Any, version: int) -> None:
    del model.opset_import[:]
    model.opset_import.append(make.make_opsetid("", version))


def add_function(model: Any, name: str, body: list[Any]) -> None:
    model.functions.append(
        make.make_function("local", name, ["a"], ["b"], body, [make.make_opsetid("", 20)])
    )


def no_outputs(m: Any) -> None:
    del m.graph.output[:]


def ir_99(m: Any) -> None:
    m.ir_version = 99


def opset_999(m: Any) -> None:
    opset(m, 999)


def opset_3(m: Any) -> None:
    opset(m, 3)


def no_opset(m: Any) -> None:
    del m.opset_import[:]


def training(m: Any) -> None:
    m.training_info.add()


def unknown_operators(m: Any) -> None:
    m.graph.node.append(node("Frobnicate", ["x"], ["f1"], name="a"))
    m.graph.node.append(node("Frobnicate", ["x"], ["f2"], name="b"))
    m.graph.node.append(node("Magic", ["x"], ["f3"], name="c", domain="my.domain"))


def control_flow(m: Any) -> None:
    branch = make.make_graph([node("Identity", ["x"], ["q"])], "then", [], [m.graph.output[0]])
    m.graph.node.append(
        node("If", ["x"], ["z"], name="choice", then_branch=branch, else_branch=branch)
    )


def random_operator(m: Any) -> None:
    m.graph.node.append(node("RandomNormalLike", ["x"], ["r"], name="dice"))


def recursion(m: Any) -> None:
    add_function(m, "f", [node("g", ["a"], ["b"], domain="local")])
    add_function(m, "g", [node("f", ["a"], ["b"], domain="local")])
    m.graph.node.append(node("f", ["x"], ["r"], domain="local"))


def function_bomb(m: Any) -> None:
    for i in range(30):
        callee = [
            node(f"f{i + 1}", ["a"], ["c"], domain="local"),
            node(f"f{i + 1}", ["c"], ["b"], domain="local"),
        ]
        add_function(m, f"f{i}", callee)
    add_function(m, "f30", [node("Relu", ["a"], ["b"])])
    m.graph.node.append(node("f0", ["x"], ["r"], domain="local"))


def cycle(m: Any) -> None:
    m.graph.node.append(node("Add", ["x", "p2"], ["p1"], name="first"))
    m.graph.node.append(node("Relu", ["p1"], ["p2"], name="second"))


def undefined_input(m: Any) -> None:
    m.graph.node[0].input[1] = "fc.weigth"


def undefined_output(m: Any) -> None:
    m.graph.output[0].name = "nothing"


def defined_twice(m: Any) -> None:
    m.graph.node.append(node("Relu", ["x"], ["product"], name="again"))


def shadows_weight(m: Any) -> None:
    m.graph.node.append(node("Relu", ["x"], ["fc.weight"], name="again"))


def two_initialisers(m: Any) -> None:
    m.graph.initializer.append(m.graph.initializer[0])


def two_inputs(m: Any) -> None:
    m.graph.input.append(m.graph.input[0])


def nameless_input(m: Any) -> None:
    m.graph.input[0].name = ""


def negative_dim(m: Any) -> None:
    m.graph.initializer[0].dims[0] = -4


def negative_input_dim(m: Any) -> None:
    m.graph.input[0].type.tensor_type.shape.dim[1].dim_value = -1


def overflowing_dims(m: Any) -> None:
    m.graph.initializer[0].dims[:] = [1 << 40, 1 << 40]


def many_dims(m: Any) -> None:
    m.graph.initializer[0].dims[:] = [1] * 40 + [12]


def short_data(m: Any) -> None:
    m.graph.initializer[0].raw_data = b"\0" * 44


def two_fields(m: Any) -> None:
    m.graph.initializer[0].float_data.extend([0.0] * 12)


def wrong_field(m: Any) -> None:
    m.graph.initializer[1].ClearField("raw_data")
    m.graph.initializer[1].int64_data.extend([1, 2, 3])


def string_weight(m: Any) -> None:
    m.graph.initializer[0].data_type = onnx.TensorProto.STRING


def unknown_dtype(m: Any) -> None:
    m.graph.initializer[0].data_type = 99


def not_a_number(m: Any) -> None:
    data = bytearray(m.graph.initializer[0].raw_data)
    data[20:24] = b"\x00\x00\xc0\x7f"
    m.graph.initializer[0].raw_data = bytes(data)


def infinite_bias(m: Any) -> None:
    m.graph.initializer[1].raw_data = m.graph.initializer[1].raw_data[:8] + b"\x00\x00\x80\x7f"


def shapes_differ(m: Any) -> None:
    m.graph.initializer[0].dims[:] = [6, 2]


def wrong_attribute(m: Any) -> None:
    m.graph.node[2].attribute.append(make.make_attribute("alpha", 3))


def wrong_arity(m: Any) -> None:
    m.graph.node[2].input.extend(["x", "x"])


def double_attribute(m: Any) -> None:
    m.graph.node[2].CopyFrom(node("Softmax", ["sum"], ["y"], name="s", axis=-1))
    m.graph.node[2].attribute.append(make.make_attribute("axis", 0))


def reference_attribute(m: Any) -> None:
    m.graph.node[2].CopyFrom(node("Softmax", ["sum"], ["y"], name="s", axis=-1))
    m.graph.node[2].attribute[0].ref_attr_name = "outer"


def sparse_weight(m: Any) -> None:
    m.graph.sparse_initializer.add()


def sequence_input(m: Any) -> None:
    kind = make.make_sequence_type_proto(make.make_tensor_type_proto(F32, [2]))
    m.graph.input.append(make.make_value_info("list", kind))


def newer_feature(m: Any) -> None:
    opset(m, 26)
    m.graph.node.append(node("CumProd", ["x", "axis"], ["c"], name="cp"))
    m.graph.initializer.append(make.make_tensor("axis", onnx.TensorProto.INT64, [], [0]))


def hostile_constant(m: Any) -> None:
    tensor = make.make_tensor("t", F32, [2], [1.0, 2.0])
    tensor.dims[:] = [1 << 45]
    m.graph.node.append(node("Constant", [], ["huge"], name="c", value=tensor))


CASES: list[tuple[Callable[[Any], None], str]] = [
    (no_outputs, "has no outputs"),
    (ir_99, r"version \(IR\) is 99; 3 to 14"),
    (opset_999, "Opset 999 is not supported; 7 to 28"),
    (opset_3, "Opset 3 is not supported"),
    (no_opset, "imported exactly once"),
    (training, "training graphs"),
    (unknown_operators, r"Frobnicate \(not in opset 20\) x 2: node 'a'.*\n.*my.domain::Magic"),
    (control_flow, r"If \(control flow\) x 1: node 'choice'"),
    (random_operator, "draws random numbers.*node 'dice'"),
    (recursion, "local::f -> local::g -> local::f"),
    (function_bomb, "would have 1073741827 nodes"),
    (cycle, "circle: (first -> second -> first|second -> first -> second)"),
    (undefined_input, r"'fc.weigth' is used but defined nowhere[\s\S]*did you mean 'fc.weight'"),
    (undefined_output, "output 'nothing' is computed by no node"),
    (defined_twice, "'product' is defined twice[\\s\\S]*node 'again'"),
    (shadows_weight, "'fc.weight' is defined twice"),
    (two_initialisers, "Two initialisers have the same name"),
    (two_inputs, "Two graph inputs have the same name"),
    (nameless_input, "graph input has no name"),
    (negative_dim, "negative dimension -4[\\s\\S]*'fc.weight'"),
    (negative_input_dim, "negative dimension -1[\\s\\S]*'x'"),
    (overflowing_dims, "too many[\\s\\S]*'fc.weight'"),
    (many_dims, "41 dimensions; at most 16"),
    (short_data, r"shape \[4, 3\] needs 48 bytes of data but has 44"),
    (two_fields, "more than once: float_data, raw_data"),
    (wrong_field, "FLOAT tensor cannot be held in int64_data"),
    (string_weight, "Element type STRING is not supported"),
    (unknown_dtype, "Element type number 99"),
    (not_a_number, r"A weight holds nan[\s\S]*'fc.weight', index \[1, 2\]"),
    (infinite_bias, r"A weight holds inf[\s\S]*'fc.bias', index \[2\]"),
    (shapes_differ, r"Shapes or types do not fit.*MatMul.*/fc/MatMul"),
    (wrong_attribute, "Unrecognized attribute: alpha[\\s\\S]*'/act/Relu'"),
    (wrong_arity, "has input size 3[\\s\\S]*'/act/Relu'"),
    (double_attribute, "'axis' is given twice"),
    (reference_attribute, "refers to a function"),
    (sparse_weight, "sparse initialisers"),
    (sequence_input, "no tensor but sequence_type"),
    (newer_feature, r"opset 24[\s\S]*node 'cp'"),
    (hostile_constant, "35184372088832.* needs [0-9]+ numbers|needs .* of data but has 2|too many"),
]


@pytest.mark.parametrize(("spoil", "message"), CASES, ids=[c[0].__name__ for c in CASES])
def test_hostile_graph_is_refused(
    spoil: Callable[[Any], None], message: str, linear: Any, save: Callable[[Any], Path]
) -> None:
    from pfmc.ingest import load

    spoil(linear)
    path = save(linear)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=message) as caught:
        load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300_000  # kB
    assert caught.value.exit_code == 3
    assert "Traceback" not in str(caught.value)
    assert str(path) in caught.value.where


def test_sound_model_passes(linear: Any, save: Callable[[Any], Path]) -> None:
    from pfmc.ingest import load

    loaded = load(save(linear))
    assert [n.op_type for n in loaded.model.graph] == ["MatMul", "Add", "Relu"]
    assert loaded.exporter == "test"


def test_unsorted_but_acyclic_graph_is_accepted(linear: Any, save: Callable[[Any], Path]) -> None:
    from pfmc.ingest import load
    from pfmc.ir import provenance

    nodes = list(linear.graph.node)
    del linear.graph.node[:]
    linear.graph.node.extend(reversed(nodes))
    found = list(load(save(linear)).model.graph)
    assert [n.op_type for n in found] == ["MatMul", "Add", "Relu"]
    assert [provenance.sources(n) for n in found] == [("n2",), ("n1",), ("n0",)]


def test_functions_are_inlined_with_their_callers_provenance(
    linear: Any, save: Callable[[Any], Path]
) -> None:
    from pfmc.ingest import load
    from pfmc.ir import provenance

    body = [node("Relu", ["a"], ["c"]), node("Neg", ["c"], ["b"])]
    add_function(linear, "relu_neg", body)
    linear.opset_import.append(make.make_opsetid("local", 1))
    linear.graph.node[2].CopyFrom(
        node("relu_neg", ["sum"], ["y"], name="/act/call", domain="local")
    )
    model = load(save(linear)).model
    assert [n.op_type for n in model.graph] == ["MatMul", "Add", "Relu", "Neg"]
    assert not model.functions
    assert provenance.sources(model.graph[-1]) == ("n2",)
    assert provenance.scope(model.graph[-1]) == "act"
    assert model.graph.outputs[0].name == "y"


def test_what_onnx_runtime_writes_into_older_opsets_is_taken(
    linear: Any, save: Callable[[Any], Path]
) -> None:
    """Its optimiser puts LayerNormalization (opset 17) into files of opset 16."""
    from pfmc.ingest import load

    opset(linear, 16)
    last = linear.graph.output[0].name
    width = linear.graph.output[0].type.tensor_type.shape.dim[-1].dim_value
    linear.graph.initializer.append(make.make_tensor("unit", F32, [width], [1.0] * width))
    linear.graph.node.append(node("LayerNormalization", [last, "unit"], ["normed"], axis=-1))
    linear.graph.output[0].name = "normed"
    assert load(save(linear)).model.graph.outputs[0].name == "normed"
