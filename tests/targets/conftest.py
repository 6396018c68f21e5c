"""A two-layer decoder in canonical form, quantised, built by hand: shapes small enough to count."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest

from pfmc.ir import vocabulary

WIDTH, HEADS, KV_HEADS, HEAD, HIDDEN, WORDS = 8, 2, 1, 4, 16, 10


class DecoderBuilder:
    """Writes nodes into a graph; `scope` goes to each node's metadata."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []
        self.scope = ""

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.dtype = ir.DataType.from_numpy(array.dtype)
        value.shape = ir.Shape(array.shape)
        self.constants.append(value)
        return value

    def op(
        self, op_type: str, inputs: Sequence[ir.Value | None], outputs: int = 1, name: str = "",
        domain: str = "", **attributes: float | int | Sequence[int],
    ) -> ir.Value | Sequence[ir.Value]:  # fmt: skip
        number = len(self.nodes)
        name = name or f"node_{op_type}_{number}"
        values = [ir.Value(name=f"v{number}_{i}") for i in range(outputs)]
        made = ir.node(op_type, inputs, attributes, domain=domain, outputs=values, name=name)
        made.metadata_props[vocabulary.KEY_SCOPE] = self.scope
        made.metadata_props[vocabulary.KEY_SOURCE] = f"n{number}"
        self.nodes.append(made)
        return values[0] if outputs == 1 else values

    def linear(self, name: str, x: ir.Value, inputs: int, outputs: int) -> ir.Value:
        weight = self.constant(f"{name}.weight", np.ones((inputs, outputs), np.float32))
        bias = self.constant(f"{name}.bias", np.zeros(outputs, np.float32))
        return self.op("FixedLinear", [x, weight, bias], name=name, domain="pfmc")

    def quantised(self, x: ir.Value) -> ir.Value:
        return self.op("QuantiseToken", [x], domain="pfmc", top=127.0)

    def norm(self, name: str, x: ir.Value) -> ir.Value:
        weight = self.constant(name, np.ones(WIDTH, np.float32))
        return self.op("RMSNormalization", [x, weight], axis=-1, epsilon=1e-5)

    def heads(self, x: ir.Value, heads: int, shape: ir.Value) -> ir.Value:
        split = self.op("Reshape", [x, shape])
        return self.op("Transpose", [split], perm=[0, 2, 1, 3])

    def layer(self, i: int, h: ir.Value, past: Sequence[ir.Value]) -> tuple[ir.Value, list]:
        block = f"model.layers.{i}"
        self.scope = block
        x = self.quantised(self.norm(f"{block}.norm1", h))
        self.scope = f"{block}.attn"
        split = {n: self.constant(f"{block}.split{n}", np.array([0, 0, n, HEAD])) for n in (1, 2)}
        q, k, v = (
            self.heads(
                self.linear(f"{block}.attn.{n}", x, WIDTH, heads * HEAD), heads, split[heads]
            )
            for n, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
        )
        y, key, value = self.op("Attention", [q, k, v, None, *past], 3, is_causal=1, scale=0.5)
        joined = self.constant(f"{block}.join", np.array([0, 0, WIDTH]))
        y = self.op("Reshape", [self.op("Transpose", [y], perm=[0, 2, 1, 3]), joined])
        y = self.linear(f"{block}.attn.o", self.quantised(y), WIDTH, WIDTH)
        self.scope = block
        h = self.op("Add", [h, y])
        x = self.quantised(self.norm(f"{block}.norm2", h))
        gate, up = (self.linear(f"{block}.mlp.{n}", x, WIDTH, HIDDEN) for n in ("gate", "up"))
        active = self.op("SwiGLU", [gate, up], domain="pfmc")
        down = self.linear(f"{block}.mlp.down", self.quantised(active), HIDDEN, WIDTH)
        return self.op("Add", [h, down]), [key, value]

    def build(self) -> ir.Model:
        ids = ir.Value(name="input_ids", shape=ir.Shape(["batch", "seq"]),
                       type=ir.TensorType(ir.DataType.INT64))  # fmt: skip
        pasts = [
            ir.Value(name=f"past_key_values.{i}.{n}", type=ir.TensorType(ir.DataType.FLOAT),
                     shape=ir.Shape(["batch", KV_HEADS, "past", HEAD]))
            for i in range(2) for n in ("key", "value")
        ]  # fmt: skip
        table = self.constant("embed", np.ones((WORDS, WIDTH), np.float32))
        h = self.op("Gather", [table, ids], axis=0)
        presents = []
        for i in range(2):
            h, memory = self.layer(i, h, pasts[2 * i : 2 * i + 2])
            presents += memory
        self.scope = ""
        logits = self.linear("head", self.quantised(self.norm("norm", h)), WIDTH, WORDS)
        graph = ir.Graph(
            [ids, *pasts], [logits, *presents], nodes=self.nodes, initializers=self.constants,
            opset_imports={"": vocabulary.OPSET}, name="tiny",
        )  # fmt: skip
        model = ir.Model(graph, ir_version=vocabulary.IR_VERSION)
        vocabulary.install(model)
        return model


@pytest.fixture
def decoder() -> ir.Model:
    return DecoderBuilder().build()
