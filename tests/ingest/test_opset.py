"""Operators whose meaning changed: old nodes, upgraded, against ONNX Runtime on the old file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfmc.errors import InputError
from pfmc.ingest import load
from pfmc.ingest.opset import CHANGES
from pfmc.ir import provenance
from pfmc.ir.vocabulary import OPSET
from pfmc.lint import lint

onnx = pytest.importorskip("onnx")
make = onnx.helper
F32, I64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
X = np.random.default_rng(3).normal(0, 1, (2, 3, 4)).astype(np.float32)


@dataclass
class Old:
    """A node of an old opset on the input x[2, 3, 4]."""

    op: str
    opset: int
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1
    constants: dict[str, np.ndarray] = field(default_factory=dict)

    def proto(self, known_shape: bool = True) -> Any:
        names = [f"y{i}" for i in range(self.outputs)]
        dims = [2, 3, 4] if known_shape else None
        node = make.make_node(
            self.op, ["r", *self.constants], names, name="/old", **self.attributes
        )
        graph = make.make_graph(
            [make.make_node("Relu", ["x"], ["r"]), node],
            "g",
            [make.make_tensor_value_info("x", F32, dims)],
            [make.make_tensor_value_info(n, _kind(self, i), None) for i, n in enumerate(names)],
            [onnx.numpy_helper.from_array(v, k) for k, v in self.constants.items()],
        )
        imports = [make.make_opsetid("", self.opset)]
        return make.make_model(graph, opset_imports=imports, ir_version=7)


def _kind(old: Old, index: int) -> int:
    if (old.op == "TopK" and index == 1) or old.op == "ArgMax":
        return int(I64)
    if old.op == "Cast":
        return int(old.attributes["to"])
    if old.op == "Dropout" and index == 1 and old.opset >= 10:
        return int(onnx.TensorProto.BOOL)
    return int(F32)


CASES = [
    Old("Slice", 9, {"starts": [0, 1], "ends": [1, 3], "axes": [0, 2]}),
    Old("Slice", 7, {"starts": [0, 1], "ends": [1, 3]}),
    Old("TopK", 9, {"k": 2, "axis": -1}, 2),
    Old("Clip", 7, {"min": 0.1, "max": 0.5}),
    Old("Clip", 10, {"max": 0.5}),
    Old("Pad", 10, {"pads": [0, 0, 1, 0, 0, 2], "value": 1.5}),
    Old("Pad", 7, {"pads": [0, 0, 1, 0, 0, 1], "mode": "reflect"}),
    Old("Unsqueeze", 12, {"axes": [0, 3]}),
    Old("Squeeze", 12),
    Old("ReduceSum", 12, {"axes": [1], "keepdims": 0}),
    Old("ReduceMean", 17, {"axes": [-1], "keepdims": 1}),
    Old("ReduceMean", 13),
    Old("ReduceMax", 11, {"axes": [0, 2]}),
    Old("ReduceL2", 17, {"axes": [2]}),
    Old("Split", 12, {"axis": 2, "split": [1, 3]}, 2),
    Old("Split", 11, {"axis": 2}, 2),
    Old("Split", 17, {"axis": 1}, 3),
    Old("Split", 13, {"axis": 2}, 2, {"sizes": np.array([3, 1])}),
    Old("Softmax", 12, {"axis": 2}),
    Old("Softmax", 11, {"axis": -1}),
    Old("Softmax", 12),
    Old("Softmax", 9, {"axis": 0}),
    Old("LogSoftmax", 12, {"axis": 1}),
    Old("Softmax", 13, {"axis": 1}),
    Old("Softmax", 7, {"axis": 2}),
    Old("LogSoftmax", 7, {"axis": 2}),
    Old("LogSoftmax", 11, {"axis": 0}),
    Old("LogSoftmax", 12, {"axis": -2}),
    Old("Hardmax", 12, {"axis": 1}),
    Old("Hardmax", 9),
    Old("Slice", 10, {}, 1, {"a": np.array([0, 1]), "b": np.array([1, 9])}),
    Old("Slice", 7, {"starts": [-2], "ends": [2**31 - 1], "axes": [1]}),
    Old("TopK", 10, {"axis": 1}, 2, {"k": np.array([2])}),
    Old("TopK", 11, {"largest": 0, "sorted": 1}, 2, {"k": np.array([3])}),
    Old("Clip", 7),
    Old("Clip", 11, {}, 1, {"low": np.array(-0.2, np.float32)}),
    Old("Clip", 9, {"min": -0.3}),
    Old("Pad", 8, {"pads": [0, 1, 0, 0, 0, 1], "mode": "edge"}),
    Old("Pad", 11, {}, 1, {"p": np.array([0, 0, 1, 0, 0, -1])}),
    Old("Unsqueeze", 7, {"axes": [1]}),
    Old("Unsqueeze", 11, {"axes": [-1]}),
    Old("ReduceSum", 7, {"axes": [0, 2], "keepdims": 1}),
    Old("ReduceSum", 11, {"axes": [-1]}),
    Old("ReduceSum", 11),
    *(
        Old(f"Reduce{name}", 11, {"axes": [-1], "keepdims": 0})
        for name in ("Mean", "Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSumExp")
    ),
    Old("ReduceLogSum", 12, {"axes": [2]}),
    Old("ArgMax", 11, {"axis": -1, "keepdims": 0}),
    Old("Split", 7, {"axis": 1, "split": [1, 2]}, 2),
    Old("Split", 12, {"axis": -1}, 4),
    Old("Flatten", 9, {"axis": 2}),
    Old("Cast", 9, {"to": 7}),
    Old("Pow", 7, {}, 1, {"e": np.array(2, np.float32)}),
    Old("LeakyRelu", 7, {"alpha": 0.1}),
    Old("Sum", 8, {}, 1, {"b": np.ones(4, np.float32)}),
    Old("Upsample", 7, {"scales": [1.0, 2.0, 3.0], "mode": "nearest"}),
    Old("Upsample", 9, {"mode": "nearest"}, 1, {"s": np.array([1, 1, 1.5], np.float32)}),
    Old("Resize", 10, {"mode": "nearest"}, 1, {"s": np.array([1, 2, 1.7], np.float32)}),
    Old("Resize", 10, {"mode": "linear"}, 1, {"s": np.array([1, 1.7, 0.6], np.float32)}),
    Old("Dropout", 7, {"ratio": 0.3}),
    Old("Dropout", 10, {"ratio": 0.3}, 2),
    Old("Dropout", 12, {}, 1, {"ratio": np.array(0.3, np.float32)}),
    Old("Dropout", 20, {}, 2),
    Old(
        "Scatter",
        9,
        {"axis": 1},
        1,
        {"i": np.array([[[1, 0, 2, 1]]]), "u": np.full((1, 1, 4), 9, np.float32)},
    ),
]


@pytest.mark.parametrize("known_shape", [True, False], ids=["shape", "no shape"])
@pytest.mark.parametrize("old", CASES, ids=lambda o: f"{o.op}-{o.opset}-{CASES.index(o)}")
def test_upgraded_node_computes_the_same(
    old: Old,
    known_shape: bool,
    save: Callable[[Any], Path],
    session_of: Callable[[Any], Any],
    run_loaded: Callable[..., list[np.ndarray]],
) -> None:
    path = save(old.proto(known_shape))
    expected = session_of(path).run(None, {"x": X})
    model = load(path).model
    assert model.graph.opset_imports[""] == OPSET
    got = run_loaded(model, {"x": X})
    assert [o.name for o in model.graph.outputs] == [f"y{i}" for i in range(old.outputs)]
    for want, have in zip(expected, got, strict=True):
        assert want.dtype == have.dtype
        np.testing.assert_allclose(have, want, rtol=0, atol=1e-6)


def test_softmax_of_the_last_axis_stays_one_node(save: Callable[[Any], Path]) -> None:
    model = load(save(Old("Softmax", 11, {"axis": 2}).proto())).model
    assert [n.op_type for n in model.graph] == ["Relu", "Softmax"]
    assert model.graph[1].attributes.get_int("axis", 0) == -1


@pytest.mark.parametrize(
    ("old", "message"),
    [
        (
            Old(
                "Dropout", 12, {}, 1, {"ratio": np.array(0.3, np.float32), "train": np.array(True)}
            ),
            "training mode",
        ),
        (Old("Resize", 10, {}, 1, {"s": np.full(3, 0.6, np.float32)}), "nearest to fewer points"),
    ],
)
def test_what_cannot_be_upgraded_is_refused(
    old: Old, message: str, save: Callable[[Any], Path]
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(save(old.proto()))
    assert "'/old'" in caught.value.where


def test_batch_norm_of_an_old_opset(
    save: Callable[[Any], Path],
    session_of: Callable[[Any], Any],
    run_loaded: Callable[..., list[np.ndarray]],
) -> None:
    rng = np.random.default_rng(1)
    parts = {k: rng.uniform(0.5, 2, 3).astype(np.float32) for k in "sbmv"}
    path = save(Old("BatchNormalization", 8, {}, 1, parts).proto())
    expected = session_of(path).run(None, {"x": X})[0]
    np.testing.assert_allclose(run_loaded(load(path).model, {"x": X})[0], expected, atol=1e-6)


@pytest.mark.parametrize("opset", [7, 9, 11])
def test_a_gemm_of_an_old_opset_is_a_fixed_linear(
    opset: int, save: Callable[[Any], Path], session_of: Callable[[Any], Any]
) -> None:
    """Flatten, Gemm with its bias, Unsqueeze by attribute: one product with a constant."""
    from pfmc.ir import vocabulary
    from pfmc.passes import pipeline, recipe

    from .conftest import run_model

    rng = np.random.default_rng(4)
    arrays = {"w": rng.normal(0, 1, (5, 12)), "b": rng.normal(0, 1, (1, 5))}
    nodes = [
        make.make_node("Flatten", ["x"], ["f"], axis=1),
        make.make_node("Gemm", ["f", "w", "b"], ["g"], transB=1, alpha=0.5, beta=2.0, name="/fc"),
        make.make_node("Unsqueeze", ["g"], ["y"], axes=[1]),
    ]
    values = [make.make_tensor_value_info(n, F32, s) for n, s in (("x", [2, 3, 4]), ("y", None))]
    kept = [onnx.numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()]
    graph = make.make_graph(nodes, "g", values[:1], values[1:], kept)
    imports = [make.make_opsetid("", opset)]
    path = save(make.make_model(graph, opset_imports=imports, ir_version=7))
    want = session_of(path).run(None, {"x": X})[0]
    model = pipeline.canonicalise(load(path).model, recipe.load("stream", ()).passes).model
    assert len(vocabulary.fixed_linears(model)) == 1
    np.testing.assert_allclose(run_model(model, {"x": X})[0], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ir_version", [3, 13, 14])
def test_every_version_of_the_file_format(
    ir_version: int, linear: Any, save: Callable[[Any], Path], run_loaded: Callable[..., Any]
) -> None:
    """ONNX Runtime 1.31 reads no IR 14; what is loaded is IR 11 and runs."""
    x = np.ones((2, 4), np.float32)
    want = run_loaded(load(save(linear)).model, {"x": x})[0]
    linear.ir_version = ir_version
    if ir_version < 4:  # initialisers were inputs as well
        for tensor in linear.graph.initializer:
            linear.graph.input.append(make.make_tensor_value_info(tensor.name, 1, tensor.dims))
    np.testing.assert_array_equal(run_loaded(load(save(linear)).model, {"x": x})[0], want)


def test_a_type_that_only_ir_14_has_is_refused(linear: Any, save: Callable[[Any], Path]) -> None:
    linear.ir_version = 14
    linear.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT6E2M3
    with pytest.raises(InputError, match="FLOAT6E2M3|type"):
        load(save(linear))


def test_functions_are_upgraded_from_their_own_opset(
    linear: Any, save: Callable[[Any], Path], run_loaded: Callable[..., list[np.ndarray]]
) -> None:
    body = [make.make_node("ReduceSum", ["a"], ["b"], axes=[1], keepdims=1)]
    function = make.make_function("local", "total", ["a"], ["b"], body, [make.make_opsetid("", 12)])
    linear.functions.append(function)
    linear.graph.node[2].CopyFrom(make.make_node("total", ["sum"], ["y"], domain="local"))
    linear.opset_import.append(make.make_opsetid("local", 1))
    del linear.graph.output[0].type.tensor_type.shape.dim[1]
    x = np.ones((2, 4), np.float32)
    model = load(save(linear)).model
    assert run_loaded(model, {"x": x})[0].shape == (2, 1)


def test_what_an_upgrade_adds_in_a_function_has_the_call_as_source(
    linear: Any, save: Callable[[Any], Path], run_loaded: Callable[..., list[np.ndarray]]
) -> None:
    """Found by the fuzzer: the new nodes had an empty list of sources."""
    body = [make.make_node("LogSoftmax", ["a"], ["b"])]  # of unknown rank in here
    function = make.make_function("local", "total", ["a"], ["b"], body, [make.make_opsetid("", 9)])
    linear.functions.append(function)
    linear.graph.node[2].CopyFrom(make.make_node("total", ["sum"], ["y"], domain="local"))
    linear.opset_import.append(make.make_opsetid("local", 1))
    del linear.graph.output[0].type.tensor_type.shape.dim[1]
    model = load(save(linear)).model
    assert {provenance.sources(n) for n in model.graph if "LogSoftmax" in str(n.name)} == {("n2",)}
    x = np.ones((2, 4), np.float32)
    np.testing.assert_allclose(np.exp(run_loaded(model, {"x": x})[0]).sum(1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("op", "name", "kind", "opset"),
    [
        ("ReduceSum", "axes", 7, 12), ("Softmax", "axis", 2, 12), ("Clip", "min", 1, 9),
        ("Upsample", "mode", 3, 7), ("TopK", "k", 2, 9),
    ],
)  # fmt: skip
def test_what_only_a_call_says_is_refused_where_it_must_be_read(
    op: str, name: str, kind: int, opset: int, linear: Any, save: Callable[[Any], Path]
) -> None:
    """It was read as nothing: a crash, or a bound that is no number."""
    node = make.make_node(op, ["a"], ["b", "i"] if op == "TopK" else ["b"])
    if op == "Upsample":
        node.attribute.append(make.make_attribute("scales", [1.0, 1.0]))
    node.attribute.add(name=name, type=kind).ref_attr_name = "given"
    function = make.make_function(
        "local", "part", ["a"], ["b"], [node], [make.make_opsetid("", opset)], ["given"]
    )
    linear.functions.append(function)
    value = {7: [1], 2: 1, 1: 0.5, 3: "nearest"}[kind]
    call = make.make_node("part", ["sum"], ["y"], domain="local", given=value)
    linear.graph.node[2].CopyFrom(call)
    linear.opset_import.append(make.make_opsetid("local", 1))
    del linear.graph.output[0].type.tensor_type.shape.dim[:]
    linear.graph.output[0].type.tensor_type.ClearField("shape")
    with pytest.raises(InputError, match=f"the calls of a function set its attribute '{name}'"):
        load(save(linear))


@pytest.mark.parametrize("value", [1e39, float("nan")])
def test_a_bound_that_the_type_does_not_hold(
    value: float, linear: Any, save: Callable[[Any], Path]
) -> None:
    """The types do not fit, and lint goes on to look for more."""
    del linear.graph.node[:], linear.graph.initializer[:]
    linear.graph.node.append(make.make_node("Clip", ["x"], ["y"], min=value))
    linear.graph.input[0].type.tensor_type.elem_type = 7
    linear.graph.output[0].CopyFrom(make.make_tensor_value_info("y", 7, None))
    del linear.opset_import[:]
    linear.opset_import.append(make.make_opsetid("", 9))
    with pytest.raises(InputError, match="unsupported type"):
        load(save(linear))
    assert "unsupported type" in lint(save(linear)).to_text()


def test_an_axis_beyond_the_last_is_not_taken_round(
    linear: Any, save: Callable[[Any], Path]
) -> None:
    del linear.graph.node[:], linear.graph.initializer[:]
    linear.graph.node.append(make.make_node("Softmax", ["x"], ["y"], axis=5))
    linear.graph.input[0].CopyFrom(make.make_tensor_value_info("x", 1, ["n", 8]))
    linear.graph.output[0].CopyFrom(make.make_tensor_value_info("y", 1, None))
    del linear.opset_import[:]
    linear.opset_import.append(make.make_opsetid("", 9))
    with pytest.raises(InputError, match="Invalid value"):
        load(save(linear))


def test_every_change_is_an_operator_of_the_standard() -> None:
    known = {s.name for s in onnx.defs.get_all_schemas_with_history() if s.domain == ""}
    assert set(CHANGES) <= known
