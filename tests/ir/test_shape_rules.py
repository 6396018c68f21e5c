"""Shapes that exporters without value information leave to be worked out."""

from __future__ import annotations

import onnx.parser
import onnx_ir as ir
import pytest

from pfmc.ir.shapes import Shapes

CASES = {
    "y = GatherElements<axis=1>(table, ids)": "batch, seq",
    "y = Tile(x, times)": "batch, 3*seq, 8",
    "y, i = TopK(x, two)": "batch, seq, 2",
    "y = Pad(x, pads)": "batch, seq + 1, 8",
    "y = Slice(x, one, far, one)": "batch, seq + -1, 8",
    "y = Slice(x, zero, minus, one)": "batch, seq + -1, 8",
    "s = Shape<start=1, end=2>(x) n = Neg(s) y = Slice(x, n, far, one)": "batch, seq, 8",
}


@pytest.mark.parametrize("body", CASES)
def test_rule(body: str) -> None:
    text = f"""g (int64[batch,seq] ids, float[batch,seq,8] x, float[batch,seq] table)
    => (float[a,b,c] y) <int64[3] times = {{1,3,1}}, int64[1] two = {{2}}, int64[1] one = {{1}},
    int64[1] zero = {{0}}, int64[1] minus = {{-1}}, int64[1] far = {{9223372036854775807}},
    int64[6] pads = {{0,1,0,0,0,0}}> {{ {body} }}"""
    graph = onnx.parser.parse_graph(text)
    del graph.output[0].type.tensor_type.shape.dim[:]
    model = ir.from_proto(onnx.helper.make_model(graph))
    output = model.graph.outputs[0]
    output.shape = None
    dims = Shapes(model.graph).shape(output)
    assert dims is not None
    assert ", ".join(map(str, dims)) == CASES[body]
