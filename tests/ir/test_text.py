"""The text form of a model, held to golden text."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pfmc.ir import text
from pfmc.ir.vocabulary import DOMAIN

GOLDEN = """\
graph(%x: f32[batch,64]) {
  %h: f32[batch,8] = pfmc.FixedLinear(%x, @w[64,8], @b[12])  # n3 n4 model.mlp
  %y: ?[?] = Softmax(%h) {axis=-1}  # n5
  %z: ?[?] = Add(%y, [0.5, 2])
  %q: ?[?] = Reshape(%z, [0, -1], _)
  return %q: ?[?]
}
"""


def test_golden() -> None:
    def constant(name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        return ir.Value(name=name, shape=ir.Shape(array.shape), const_value=tensor)

    kind = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=ir.Shape(["batch", 64]), type=kind)
    shapes = {"w": (64, 8), "b": (12,)}
    weights = [constant(n, np.zeros(s, np.float32)) for n, s in shapes.items()]
    half = constant("half", np.array([0.5, 2.0], np.float32))
    shape = constant("shape", np.array([0, -1]))
    linear = ir.node("FixedLinear", [x, *weights], domain=DOMAIN)
    linear.metadata_props.update({"pfmc.src": "n3 n4", "pfmc.scope": "model.mlp"})
    h = linear.outputs[0]
    h.name, h.shape, h.type = "h", ir.Shape(["batch", 8]), kind
    soft = ir.node("Softmax", [h], {"axis": -1})
    soft.metadata_props["pfmc.src"] = "n5"
    add = ir.node("Add", [soft.outputs[0], half])
    reshape = ir.node("Reshape", [add.outputs[0], shape, None])
    for node, name in ((soft, "y"), (add, "z"), (reshape, "q")):
        node.outputs[0].name = name
    graph = ir.Graph(
        [x], reshape.outputs, nodes=[linear, soft, add, reshape],
        initializers=[*weights, half, shape], opset_imports={"": 24},
    )  # fmt: skip
    model = ir.Model(graph, ir_version=11)
    assert text.model_text(model) == GOLDEN
    assert "#" not in text.model_text(model, comments=False)
    assert text.histogram(model) == {"Add": 1, "Reshape": 1, "Softmax": 1, "pfmc.FixedLinear": 1}


def test_large_weights_are_not_read() -> None:
    def read() -> ir.TensorProtocol:
        raise AssertionError("a weight was read")

    lazy = ir.LazyTensor(read, ir.DataType.INT4, ir.Shape([64, 64]), name="w")
    w = ir.Value(name="w", shape=ir.Shape([64, 64]), const_value=lazy)
    node = ir.node("Identity", [w])
    assert text.node_text(node).endswith("= Identity(@w:i4[64,64])")
