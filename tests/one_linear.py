"""The smallest canonical model: one fixed linear."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pfmc.ir import vocabulary


def one_linear(
    weight: np.ndarray, bias: np.ndarray, rows: int | str = "n", then: str | None = None
) -> ir.Model:
    """``y[rows, out] = x[rows, in] @ weight[in, out] + bias``, the layer ``fc``; then the operator
    `then` over the last axis, if any."""
    kind = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=ir.Shape([rows, len(weight)]), type=kind)
    values = [
        ir.Value(name=n, shape=ir.Shape(a.shape), type=kind, const_value=ir.tensor(a, name=n))
        for n, a in {"w": weight.astype(np.float32), "b": bias.astype(np.float32)}.items()
    ]
    nodes = [ir.node("FixedLinear", [x, *values], domain=vocabulary.DOMAIN, name="fc")]
    nodes[0].outputs[0].type = kind
    if then is not None:
        nodes[0].outputs[0].name = "scores"
        nodes.append(ir.node(then, nodes[0].outputs, {"axis": -1}))
    nodes[-1].outputs[0].name = "y"
    graph = ir.Graph(
        [x], nodes[-1].outputs, nodes=nodes, initializers=values, opset_imports={"": 24}, name="g"
    )
    model = ir.Model(graph, ir_version=11)
    vocabulary.install(model)
    return model
