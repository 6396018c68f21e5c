"""Random graphs of plain operators with dynamic shapes: pfmc, before and after the canonical
passes, computes what ONNX Runtime does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from .agreement import agree

BATCH, SEQ = 2, 3  # of the symbols "batch" and "seq"
SIZES = {"batch": BATCH, "seq": SEQ}
Dims = tuple[int | str, ...]
Draw = st.DataObject

UNARY = ("Abs", "Neg", "Relu", "Sigmoid", "Tanh", "Erf", "Sin", "Cos", "Softplus", "Elu", "Gelu",
         "HardSigmoid", "LeakyRelu", "Identity", "Ceil", "Floor", "Round", "Sign",
         "Swish")  # fmt: skip
BINARY = ("Add", "Sub", "Mul", "Max", "Min")
COMPARISONS = ("Less", "Greater", "LessOrEqual", "GreaterOrEqual")
REDUCTIONS = ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceSumSquare",
              "ReduceLogSumExp", "ReduceL1")  # fmt: skip


@dataclass
class Growing:
    """A graph under way: nodes, constants, and the real values so far with their shapes."""

    data: Draw
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    held: list[onnx.TensorProto] = field(default_factory=list)
    shapes: dict[str, Dims] = field(default_factory=dict)

    def pick(self, *ranks: int) -> str:
        """Some value of one of these ranks, the newest most often."""
        fitting = [n for n, s in self.shapes.items() if not ranks or len(s) in ranks]
        return self.data.draw(st.sampled_from(fitting[::-1][:4]))

    def add(self, op: str, inputs: list[str], shape: Dims, **more: object) -> str:
        """A node and its output's shape."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **more))
        self.shapes[name] = shape
        return name

    def constant(self, array: np.ndarray) -> str:
        name = f"c{len(self.held)}"
        self.held.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, *dims: int) -> str:
        seed = self.data.draw(st.integers(0, 99))
        return self.constant(np.random.default_rng(seed).normal(0, 0.5, dims).astype(np.float32))

    def ints(self, *numbers: int) -> str:
        return self.constant(np.array(numbers, np.int64))

    def number(self, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high))


def unary(g: Growing) -> None:
    source = g.pick()
    g.add(g.data.draw(st.sampled_from(UNARY)), [source], g.shapes[source])


def binary(g: Growing) -> None:
    """With itself, a constant of a broadcast shape, or another value of the same shape."""
    left = g.pick()
    shape = g.shapes[left]
    same = [n for n, s in g.shapes.items() if s == shape]
    right = g.data.draw(st.sampled_from([*same, "row", "scalar"]))
    if right == "row" and shape and isinstance(shape[-1], int):
        right = g.weight(shape[-1])
    elif right in ("row", "scalar"):
        right = g.weight()
    op = g.data.draw(st.sampled_from(BINARY))
    g.add(op, [left, right] if g.number(0, 1) else [right, left], shape)


def linear(g: Growing) -> None:
    source = g.pick(2, 3, 4)
    *front, width = g.shapes[source]
    if not isinstance(width, int):
        return
    out = g.number(1, 5)
    if len(front) == 1 and g.number(0, 1):
        operands = [source, g.weight(out, width), g.weight(out)]
        g.add("Gemm", operands, (*front, out), transB=1)
    else:
        g.add("MatMul", [source, g.weight(width, out)], (*front, out))


def scores(g: Growing) -> None:
    """A product of a value with its own transpose, and a Softmax of it."""
    source = g.pick(3)
    first, rows, width = g.shapes[source]
    turned = g.add("Transpose", [source], (first, width, rows), perm=[0, 2, 1])
    product = g.add("MatMul", [source, turned], (first, rows, rows))
    weights = g.add("Softmax", [product], (first, rows, rows), axis=-1)
    g.add("MatMul", [weights, source], (first, rows, width))


def reduce(g: Growing) -> None:
    source = g.pick(1, 2, 3, 4)
    shape = g.shapes[source]
    axis, keep = g.number(-len(shape), len(shape) - 1), g.number(0, 1)
    at = axis % len(shape)
    rest = (*shape[:at], *((1,) if keep else ()), *shape[at + 1 :])
    op = g.data.draw(st.sampled_from(REDUCTIONS))
    g.add(op, [source, g.ints(axis)], rest, keepdims=keep)


def norm(g: Growing) -> None:
    source = g.pick(2, 3)
    shape = g.shapes[source]
    if isinstance(shape[-1], int):
        op = g.data.draw(st.sampled_from(("LayerNormalization", "RMSNormalization")))
        operands = [source, g.weight(shape[-1])]
        g.add(op, operands, shape, axis=-1, epsilon=1e-3)


def transpose(g: Growing) -> None:
    source = g.pick(2, 3, 4)
    shape = g.shapes[source]
    perm = g.data.draw(st.permutations(range(len(shape))))
    g.add("Transpose", [source], tuple(shape[p] for p in perm), perm=list(perm))


def reshape(g: Growing) -> None:
    """The last dimension split or joined with the one before it; 0 and -1 for symbols."""
    source = g.pick(2, 3)
    shape = g.shapes[source]
    if shape[-1] == 4:
        target = (*(0 for _ in shape[:-1]), 2, -1)
        g.add("Reshape", [source, g.ints(*target)], (*shape[:-1], 2, 2))
    elif len(shape) == 3 and isinstance(shape[1], int) and isinstance(shape[2], int):
        g.add("Reshape", [source, g.ints(0, -1)], (shape[0], shape[1] * shape[2]))


def reshape_computed(g: Growing) -> None:
    """A Reshape to a shape that is read, taken apart and put together again."""
    source = g.pick(2, 3)
    shape = g.shapes[source]
    if not isinstance(shape[-1], int):
        return
    known = f"s{len(g.nodes)}"
    g.nodes.append(helper.make_node("Shape", [source], [known]))
    g.nodes.append(helper.make_node("Slice", [known, g.ints(0), g.ints(-1)], [known + "f"]))
    parts = [known + "f", g.ints(1), g.ints(shape[-1])]
    g.nodes.append(helper.make_node("Concat", parts, [known + "t"], axis=0))
    g.add("Reshape", [source, known + "t"], (*shape[:-1], 1, shape[-1]))


def squeeze(g: Growing) -> None:
    source = g.pick()
    shape = g.shapes[source]
    ones = [i for i, d in enumerate(shape) if d == 1]
    if ones:
        at = g.data.draw(st.sampled_from(ones))
        g.add("Squeeze", [source, g.ints(at)], (*shape[:at], *shape[at + 1 :]))
    elif len(shape) < 4:
        at = g.number(0, len(shape))
        g.add("Unsqueeze", [source, g.ints(at)], (*shape[:at], 1, *shape[at:]))


def concat(g: Growing) -> None:
    source = g.pick(2, 3)
    shape = g.shapes[source]
    axis = len(shape) - 1
    same = [n for n, s in g.shapes.items() if s == shape]
    other = g.data.draw(st.sampled_from(same))
    if isinstance(shape[-1], int) and shape[-1] < 9:
        g.add("Concat", [source, other], (*shape[:-1], shape[-1] * 2), axis=axis)


def cut(g: Growing) -> None:
    """A Slice, perhaps backwards or with steps, or a Gather along the last dimension."""
    source = g.pick(2, 3)
    shape = g.shapes[source]
    width = shape[-1]
    if not isinstance(width, int) or width < 2:
        return
    front = shape[:-1]
    if g.number(0, 1):
        places = [g.number(-width, width - 1) for _ in range(g.number(1, 3))]
        operands = [source, g.ints(*places)]
        g.add("Gather", operands, (*front, len(places)), axis=-1)
        return
    start, step = g.number(0, width - 1), g.number(1, 2)
    bounds = (start, 2**62, step) if g.number(0, 1) else (-1, -(2**62), -step)
    length = len(range(width)[slice(*bounds)])
    operands = [source, *(g.ints(n) for n in (*bounds[:2], -1, bounds[2]))]
    g.add("Slice", operands, (*front, length))


def choose(g: Growing) -> None:
    source = g.pick()
    shape = g.shapes[source]
    mask = f"m{len(g.nodes)}"
    op = g.data.draw(st.sampled_from(COMPARISONS))
    g.nodes.append(helper.make_node(op, [source, g.weight()], [mask]))
    g.add("Where", [mask, source, g.weight()], shape)


def round_trip(g: Growing) -> None:
    """Through another type and back."""
    source = g.pick()
    middle = f"h{len(g.nodes)}"
    kind = g.data.draw(st.sampled_from((onnx.TensorProto.DOUBLE, onnx.TensorProto.INT32)))
    g.nodes.append(helper.make_node("Cast", [source], [middle], to=kind))
    g.add("Cast", [middle], g.shapes[source], to=onnx.TensorProto.FLOAT)


def expand(g: Growing) -> None:
    source = g.pick(2, 3)
    shape = g.shapes[source]
    if shape[-1] == 1:
        operands = [source, g.ints(*(1 for _ in shape[:-1]), 3)]
        g.add("Expand", operands, (*shape[:-1], 3))
    elif isinstance(shape[-1], int) and shape[-1] < 9:
        operands = [source, g.ints(*(1 for _ in shape[:-1]), 2)]
        g.add("Tile", operands, (*shape[:-1], shape[-1] * 2))


GROWTHS: tuple[Callable[[Growing], None], ...] = (
    unary, unary, binary, binary, linear, linear, scores, reduce, norm, transpose, reshape,
    reshape_computed, squeeze, concat, cut, choose, round_trip, expand,
)  # fmt: skip


def grown(data: Draw) -> onnx.ModelProto:
    """A graph of 3 to 14 steps; its newest value is the output, and perhaps a second one."""
    g = Growing(data)
    g.shapes["x"] = ("batch", "seq", 4)
    for _ in range(g.number(3, 14)):
        data.draw(st.sampled_from(GROWTHS))(g)
    if not g.nodes:
        unary(g)
    made = [n for n in g.shapes if n.startswith("v")]
    names = list(dict.fromkeys((made[-1], data.draw(st.sampled_from(made)))))
    value = helper.make_tensor_value_info
    outputs = [value(n, onnx.TensorProto.FLOAT, None) for n in names]
    inputs = [value("x", onnx.TensorProto.FLOAT, ["batch", "seq", 4])]
    graph = helper.make_graph(g.nodes, "g", inputs, outputs, g.held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)


@settings(
    max_examples=250, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(st.data())
def test_a_random_graph_is_right(data: Draw) -> None:
    model = grown(data)
    feeds = {"x": np.random.default_rng(0).normal(size=(BATCH, SEQ, 4)).astype(np.float32)}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model.SerializeToString())
        outcome = agree(path, feeds)
    assert not outcome.wrong, outcome.wrong
    assert outcome.fate in ("accepted", "ONNX Runtime does not run it"), outcome.fate


if __name__ == "__main__":
    pytest.main([__file__])
