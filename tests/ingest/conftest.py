"""Shared means of the ingest tests: the zoo, feeds by signature, ONNX Runtime as the oracle."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

ZOO = Path(__file__).resolve().parents[3] / "shared" / "zoo"
BATCH, SEQ, PAST = 2, 5, 4

Feeds = dict[str, np.ndarray]


def _dim(dim: Any, axis: int, name: str, fixed_step: bool, has_past: bool) -> int:
    if isinstance(dim, int):
        return dim
    if str(dim).isdecimal():
        return int(dim)
    if axis == 0:
        return BATCH
    if "values" in name and "past" not in name:
        return 1600
    if "past_key_values" in name:
        return PAST if axis == 2 else 16
    steps = 1 if fixed_step else SEQ  # the genai decoders take one token at a time with a past
    return PAST + steps if has_past and "mask" in name else steps


def _fill(name: str, kind: str, shape: list[int]) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    rng = np.random.default_rng(seed)
    if "int" not in kind:
        return rng.normal(0, 1, shape).astype(np.float32)
    if "mask" in name:
        return np.ones(shape, np.int64)
    if "position" in name:
        return np.broadcast_to(np.arange(shape[-1]), shape).astype(np.int64)
    if "type" in name:
        return rng.integers(0, 2, shape)
    return rng.integers(3, 60, shape) if shape else np.array(4)


def feeds_for(session: Any) -> Feeds:
    """Deterministic inputs that fit the signature of an ONNX Runtime session."""
    inputs = session.get_inputs()
    has_past = any("past_key_values" in i.name for i in inputs)
    fixed = any(i.name.endswith("input_ids") and list(i.shape)[1:] == [1] for i in inputs)
    return {
        i.name: _fill(
            i.name, i.type, [_dim(d, a, i.name, fixed, has_past) for a, d in enumerate(i.shape)]
        )
        for i in inputs
    }


def make_session(model: str | Path | bytes) -> Any:
    """An ONNX Runtime session on one thread with optimisation BASIC."""
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    data = model if isinstance(model, bytes) else str(model)
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run_model(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Runs a loaded model, saved to bytes, on the feeds it still declares."""
    session = make_session(ir.to_proto(model).SerializeToString())
    wanted = {i.name for i in session.get_inputs()}
    return session.run(None, {k: v for k, v in feeds.items() if k in wanted})


@pytest.fixture(scope="session")
def zoo() -> Path:
    """The folder of small exported models; the test skips where it is absent."""
    if not ZOO.is_dir():
        pytest.skip("the zoo of exported models is not here")
    return ZOO


@pytest.fixture(scope="session")
def session_of() -> Callable[[str | Path | bytes], Any]:
    """`make_session`."""
    return make_session


@pytest.fixture(scope="session")
def feeds_of() -> Callable[[Any], Feeds]:
    """`feeds_for`."""
    return feeds_for


@pytest.fixture(scope="session")
def run_loaded() -> Callable[[ir.Model, Mapping[str, np.ndarray]], list[np.ndarray]]:
    """`run_model`."""
    return run_model


def linear_proto(**header: Any) -> Any:
    """A sound model ``y = relu(x @ weight + bias)`` with x[batch, 4] and y[batch, 3]."""
    onnx = pytest.importorskip("onnx")
    make = onnx.helper
    rng = np.random.default_rng(0)
    weight = onnx.numpy_helper.from_array(rng.normal(size=(4, 3)).astype(np.float32), "fc.weight")
    bias = onnx.numpy_helper.from_array(rng.normal(size=3).astype(np.float32), "fc.bias")
    nodes = [
        make.make_node("MatMul", ["x", "fc.weight"], ["product"], name="/fc/MatMul"),
        make.make_node("Add", ["product", "fc.bias"], ["sum"], name="/fc/Add"),
        make.make_node("Relu", ["sum"], ["y"], name="/act/Relu"),
    ]
    values = [
        make.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch", d])
        for n, d in (("x", 4), ("y", 3))
    ]
    graph = make.make_graph(nodes, "g", values[:1], values[1:], [weight, bias])
    header.setdefault("opset_imports", [make.make_opsetid("", 20)])
    header.setdefault("ir_version", 10)
    return make.make_model(graph, producer_name="test", **header)


@pytest.fixture
def linear() -> Any:
    """`linear_proto`, made afresh."""
    return linear_proto()


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Any], Path]:
    """Writes a proto (or bytes) to a file ``model.onnx`` in a fresh folder."""

    def write(content: Any) -> Path:
        path = tmp_path / "model.onnx"
        path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
        return path

    return write
