"""Files that protobuf reads and no exporter writes; what was found by reading ingest."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from pfmc import ingest
from pfmc.errors import InputError

from . import fuzz

F32, I64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
STANDARD = helper.make_opsetid("", 20)


def _model(nodes: list[Any], *functions: Any, outputs: tuple[str, ...] = ("y",)) -> Any:
    ins = [helper.make_tensor_value_info("x", F32, ["n", 8])]
    outs = [helper.make_tensor_value_info(n, F32, None) for n in outputs]
    opsets = [STANDARD, helper.make_opsetid("local", 1)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ins, outs), opset_imports=opsets, ir_version=10
    )
    model.functions.extend(functions)
    return model


def _function(
    nodes: list[Any], outputs: list[str], name: str = "F", inputs: tuple[str, ...] = ("a",),
    **more: Any,
) -> Any:  # fmt: skip
    imports = [STANDARD, helper.make_opsetid("local", 1)]
    return helper.make_function("local", name, list(inputs), outputs, nodes, imports, **more)


def _call(*outputs: str, name: str = "F", inputs: tuple[str, ...] = ("x",)) -> Any:
    return helper.make_node(name, list(inputs), list(outputs), domain="local")


def _probed(model: Any, folder: Path) -> Path:
    path = fuzz.place(folder)
    path.write_bytes(model.SerializeToString())
    fuzz.probe(path)
    return path


def _outside(location: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name="w", data_type=F32, dims=[8])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def _with_default(tensor: onnx.TensorProto) -> Any:
    """A function whose Constant is the default of an attribute, that is `tensor`."""
    default = onnx.AttributeProto(name="k", type=onnx.AttributeProto.TENSOR, t=tensor)
    node = helper.make_node("Constant", [], ["w"])
    node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR, ref_attr_name="k")
    body = [node, helper.make_node("Add", ["a", "w"], ["c"])]
    return _model([_call("y")], _function(body, ["c"], attribute_protos=[default]))


def test_a_scope_of_three_thousand_modules(tmp_path: Path) -> None:
    name = "/" + "a/" * 3000 + "Add"
    _probed(_model([helper.make_node("Add", ["x", "x"], ["y"], name=name)]), tmp_path)


@pytest.mark.parametrize("location", ["a" * 300, "a/" * 3000], ids=["name", "path"])
def test_external_data_under_a_name_too_long_for_the_system(location: str, tmp_path: Path) -> None:
    model = _model([helper.make_node("Add", ["x", "w"], ["y"])])
    model.graph.initializer.append(_outside(location))
    path = _probed(model, tmp_path)
    with pytest.raises(InputError, match="cannot be reached"):
        ingest.load(path)


def test_a_default_outside_is_sought_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in the folder that the process happens to run in."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "data.bin").write_bytes(np.zeros(8, np.float32).tobytes())
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = _probed(_with_default(_outside("data.bin")), tmp_path)
    with pytest.raises(InputError, match="data file is missing"):
        ingest.load(path)
    (tmp_path / "data.bin").write_bytes(np.arange(8, dtype=np.float32).tobytes())
    (held,) = ingest.load(path).model.graph.initializers.values()
    assert held.const_value is not None
    np.testing.assert_array_equal(held.const_value.numpy(), np.arange(8))


def test_a_default_of_too_few_bytes(tmp_path: Path) -> None:
    short = onnx.TensorProto(data_type=F32, dims=[8], raw_data=b"abc")
    with pytest.raises(InputError, match="needs 32 bytes of data but has 3"):
        ingest.load(_probed(_with_default(short), tmp_path))


@pytest.mark.parametrize("made", [[], [helper.make_node("Neg", ["a"], ["c"])]], ids=["in", "out"])
def test_a_function_that_gives_one_value_twice(made: list[Any], tmp_path: Path) -> None:
    """Inlined as it is, it would rename the model's input, or drop one of its outputs."""
    given = "c" if made else "a"
    model = _model([_call("y", "z")], _function(made, [given, given]), outputs=("y", "z"))
    graph = ingest.load(_probed(model, tmp_path)).model.graph
    assert [v.name for v in graph.inputs] == ["x"]
    assert [v.name for v in graph.outputs] == ["y", "z"]


@pytest.mark.parametrize("outputs", [("y", ""), ("", "y")], ids=str)
def test_a_call_leaves_out_a_constant(outputs: tuple[str, ...], tmp_path: Path) -> None:
    constant = helper.make_node("Constant", [], ["k"], value_float=1.0)
    body = [helper.make_node("Neg", ["a"], ["c"]), constant]
    order = ["c", "k"] if outputs[0] else ["k", "c"]
    path = _probed(_model([_call(*outputs)], _function(body, order)), tmp_path)
    assert [n.op_type for n in ingest.load(path).model.graph] == ["Neg"]


def test_a_note_on_an_attribute_that_is_no_text(tmp_path: Path) -> None:
    function = _function([helper.make_node("LeakyRelu", ["a"], ["c"], alpha=0.5)], ["c"])
    function.node[0].attribute[0].MergeFromString(b"\x6a\x01\xff")  # doc_string
    path = _probed(_model([_call("y")], function), tmp_path)
    assert [n.op_type for n in ingest.load(path).model.graph] == ["LeakyRelu"]


def test_calls_deeper_than_onnx_follows(tmp_path: Path) -> None:
    names = [f"F{i}" for i in range(120)]
    functions = [_function([helper.make_node("Neg", ["a"], ["c"])], ["c"], names[0])]
    for before, name in itertools.pairwise(names):
        inner = _call("c", name=before, inputs=("a",))
        functions.append(_function([inner], ["c"], name))
    with pytest.raises(InputError, match="chain depth"):
        ingest.load(_probed(_model([_call("y", name=names[-1])], *functions), tmp_path))


def test_an_overload_that_is_not_in_the_file(tmp_path: Path) -> None:
    function = _function([helper.make_node("Neg", ["a"], ["c"])], ["c"])
    function.overload = "other"
    with pytest.raises(InputError, match="Overload '' of a function"):
        ingest.load(_probed(_model([_call("y")], function), tmp_path))


def test_two_inputs_of_a_function_share_a_name(tmp_path: Path) -> None:
    function = _function([helper.make_node("Neg", ["a"], ["c"])], ["c"], inputs=("a", "a"))
    with pytest.raises(InputError, match="Two function inputs have the same name"):
        ingest.load(_probed(_model([_call("y", inputs=("x", "x"))], function), tmp_path))


def test_an_output_that_is_an_input_says_nothing_of_its_shape(tmp_path: Path) -> None:
    model = _model([helper.make_node("Neg", ["x"], ["y"])])
    model.graph.output.append(helper.make_tensor_value_info("x", F32, [3, 4, 5]))
    graph = ingest.load(_probed(model, tmp_path)).model.graph
    assert [str(v.shape) for v in (*graph.inputs, *graph.outputs)] == ["[n,8]"] * 3


def test_a_function_makes_a_vector_too_long_for_a_shape(tmp_path: Path) -> None:
    held = {"z": 0, "b": 1 << 27, "o": 1}
    body = [
        *(helper.make_node("Constant", [], [k], value=numpy_helper.from_array(np.array(v)))
          for k, v in held.items()),
        helper.make_node("Range", ["z", "b", "o"], ["r"]),
        helper.make_node("Gather", ["r", "z"], ["i"]),
        helper.make_node("Cast", ["i"], ["f"], to=F32),
        helper.make_node("Add", ["a", "f"], ["c"]),
    ]  # fmt: skip
    path = _probed(_model([_call("y")], _function(body, ["c"])), tmp_path)
    assert [v.name for v in ingest.load(path).model.graph.outputs] == ["y"]
