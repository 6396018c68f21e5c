"""What the probing of masks refuses to compute."""

from __future__ import annotations

import onnx_ir as ir

from pfmc.ir import shapes
from pfmc.ir.shapes import Shapes
from pfmc.passes.masks import probe


def test_an_input_of_a_huge_fixed_batch_leaves_the_mask_explicit() -> None:
    """Found by the fuzzer: 80 GiB were asked for."""
    given = ir.Value(
        name="attention_mask", shape=ir.Shape([2**31 - 1, 1, 1, "seq"]),
        type=ir.TensorType(ir.DataType.FLOAT),
    )  # fmt: skip
    node = ir.node("Neg", [given], name="n")
    node.outputs[0].name = "mask"
    graph = ir.Graph([given], node.outputs, nodes=[node], opset_imports={"": 24}, name="g")
    seq = shapes.symbol("seq")
    found = probe(node.outputs[0], seq, seq, Shapes(graph), 0)
    assert found.kind == "explicit"
    assert "elements" in found.reason
