"""Files that protobuf reads and no exporter writes; what was found by reading ingest."""

from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from pfmc import ingest
from pfmc.errors import InputError
from pfmc.ingest import magic, tidy
from pfmc.lint import lint
from pfmc.passes import pipeline, recipe

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


def _holding(nodes: list[Any], held: dict[str, Any], outputs: tuple[str, ...] = ("y",)) -> Any:
    model = _model(nodes, outputs=outputs)
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in held.items()]
    model.graph.initializer.extend(tensors)
    return model


def test_a_range_to_the_end_of_int32(tmp_path: Path) -> None:
    """2**31, that slices use for "to the end", is a length here, and onnx would write it out."""
    nodes = [
        helper.make_node("Range", ["z", "b", "o"], ["r"]),
        helper.make_node("Gather", ["r", "o"], ["g"]),
        helper.make_node("Cast", ["g"], ["f"], to=F32),
        helper.make_node("Add", ["x", "f"], ["y"]),
    ]
    path = _probed(_holding(nodes, {"z": 0, "b": 1 << 31, "o": 1}), tmp_path)
    assert [v.name for v in ingest.load(path).model.graph.outputs] == ["y"]
    assert any("Range makes" in f.what for f in lint(path).findings)


VAST = {
    "Add": [helper.make_node("Add", ["e", "f"], ["g"])],
    "MatMul": [helper.make_node("MatMul", ["e", "f"], ["g"])],
    "Gather": [
        helper.make_node("Identity", ["e"], ["d"]),
        helper.make_node("Expand", ["i", "q"], ["k"]),
        helper.make_node("Gather", ["d", "k"], ["h"], axis=1),
        helper.make_node("Squeeze", ["h", "o"], ["g"]),
    ],
}


@pytest.mark.parametrize(("bits", "fits"), [(13, True), (15, False)], ids=["shown", "refused"])
@pytest.mark.parametrize("kind", VAST)
def test_small_constants_make_a_vast_value(
    kind: str, bits: int, fits: bool, tmp_path: Path
) -> None:
    """64 million elements are not computed to find shapes, a thousand million are refused."""
    side = 1 << bits
    nodes = [
        helper.make_node("Expand", ["t", "r"], ["e"]),
        helper.make_node("Expand", ["t", "q"], ["f"]),
        *VAST[kind],
        helper.make_node("ReduceMax", ["g"], ["s"]),
        helper.make_node("Add", ["x", "s"], ["y"]),
    ]
    held = {
        "t": np.ones((1, 1), np.float32), "r": [side, 1], "q": [1, side], "i": 0, "o": [1],
    }  # fmt: skip
    path = fuzz.place(tmp_path)
    path.write_bytes(_holding(nodes, held).SerializeToString())
    lint(path)
    tracemalloc.start()
    found = lint(path).findings
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 26
    assert ("PFM507" in {f.code for f in found}) == (not fits), found


def test_many_constant_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are lifted together: onnx_ir walks through the outputs at every removal."""
    calls = 0
    plain = ir.Graph.remove

    def counted(self: ir.Graph, *args: Any, **more: Any) -> None:
        nonlocal calls
        calls += 1
        plain(self, *args, **more)

    monkeypatch.setattr(ir.Graph, "remove", counted)
    names = tuple(f"y{i}" for i in range(200))
    nodes = [helper.make_node("Constant", [], [n], value_float=float(n[1:])) for n in names]
    path = fuzz.place(tmp_path)
    path.write_bytes(_model(nodes, outputs=names).SerializeToString())
    graph = ingest.load(path).model.graph
    assert calls < 10
    assert [v.name for v in graph.outputs] == list(names)
    makers = [v.producer() for v in graph.outputs]
    held = [float(m.inputs[0].const_value.numpy()) for m in makers]  # type: ignore[union-attr]
    assert held == [float(i) for i in range(200)]


def test_a_chain_of_casts(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", [f"t{i}" if i else "x"], [f"t{i + 1}"], to=1 if i % 2 else 11)
        for i in range(1500)
    ]
    _probed(_model([*nodes, helper.make_node("Neg", ["t1500"], ["y"])]), tmp_path)


@pytest.mark.parametrize("inside", [False, True], ids=["file", "graph"])
def test_small_fields_without_end(
    inside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A field of two bytes costs a microsecond to walk past, and a file has room for 2**30."""
    monkeypatch.setattr(magic, "MAX_ENTRIES", 1000)
    fields = b"\x08\x0a" * 2000  # ir_version = 10; in a graph a number that nobody asked for
    wrapped = b"".join(b"\x3a\xa0\x06" + b"\x78\x01" * 400 for _ in range(3))
    path = fuzz.place(tmp_path)
    plain = _model([helper.make_node("Neg", ["x"], ["y"])]).SerializeToString()
    path.write_bytes(plain + (wrapped if inside else fields))
    what = "more than 1000 other fields" if inside else "more than 1000 fields"
    with pytest.raises(InputError, match=what):
        ingest.load(path)


def test_a_function_has_a_value_of_the_name_that_its_output_would_get() -> None:
    body = [
        helper.make_node("Neg", ["a"], ["a_output_1"]),
        helper.make_node("Abs", ["a_output_1"], ["c"]),
    ]
    model = ir.from_proto(_model([_call("y", "z")], _function(body, ["c", "a", "a"])))
    (function,) = model.functions.values()
    tidy._part_outputs(function)
    names = [v.name for n in function for v in n.outputs]
    assert names == ["a_output_1", "c", "a_output_1_1", "a_output_2"]


@pytest.mark.parametrize("axis", [7, -7, 1 << 40])
def test_a_squeeze_of_an_axis_that_is_not_there(axis: int, tmp_path: Path) -> None:
    model = _model([helper.make_node("Squeeze", ["x"], ["y"], axes=[axis])])
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", F32, ["n", "m"]))
    model.opset_import[0].version = 11
    path = _probed(model, tmp_path)
    with pytest.raises(InputError, match="axes"):
        _canonicalise(path)


def _canonicalise(path: Path) -> Any:
    steps = recipe.load("stream").passes
    return pipeline.canonicalise(ingest.load(path).model, steps).model
