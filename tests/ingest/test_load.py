"""Every file of the zoo loads and computes the same numbers; damage gives clear errors only."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pfmc.errors import PfmcError
from pfmc.ingest import load
from pfmc.ir import provenance, vocabulary

ZOO = Path(__file__).resolve().parents[3] / "shared" / "zoo"
FILES = sorted(p.relative_to(ZOO).as_posix() for p in ZOO.glob("*.onnx"))
SAMPLE = [
    name
    for name in FILES
    if name.split("__")[0]
    in {"llama", "llama_tied", "gpt2", "bert", "vit", "distilbert", "deit", "mistral", "qwen3"}
]


def outputs(graph: ir.Graph) -> list[ir.Value]:
    return [o for n in graph for o in n.outputs if o.name]


@pytest.mark.parametrize("name", FILES)
def test_every_file_of_the_zoo_becomes_uniform(name: str) -> None:
    model = load(ZOO / name).model
    graph = model.graph
    assert graph.opset_imports[""] == vocabulary.OPSET
    assert model.ir_version == vocabulary.IR_VERSION
    assert not model.functions
    assert not {"Constant", "Dropout"} & {n.op_type for n in graph}
    names = [v.name for v in (*graph.inputs, *graph.initializers.values(), *outputs(graph))]
    assert all(names)
    assert len(set(names)) == len(names)
    assert len({n.name for n in graph}) == len(graph)
    assert all(provenance.sources(n) for n in graph)
    live = {o for n in graph for v in n.inputs if v is not None for o in (v,)}
    assert all(v in live or v.is_graph_output() for v in outputs(graph) if v.index() == 0)
    for value in (*graph.inputs, *outputs(graph)):
        for dim in value.shape or ():
            assert isinstance(dim, int) or not str(dim.value).isdecimal()


@pytest.mark.parametrize("name", SAMPLE)
def test_loaded_model_computes_what_the_file_computes(
    name: str,
    session_of: Callable[[Any], Any],
    feeds_of: Callable[[Any], dict[str, np.ndarray]],
    run_loaded: Callable[..., list[np.ndarray]],
) -> None:
    session = session_of(ZOO / name)
    feeds = feeds_of(session)
    expected = session.run(None, feeds)
    model = load(ZOO / name).model
    assert [o.name for o in model.graph.outputs] == [o.name for o in session.get_outputs()]
    assert [i.name for i in model.graph.inputs] == [i.name for i in session.get_inputs()]
    for want, got in zip(expected, run_loaded(model, feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_value_names_are_those_of_the_file(zoo: Path) -> None:
    path = zoo / "llama__t_dyn.onnx"
    original = {o.name for n in ir.load(path).graph for o in n.outputs}
    assert {v.name for v in outputs(load(path).model.graph)} <= original


def test_nothing_of_the_exporting_machine_remains(zoo: Path) -> None:
    for name in ("llama__t_dyn.onnx", "bert__ts.onnx", "vit__h_dyn.onnx"):
        text = ir.to_proto(load(zoo / name).model).SerializeToString()
        for word in (b"stack_trace", b"site-packages", b".py", b"fx_node", b"class_hierarchy"):
            assert word not in text, (name, word)


def test_scopes_and_weights_of_a_dynamo_export(zoo: Path) -> None:
    graph = load(zoo / "llama__t_dyn.onnx").model.graph
    product = next(n for n in graph if n.outputs[0].name == "linear")
    assert provenance.scope(product) == "model.layers.0.self_attn.q_proj"
    weight = product.inputs[1]
    assert weight is not None
    assert weight.name == "val_76"
    assert provenance.weight(weight) == "model.layers.0.self_attn.q_proj.weight"


def test_scopes_and_weights_of_a_torchscript_export(zoo: Path) -> None:
    graph = load(zoo / "llama__ts.onnx").model.graph
    product = next(n for n in graph if n.name == "/m/model/layers.0/self_attn/q_proj/MatMul")
    assert provenance.scope(product) == "m.model.layers.0.self_attn.q_proj"
    assert product.inputs[1] is not None
    assert provenance.weight(product.inputs[1]) == "m.model.layers.0.self_attn.q_proj.weight"


def test_every_big_weight_of_the_zoo_has_its_original_name(zoo: Path) -> None:
    for name in SAMPLE:
        for value in load(zoo / name).model.graph.initializers.values():
            big = value.const_value is not None and value.const_value.size > 100
            if big and value.dtype is not None and value.dtype.is_floating_point():
                assert provenance.weight(value), (name, value.name)


def test_numbers_spelled_as_symbols_become_numbers(zoo: Path) -> None:
    graph = load(zoo / "llama__h_gen__decode.onnx").model.graph
    past = next(v for v in graph.inputs if "past" in str(v.name))
    assert past.shape is not None
    assert [type(d) for d in past.shape.dims] == [ir.SymbolicDim, int, ir.SymbolicDim, int]
    assert (past.shape[1], past.shape[3]) == (2, 8)


def test_loading_is_deterministic(zoo: Path) -> None:
    for name in ("gpt2__ts.onnx", "llama_int4/model.onnx"):
        first, second = (
            ir.to_proto(load(zoo / name).model).SerializeToString(deterministic=True)
            for _ in range(2)
        )
        assert first == second


def test_five_thousand_nodes_load_in_half_a_second(tmp_path: Path) -> None:
    """The measured figure is 0.4 s of one core; the test allows for a busy machine."""
    onnx = pytest.importorskip("onnx")
    make, nodes, value = onnx.helper, [], "x"
    for i in range(1250):
        nodes += [
            make.make_node("Relu", [value], [f"r{i}"], name=f"/layers.{i}/Relu"),
            make.make_node("Neg", [value], [f"n{i}"], name=f"/layers.{i}/Neg"),
            make.make_node("Mul", [f"r{i}", f"n{i}"], [f"m{i}"], name=f"/layers.{i}/Mul"),
            make.make_node("Add", [value, f"m{i}"], [f"a{i}"], name=f"/layers.{i}/Add"),
        ]
        value = f"a{i}"
    for node in nodes:
        node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value="File /home/u/x.py\n" * 90)
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'model', 'op']")
    ends = [make.make_tensor_value_info(n, 1, ["b", 16]) for n in ("x", value)]
    graph = make.make_graph(nodes, "g", ends[:1], ends[1:])
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 20)], ir_version=10)
    path = tmp_path / "long.onnx"
    path.write_bytes(model.SerializeToString())
    assert len(load(path).model.graph) == 5000


def test_constants_identities_and_dead_nodes_go(linear: Any, save: Callable[[Any], Path]) -> None:
    onnx = pytest.importorskip("onnx")
    make = onnx.helper
    nodes = [
        make.make_node("Constant", [], ["two"], value_float=2.0),
        make.make_node("Identity", ["fc.weight"], ["alias"]),
        make.make_node("MatMul", ["x", "alias"], ["dead"]),
        make.make_node("Mul", ["y0", "two"], ["y1"]),
        make.make_node("Identity", ["y1"], ["y"]),
    ]
    linear.graph.node[2].output[0] = "y0"
    linear.graph.node[0].input[1] = "alias"
    linear.graph.node.extend(nodes)
    graph = load(save(linear)).model.graph
    assert [n.op_type for n in graph] == ["MatMul", "Add", "Relu", "Mul"]
    assert graph[0].inputs[1] is graph.initializers["fc.weight"]
    assert graph.outputs[0].name == "y"
    assert float(graph.initializers["two"].const_value.numpy()) == 2.0


def test_constant_and_passed_through_outputs_keep_their_names(
    linear: Any, save: Callable[[Any], Path], run_loaded: Callable[..., list[np.ndarray]]
) -> None:
    onnx = pytest.importorskip("onnx")
    make = onnx.helper
    linear.graph.node.append(make.make_node("Constant", [], ["c"], value_ints=[1, 2]))
    linear.graph.node.append(make.make_node("Identity", ["x"], ["same"]))
    linear.graph.output.append(make.make_tensor_value_info("c", 7, [2]))
    linear.graph.output.append(make.make_tensor_value_info("same", 1, ["batch", 4]))
    model = load(save(linear)).model
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    _, constant, same = run_loaded(model, {"x": x})
    assert [o.name for o in model.graph.outputs] == ["y", "c", "same"]
    assert constant.tolist() == [1, 2]
    assert np.array_equal(same, x)


def test_inputs_with_defaults_become_weights(linear: Any, save: Callable[[Any], Path]) -> None:
    onnx = pytest.importorskip("onnx")
    linear.graph.input.append(onnx.helper.make_tensor_value_info("fc.bias", 1, [3]))
    graph = load(save(linear)).model.graph
    assert [v.name for v in graph.inputs] == ["x"]
    assert graph.initializers["fc.bias"].const_value is not None


def test_half_precision_is_recorded_and_kept(linear: Any, save: Callable[[Any], Path]) -> None:
    onnx = pytest.importorskip("onnx")
    half = onnx.TensorProto.FLOAT16
    for tensor in linear.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for value in (linear.graph.input[0], linear.graph.output[0]):
        value.type.tensor_type.elem_type = half
    loaded = load(save(linear))
    assert loaded.precision == ir.DataType.FLOAT16
    assert loaded.model.graph.outputs[0].dtype == ir.DataType.FLOAT16


SMALL = ZOO / "vit__t_static.onnx"


@functools.cache
def small() -> bytes:
    """The bytes of one small file of the zoo."""
    if not SMALL.is_file():
        pytest.skip("the zoo of exported models is not here")
    return SMALL.read_bytes()


def _only_clear_errors(data: bytes, folder: Path) -> None:
    path = folder / "model.onnx"
    path.write_bytes(data)
    try:
        load(path)
    except PfmcError as error:
        if error.exit_code != 3 or not error.what:
            raise AssertionError("not an InputError") from error


@settings(max_examples=int(os.environ.get("PFMC_FUZZ", "120")), deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 7)), min_size=1, max_size=4))
def test_flipped_bits(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]]
) -> None:
    data = bytearray(small())
    for position, bit in flips:
        data[position % len(data)] ^= 1 << bit
    _only_clear_errors(bytes(data), tmp_path_factory.mktemp("flipped"))


@settings(max_examples=int(os.environ.get("PFMC_FUZZ", "120")), deadline=None)
@given(st.integers(0, 1 << 30), st.integers(0, 1 << 30), st.binary(max_size=8))
def test_cut_and_spliced(
    tmp_path_factory: pytest.TempPathFactory, start: int, size: int, put: bytes
) -> None:
    whole = small()
    start %= len(whole)
    data = whole[:start] + put + whole[start + size % 64 :]
    _only_clear_errors(data, tmp_path_factory.mktemp("spliced"))
    _only_clear_errors(whole[:start], tmp_path_factory.mktemp("cut"))


@functools.cache
def dialect() -> tuple[bytes, bytes]:
    """A small file of pure structure and its data: onnxruntime-genai, com.microsoft operators."""
    folder = ZOO / "llama_int4"
    if not folder.is_dir():
        pytest.skip("the zoo of exported models is not here")
    return (folder / "model.onnx").read_bytes(), (folder / "model.onnx.data").read_bytes()


@settings(max_examples=int(os.environ.get("PFMC_FUZZ", "120")), deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_dialect_file(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    proto, data = dialect()
    folder = tmp_path_factory.mktemp("dialect")
    (folder / "model.onnx.data").write_bytes(data)
    damaged = bytearray(proto)
    for position, byte in changes:
        damaged[position % len(damaged)] = byte
    _only_clear_errors(bytes(damaged), folder)
