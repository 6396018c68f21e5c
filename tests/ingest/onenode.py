"""Models of one operator, run by ONNX Runtime before and by pfmc's form of them after loading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from pfmc.ingest import load
from pfmc.ir.meaning import OPS

from .conftest import make_session, run_model

onnx = pytest.importorskip("onnx")
make = onnx.helper
Weights = dict[str, np.ndarray]
RNG = np.random.default_rng(7)


def normal(*shape: int) -> np.ndarray:
    """Normal float32 numbers."""
    return RNG.normal(0, 1, shape).astype(np.float32)


def whole(low: int, high: int, *shape: int, kind: Any = np.uint8) -> np.ndarray:
    """Whole numbers from `low` up to and without `high`."""
    return RNG.integers(low, high, shape).astype(kind)


def proto(
    op: str, inputs: Sequence[str], feeds: Mapping[str, np.ndarray], weights: Mapping[str, Any],
    outputs: Sequence[str], attributes: Mapping[str, Any], *, domain: str = "com.microsoft",
    opset: int = 21, symbols: Mapping[str, Sequence[int | str]] | None = None,
) -> Any:  # fmt: skip
    """The model; `weights` are arrays or TensorProtos, `symbols` the shapes of some inputs."""
    node = make.make_node(
        op, list(inputs), list(outputs), name="/l/op", domain=domain, **attributes
    )
    shapes = symbols or {}
    values = [
        make.make_tensor_value_info(
            k, make.np_dtype_to_tensor_dtype(v.dtype), shapes.get(k, v.shape)
        )
        for k, v in feeds.items()
    ]
    kept = [
        onnx.numpy_helper.from_array(v, k) if isinstance(v, np.ndarray) else v
        for k, v in weights.items()
    ]
    results = [onnx.ValueInfoProto(name=o) for o in outputs if o]
    graph = make.make_graph([node], "g", values, results, kept)
    imports = [make.make_opsetid("", opset), make.make_opsetid("com.microsoft", 1)]
    return make.make_model(graph, opset_imports=imports, ir_version=10)


def typed(model: Any, session: Any) -> Any:
    """The model with the types of its outputs, which the runtime inferred."""
    kinds = {"tensor(float)": 1, "tensor(uint8)": 2, "tensor(int8)": 3, "tensor(uint16)": 4,
             "tensor(int32)": 6, "tensor(int64)": 7, "tensor(float16)": 10}  # fmt: skip
    for value, known in zip(model.graph.output, session.get_outputs(), strict=True):
        value.CopyFrom(make.make_tensor_value_info(value.name, kinds[known.type], None))
    return model


def compare(
    folder: Path, op: str, inputs: Sequence[str], feeds: Weights, weights: Mapping[str, Any],
    outputs: Sequence[str] = ("y",), *, domain: str = "com.microsoft", atol: float = 1e-5,
    symbols: Mapping[str, Sequence[int | str]] | None = None, **attributes: Any,
) -> ir.Model:  # fmt: skip
    """Holds what pfmc loads equal to ONNX Runtime on the file; returns the loaded model."""
    model = proto(op, inputs, feeds, weights, outputs, attributes, domain=domain, symbols=symbols)
    session = make_session(model.SerializeToString())
    expected = session.run(None, feeds)
    path = folder / "model.onnx"
    path.write_bytes(typed(model, session).SerializeToString())
    return same(path, feeds, expected, atol)


def same(path: Path, feeds: Weights, expected: Sequence[np.ndarray], atol: float) -> ir.Model:
    """Holds the loaded file's results on `feeds` equal to `expected`."""
    loaded = load(path).model
    assert not [n for n in loaded.graph if n.domain == "com.microsoft"]
    assert not [n.op_type for n in loaded.graph if (n.domain, n.op_type) not in OPS]
    for want, got in zip(expected, run_model(loaded, feeds), strict=True):
        assert want.shape == got.shape
        assert want.dtype == got.dtype
        np.testing.assert_allclose(got, want, rtol=0, atol=atol)
    return loaded


def rotary_tables(rows: int, width: int) -> Weights:
    """cos and sin ``[rows, width / 2]``."""
    angles = np.outer(np.arange(rows), 1 / 10 ** np.arange(width // 2)).astype(np.float32)
    return {"cos": np.cos(angles), "sin": np.sin(angles)}


# a whole model ----------------------------------------------------------------------------------

WIDTH, HEADS, VOCABULARY = 32, 2, 40


def transformer(kind: int = 1) -> Any:
    """An encoder of one layer, ids[batch, S] -> logits; weights of type `kind`."""
    rng = np.random.default_rng(5)
    arrays: Weights = {
        "table": rng.normal(0, 1, (VOCABULARY, WIDTH)),
        "up.weight": rng.normal(0, 0.2, (WIDTH, 64)),
        "up.bias": rng.normal(0, 0.2, 64),
        "down.weight": rng.normal(0, 0.2, (64, WIDTH)),
        "head.weight": rng.normal(0, 0.2, (WIDTH, VOCABULARY)),
        **{f"{n}.weight": rng.normal(0, 0.3, (WIDTH, WIDTH)) for n in "qkvo"},
    }
    kept = [
        make.make_tensor(k, kind, v.shape, v.astype(np.float32).ravel().tolist())
        for k, v in arrays.items()
    ]
    kept += [
        make.make_tensor("scale", kind, [WIDTH], [1.0] * WIDTH),
        make.make_tensor("root", kind, [], [(WIDTH / HEADS) ** -0.5]),
        onnx.numpy_helper.from_array(np.array([0, 0, HEADS, -1]), "split"),
        onnx.numpy_helper.from_array(np.array([0, 0, -1]), "join"),
    ]
    nodes = [make.make_node("Gather", ["table", "ids"], ["x"], name="/embed/Gather")]

    def add(op: str, inputs: list[str], output: str, **more: Any) -> str:
        nodes.append(make.make_node(op, inputs, [output], name=f"/layer/{output}/{op}", **more))
        return output

    normed = add("LayerNormalization", ["x", "scale"], "normed", axis=-1)
    for name, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        flat = add("MatMul", [normed, f"{name}.weight"], f"{name}.flat")
        add("Transpose", [add("Reshape", [flat, "split"], f"{name}.split")], name, perm=perm)
    scores = add("Mul", [add("MatMul", ["q", "k"], "raw"), "root"], "scores")
    mixed = add("MatMul", [add("Softmax", [scores], "soft", axis=-1), "v"], "mixed")
    turned = add("Transpose", [mixed], "turned", perm=[0, 2, 1, 3])
    joined = add("Reshape", [turned, "join"], "joined")
    middle = add("Add", ["x", add("MatMul", [joined, "o.weight"], "o")], "middle")
    wide = add("Add", [add("MatMul", [middle, "up.weight"], "wide"), "up.bias"], "biased")
    down = add("MatMul", [add("Relu", [wide], "active"), "down.weight"], "down")
    add("MatMul", [add("Add", [middle, down], "end"), "head.weight"], "logits")
    graph = make.make_graph(
        nodes, "g", [make.make_tensor_value_info("ids", 7, ["batch", "S"])],
        [make.make_tensor_value_info("logits", kind, ["batch", "S", VOCABULARY])], kept,
    )  # fmt: skip
    return make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=9)


IDS = {"ids": np.random.default_rng(2).integers(0, VOCABULARY, (2, 6))}
