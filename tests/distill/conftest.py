"""Small models of our own in canonical form, and ONNX Runtime as the outside truth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_ir import tape

from pfmc.ir import vocabulary

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
HIDDEN, HEADS, KV_HEADS, WIDTH, VOCABULARY, CONTEXT, INNER = 16, 4, 2, 4, 32, 64, 24


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def zoo() -> Path:
    """The folder of random tiny models; skips where it is absent."""
    if not (SHARED / "zoo").is_dir():
        pytest.skip("the zoo of tiny models is absent")
    return SHARED / "zoo"


@pytest.fixture(scope="session")
def stories() -> Path:
    """The folder of the stories260K model; skips where it is absent."""
    if not (SHARED / "data" / "stories260K" / "model.onnx").is_file():
        pytest.skip("stories260K is absent")
    return SHARED / "data" / "stories260K"


@pytest.fixture(scope="session")
def bard() -> Path:
    """The folder of the shipped model; skips until it is trained."""
    folder = Path(__file__).resolve().parents[2] / "models" / "bard"
    if not (folder / "model.onnx").is_file() or not (folder / "model_kv.onnx").is_file():
        pytest.skip("models/bard is not trained yet")
    return folder


@pytest.fixture(scope="session")
def oracle() -> Callable[[ir.Model | Path, dict[str, np.ndarray]], list[np.ndarray]]:
    """ONNX Runtime with basic optimisation on one thread."""

    def run(model: ir.Model | Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        source = str(model) if isinstance(model, Path) else ir.to_proto(model).SerializeToString()
        return onnxruntime.InferenceSession(source, options).run(None, feeds)

    return run


class Writer:
    """Writes one canonical Llama block by block; see `canonical_llama`."""

    def __init__(self, memory: bool, quantised: bool, length: int | str) -> None:
        self.tape, self.rng = tape.Tape(), np.random.default_rng(5)
        self.memory, self.quantised, self.length = memory, quantised, length
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []

    def constant(self, array: np.ndarray, name: str) -> ir.Value:
        return self.tape.initializer(ir.tensor(array, name=name))

    def op(
        self, op_type: str, *inputs: ir.Value | None, name: str = "", **attributes: Any
    ) -> ir.Value:
        domain = vocabulary.DOMAIN if op_type in vocabulary.OPERATORS else ""
        return self.tape.op(op_type, list(inputs), attributes, domain=domain, name=name or None)

    def linear(self, x: ir.Value, name: str, wide: int, to: int) -> ir.Value:
        bias = np.zeros(to, np.float32) if "o_proj" in name else self.rng.normal(size=to)
        offset = self.constant(bias.astype(np.float32), f"{name}.bias")
        if not self.quantised:
            weight = (self.rng.normal(size=(wide, to)) / wide**0.5).astype(np.float32)
            return self.op(
                "FixedLinear", x, self.constant(weight, f"{name}.weight"), offset, name=name
            )
        codes = self.rng.integers(-7, 8, (wide, to)).astype(np.int8)
        scale = np.full(to, 0.05, np.float32)
        return self.op(
            "QuantisedLinear",
            self.op("QuantiseToken", x, top=127.0),
            self.constant(codes, f"{name}.codes"),
            self.constant(scale, f"{name}.scale"),
            offset,
            name=name,
            axis=1,
            block_size=0,
        )

    def integers(self, values: list[int], name: str) -> ir.Value:
        return self.constant(np.array(values, np.int64), name)

    def heads(self, x: ir.Value, count: int, name: str) -> ir.Value:
        shape = self.integers([0, 0, count, WIDTH], f"{name}.shape")
        return self.op("Transpose", self.op("Reshape", x, shape), perm=[0, 2, 1, 3])

    def attention(self, x: ir.Value, name: str, cos: ir.Value, sin: ir.Value) -> ir.Value:
        q, k, v = (
            self.heads(self.linear(x, f"{name}.{p}", HIDDEN, n * WIDTH), n, f"{name}.{p}")
            for p, n in (("q_proj", HEADS), ("k_proj", KV_HEADS), ("v_proj", KV_HEADS))
        )
        q, k = self.op("Rotary", q, cos, sin), self.op("Rotary", k, cos, sin)
        if self.memory:
            past = self.inputs[1:]
            y, key, value = self.tape.op_multi_out(
                "Attention", [q, k, v, None, *past], {"is_causal": 1}, num_outputs=3
            )
            for present, kind in ((key, "key"), (value, "value")):
                present.name, present.dtype = f"present.0.{kind}", ir.DataType.FLOAT
                present.shape = ir.Shape(["batch", KV_HEADS, "total", WIDTH])
                self.outputs.append(present)
        else:
            y = self.op("Attention", q, k, v, is_causal=1)
        flat = self.integers([0, 0, HIDDEN], f"{name}.flat")
        y = self.op("Reshape", self.op("Transpose", y, perm=[0, 2, 1, 3]), flat)
        return self.linear(y, f"{name}.o_proj", HIDDEN, HIDDEN)

    def tables(self, ids: ir.Value) -> tuple[ir.Value, ir.Value]:
        zero = self.constant(np.array(0, np.int64), "zero")
        one = self.constant(np.array(1, np.int64), "one")
        axis = self.integers([0], "axis")
        count = self.op("Squeeze", self.op("Shape", ids, start=1, end=2), axis)
        start = zero
        if self.memory:
            start = self.op("Squeeze", self.op("Shape", self.inputs[1], start=2, end=3), axis)
        places = self.op("Range", start, self.op("Add", start, count), one)
        angle = np.outer(np.arange(CONTEXT), 0.3 ** np.arange(WIDTH // 2))
        angle = np.concatenate([angle, angle], axis=1)
        table = {"cos": np.cos(angle), "sin": np.sin(angle)}
        cos, sin = (
            self.op("Gather", self.constant(t.astype(np.float32), n), places)
            for n, t in table.items()
        )
        return cos, sin

    def model(self) -> ir.Model:
        sides = ir.Shape(["batch", self.length])
        ids = ir.Value(name="input_ids", shape=sides, type=ir.TensorType(ir.DataType.INT64))
        self.inputs = [ids]
        if self.memory:
            self.inputs += [
                ir.Value(
                    name=f"past_key_values.0.{kind}",
                    shape=ir.Shape(["batch", KV_HEADS, "past", WIDTH]),
                    type=ir.TensorType(ir.DataType.FLOAT),
                )
                for kind in ("key", "value")
            ]
        table = self.constant(
            self.rng.normal(size=(VOCABULARY, HIDDEN)).astype(np.float32), "embed"
        )
        gain = self.constant(np.linspace(0.5, 1.5, HIDDEN, dtype=np.float32), "gain")
        x = self.op("Gather", table, ids)
        cos, sin = self.tables(ids)
        y = self.attention(self.op("RMSNormalization", x, gain), "layers.0.attn", cos, sin)
        x = self.op("Add", x, y)
        h = self.op("RMSNormalization", x, gain)
        gate = self.linear(h, "layers.0.mlp.gate_proj", HIDDEN, INNER)
        up = self.linear(h, "layers.0.mlp.up_proj", HIDDEN, INNER)
        down = self.linear(self.op("SwiGLU", gate, up), "layers.0.mlp.down_proj", INNER, HIDDEN)
        logits = self.linear(self.op("Add", x, down), "lm_head", HIDDEN, VOCABULARY)
        logits.name, logits.dtype = "logits", ir.DataType.FLOAT
        logits.shape = ir.Shape(["batch", self.length, VOCABULARY])
        graph = ir.Graph(
            self.inputs,
            [logits, *self.outputs],
            nodes=self.tape.nodes,
            initializers=self.tape.initializers,
            opset_imports={"": vocabulary.OPSET},
            name="llama",
        )
        model = ir.Model(graph, ir_version=vocabulary.IR_VERSION)
        vocabulary.install(model)
        return model


@pytest.fixture(scope="session")
def canonical_llama() -> Callable[..., ir.Model]:
    """Makes a one-layer Llama in canonical form, the same weights at each call."""

    def make(memory: bool = False, quantised: bool = False, length: int | str = "seq") -> ir.Model:
        return Writer(memory, quantised, length).model()

    return make
