"""Probed shapes against ONNX Runtime's own, and on files as users have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from pfmc.distill.shapes import PROBES, probe_shapes
from pfmc.errors import InputError

ZOO = Path(__file__).resolve().parents[3] / "shared" / "zoo"
FILES = ("llama__t_kv", "llama__h_gen__decode", "gpt2__t_dyn", "bert__ts", "vit__h_dyn")
needs_zoo = pytest.mark.skipif(not ZOO.is_dir(), reason="needs the zoo beside the repository")


@needs_zoo
@pytest.mark.parametrize("name", FILES)
def test_shapes_equal_onnx_runtime(name: str) -> None:
    import onnxruntime as ort

    path = ZOO / f"{name}.onnx"
    probes = probe_shapes(ir.load(path))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for run in range(len(PROBES)):
        feeds = {}
        for value in session.get_inputs():
            dtype = np.int64 if "int64" in value.type else np.float32
            feeds[value.name] = np.zeros(probes[value.name][run].shape, dtype)
        outputs = session.run(None, feeds)
        for value, array in zip(session.get_outputs(), outputs, strict=True):
            assert probes[value.name][run].shape == array.shape
            assert probes[value.name][run].floating == (array.dtype == np.float32)


def _linear(rows: int, cols: int) -> ir.Model:
    """A fixed linear whose weight is one number seen as a matrix: no memory."""
    wide = np.broadcast_to(np.zeros((), np.float32), (rows, cols))
    weight = ir.Value(name="w", const_value=ir.Tensor(wide, name="w"))
    bias = ir.Value(name="b", const_value=ir.tensor(np.zeros(cols, np.float32), name="b"))
    x = ir.Value(name="x", shape=ir.Shape(["batch", "seq", rows]),
                 type=ir.TensorType(ir.DataType.FLOAT))  # fmt: skip
    node = ir.node("FixedLinear", [x, weight, bias], domain="pfmc", name="l",
                   outputs=[ir.Value(name="y")])  # fmt: skip
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight, bias],
                     opset_imports={"": 24}, name="g")  # fmt: skip
    return ir.Model(graph, ir_version=11)


def test_large_weights_are_never_read() -> None:
    probes = probe_shapes(_linear(100_000, 200_000))
    assert probes["y"][0].shape == (1, 3, 200_000)
    assert probes["y"][1].shape == (1, 5, 200_000)
    assert (probes["y"][1].positions, probes["y"][1].context) == (5, 5)


def test_memory_lengths_and_contexts() -> None:
    if not ZOO.is_dir():
        pytest.skip("needs the zoo beside the repository")
    probes = probe_shapes(ir.load(ZOO / "llama__t_kv.onnx"))
    assert [p.context for p in probes["input_ids"]] == [6, 10]
    assert [p.positions for p in probes["input_ids"]] == [1, 1]


def test_a_failing_run_names_the_node() -> None:
    model = _linear(4, 5)
    model.graph.append(
        ir.node(
            "Add",
            [model.graph[0].outputs[0], _constant()],
            name="bad",
            outputs=[ir.Value(name="z")],
        )
    )
    with pytest.raises(InputError, match="does not run on shapes") as error:
        probe_shapes(model)
    assert "bad" in str(error.value)


def _constant() -> ir.Value:
    return ir.Value(name="c", const_value=ir.tensor(np.zeros((7, 7), np.float32), name="c"))


def test_weights_of_fixed_linears_are_not_read() -> None:
    def refuse() -> ir.TensorProtocol:
        raise AssertionError("the weight was read")

    model = _linear(8, 6)
    weight = model.graph.initializers["w"]
    weight.const_value = ir.LazyTensor(refuse, ir.DataType.FLOAT, ir.Shape([8, 6]), name="w")
    assert probe_shapes(model)["y"][0].shape == (1, 3, 6)


def _with_inputs(text: str) -> ir.Model:
    graph = onnx.parser.parse_graph(f"g {text}")
    opsets = [onnx.helper.make_opsetid("", 24)]
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=opsets))


def test_an_input_named_like_the_memory_is_as_long() -> None:
    """A cross-attention mask is as long as the cross memory, not as past and present together."""
    model = _with_inputs(
        """(float[B,1,1,enc] mask, float[B,1,enc,8] past_key) => (float[B,1,8,enc] y) {
            t = Transpose<perm=[0,1,3,2]>(past_key) y = Add(t, mask)
        }"""
    )
    first, second = probe_shapes(model)["y"]
    assert (first.shape, second.shape) == ((1, 1, 8, 5), (1, 1, 8, 9))


def test_a_sound_is_long_enough_for_its_kernels() -> None:
    model = _with_inputs(
        """(float[B,samples] x) => (float[B,1,n] y) <float[1,1,4] w = {1,1,1,1}> {
            a = Constant<value_ints=[1]>() u = Unsqueeze(x, a)
            y = Conv<strides=[40], dilations=[30]>(u, w)
        }"""
    )
    first, second = probe_shapes(model)["y"]
    assert 0 < first.size < second.size


def test_images_have_the_side_on_which_the_model_runs() -> None:
    """A table of 4 positions after patches of 16: only images of 32 x 32 fit."""
    from pfmc.distill.feeds import batches
    from pfmc.distill.shapes import image_side

    rng = np.random.default_rng(0)
    kernel = ir.tensor(rng.normal(size=(6, 3, 16, 16)).astype(np.float32), name="kernel")
    table = ir.tensor(rng.normal(size=(1, 6, 4)).astype(np.float32), name="table")
    shape = ir.tensor(np.array([0, 6, -1]), name="shape")
    held = [ir.Value(name=str(t.name), const_value=t) for t in (kernel, table, shape)]
    image = ir.Value(name="pixels", shape=ir.Shape(["batch", 3, "height", "width"]),
                     type=ir.TensorType(ir.DataType.FLOAT))  # fmt: skip
    conv = ir.node("Conv", [image, held[0]], {"strides": [16, 16]})
    flat = ir.node("Reshape", [conv.outputs[0], held[2]])
    added = ir.node("Add", [flat.outputs[0], held[1]], outputs=[ir.Value(name="y")])
    graph = ir.Graph([image], added.outputs, nodes=[conv, flat, added], initializers=held,
                     opset_imports={"": 24}, name="patches")  # fmt: skip
    model = ir.Model(graph, ir_version=11)
    assert image_side(model) == 32
    assert next(iter(batches(model, 2, 8, 0)))["pixels"].shape == (2, 3, 32, 32)


def test_an_input_without_positions_is_refused() -> None:
    """Found by the fuzzer: counts were divided by no positions."""
    text = "<ir_version: 8, opset_import: ['' : 18]> g (float[3,0,2] x) => (float[3,0,2] y)"
    model = ir.from_proto(onnx.parser.parse_model(text.replace("'", '"') + " { y = Abs (x) }"))
    with pytest.raises(InputError, match="holds no positions") as error:
        probe_shapes(model)
    assert error.value.where == "x"
