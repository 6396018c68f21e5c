"""Graphs that no exporter writes, and that a careless rewrite would change or choke on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from pfmc.errors import InputError
from pfmc.ingest.load import load
from pfmc.passes import pipeline, recipe

Floats = Callable[..., np.ndarray]

QKV = "float[1,2,4,8] q, float[1,2,4,8] k, float[1,2,4,8] v"
HEAD = "kt = Transpose<perm=[0,1,3,2]>(k) s = MatMul(q, kt)"
TAIL = "p = Softmax<axis=-1>(t) y = MatMul(p, v)"
TEXTS = {
    "the last part of a split is shorter": """(float[7] x) => (float[1,7] y) {
        a, b = Split<num_outputs=2>(x) c = Reshape(a, row) d = Reshape(b, row)
        y = Concat<axis=1>(c, d) }""",
    "no axes to sum over are all": """(float[2,3] x, float[1] z) => (float[1,1] y) {
        r = ReduceSum(x, none) s = Shape(r) y = Reshape(z, s) }""",
    "lengths gathered as a matrix": """(float[n,3] x) => (float[2,1] y) {
        s = Shape(x) g = Gather(s, places) r = Cast<to=1>(g) y = Transpose<perm=[1,0]>(r) }""",
    "steps known at run time": """(float[8] x, int64[1] two) => (float[m] y) {
        s = Slice(x, zero, eight, zero, two) y = Reshape(s, minus) }""",
    "a half of four axes": """(float[2,3] x) => (float[1,1,2,3] y) {
        a = Div(x, root) b = Erf(a) c = Add(b, one) d = Mul(x, c) y = Mul(d, half) }""",
    "a gain of four axes": """(float[2,3] x) => (float[1,1,2,3] y) {
        a = Mul(x, x) b = ReduceMean(a, minus) c = Add(b, one) d = Sqrt(c) e = Div(x, d)
        y = Mul(e, gain) }""",
    "a floor of four axes": """(float[4,8] q, float[8,4] k, float[1,1,4,8] v)
        => (float[1,1,4,8] y) {
        s = MatMul(q, k) t = Max(s, low) p = Softmax<axis=-1>(t) y = MatMul(p, v) }""",
    "one row of queries and a mask of six": f"""(float[1,2,1,8] q, float[1,2,4,8] k,
        float[1,2,4,8] v, float[1,1,6,4] m) => (float[1,2,6,8] y) {{
        {HEAD} t = Add(s, m) {TAIL} }}""",
    "one batch of scores and a mask of three": f"""({QKV}, float[3,1,4,4] m)
        => (float[3,2,4,8] y) {{ {HEAD} t = Add(s, m) {TAIL} }}""",
    "one batch of queries": f"""(float[1,2,4,8] q, float[3,2,4,8] k, float[3,2,4,8] v)
        => (float[3,2,4,8] y) {{ {HEAD} t = Add(s, quarter) {TAIL} }}""",
    "one batch of values": f"""(float[3,2,4,8] q, float[3,2,4,8] k, float[1,2,4,8] v)
        => (float[3,2,4,8] y) {{ {HEAD} t = Add(s, quarter) {TAIL} }}""",
    "flat heads and values of one": """(float[4,5,8] q, float[4,8,5] k, float[1,5,8] v)
        => (float[4,5,8] y) {
        s = MatMul(q, k) p = Softmax<axis=-1>(s) y = MatMul(p, v) }""",
    "flat heads and keys of one": """(float[4,5,8] q, float[1,8,5] k, float[4,5,8] v)
        => (float[4,5,8] y) {
        s = MatMul(q, k) p = Softmax<axis=-1>(s) y = MatMul(p, v) }""",
    "flat heads and constant keys": """(float[4,5,8] q, float[2,2,5,8] v)
        => (float[2,2,5,8] y) {
        s = MatMul(q, keys) t = Reshape(s, wide) p = Softmax<axis=-1>(t) y = MatMul(p, v) }""",
    "weights cast to double": """(float[4,5,8] q, float[4,8,5] k, double[4,5,8] v)
        => (double[4,5,8] y) {
        s = MatMul(q, k) p = Softmax<axis=-1>(s) d = Cast<to=11>(p) y = MatMul(d, v) }""",
    "the maximum of another axis than the softmax's": f"""({QKV}, float[1,2,4,1] z)
        => (float[1,2,4,8] y) {{ {HEAD} m = Add(s, past) j = Concat<axis=-1>(m, z)
        peak = ReduceMax(j, two) t = Sub(j, peak) p = Softmax<axis=-1>(t)
        c = Slice(p, zero, minus, three) y = MatMul(c, v) }}""",
    "an attention guarded and read": """(float[1,2,n,8] q)
        => (float[1,2,n,8] o, float[1,2,n,8] y) {
        kt = Transpose<perm=[0,1,3,2]>(q) s = MatMul(q, kt) p = Softmax<axis=-1>(s) w = Neg(q)
        o = MatMul(p, w) rows = Shape<start=2, end=3>(q) size = Concat<axis=0>(ones, rows, last)
        empty = Expand(never, size) y = Where(empty, nought, o) }""",
    "a softmax squared": f"""({QKV}) => (float[1,2,4,4] y) {{
        {HEAD} p = Softmax<axis=-1>(s) y = MatMul(p, p) }}""",
    "points of an image of unknown size": """(float[1,2,h,w] x) => (float[1,m,3] y) {
        c = Conv(x, points) f = Reshape(c, flat) y = Transpose<perm=[0,2,1]>(f) }""",
    "a softmax reshaped to fewer axes": """(float[1,4,8] x) => (float[4,8] y) {
        f = Flatten<axis=2>(x) p = Softmax<axis=1>(f) s = Shape<start=1>(x)
        y = Reshape(p, s) }""",
}  # fmt: skip
SIZES = {"n": 5, "m": 4, "h": 3, "w": 2}
HELD: dict[str, Any] = {
    "row": [1, -1], "none": np.zeros(0, np.int64), "places": [[0, 1]], "zero": [0], "eight": [8],
    "minus": [-1], "three": [3], "wide": [2, 2, 5, 5], "flat": [0, 3, -1],
    "root": np.float32(2**0.5), "one": np.float32(1), "half": np.full((1,) * 4, 0.5, np.float32),
    "gain": np.ones((1, 1, 1, 3), np.float32), "low": np.full((1,) * 4, -3e38, np.float32),
    "quarter": np.float32(0.25), "keys": np.ones((8, 5), np.float32), "nought": np.float32(0),
    "past": np.triu(np.full((4, 4), -np.inf, np.float32), 1),
    "never": np.zeros((1, 1, 1, 1), bool), "ones": [1, 1], "last": [1],
    "points": np.arange(6, dtype=np.float32).reshape(3, 2, 1, 1),
    "two": [2],
}  # fmt: skip


@pytest.mark.parametrize("title", TEXTS)
def test_what_it_computes_stays(title: str, lab: Any, floats: Floats) -> None:
    text = TEXTS[title]
    head = text.partition("=>")[0]
    words = set(text.replace("(", " ").replace(")", " ").replace(",", " ").split())
    own = {n for n in HELD if n in words and f"] {n}" not in head}
    model = lab.make(text, **{n: np.asarray(HELD[n]) for n in own})
    feeds: dict[str, np.ndarray] = {}
    for value in model.graph.inputs:
        shape = [d if isinstance(d, int) else SIZES[str(d)] for d in value.shape or ()]
        kind = value.dtype.numpy() if value.dtype is not None else np.float32
        integer = np.issubdtype(kind, np.integer)
        feeds[str(value.name)] = np.full(shape, 2, kind) if integer else floats(*shape).astype(kind)
    lab.same(model, lab.canonical, feeds)


# -- models too large for the corpus ---------------------------------------------------------------


def _canonical(nodes: list[Any], ends: dict[str, list[Any]], held: dict[str, Any], to: Any) -> Any:
    kind = onnx.TensorProto.FLOAT
    ins = [helper.make_tensor_value_info(n, kind, d) for n, d in ends.items()]
    outs = [helper.make_tensor_value_info("y", kind, None)]
    tensors = [numpy_helper.from_array(np.asarray(a), n) for n, a in held.items()]
    graph = helper.make_graph(nodes, "g", ins, outs, tensors)
    opsets = [helper.make_opsetid("", 23)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), to)
    return pipeline.canonicalise(load(to).model, recipe.load("stream").passes).model


HEADS = {"q": [1, 2, 4, 8], "k": [1, 2, 8, 4], "v": [1, 2, 4, 8], "m": [4, 4]}


def _attention(first: list[Any], scores: str, mask: str) -> list[Any]:
    return [
        helper.make_node("MatMul", ["q", "k"], ["s0"]),
        *first,
        helper.make_node("Add", [scores, mask], ["t"]),
        helper.make_node("Softmax", ["t"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "v"], ["y"]),
    ]


def _sums(stem: str, count: int, other: str = "") -> list[Any]:
    return [
        helper.make_node("Add", [f"{stem}{i}", other or f"{stem}{i}"], [f"{stem}{i + 1}"])
        for i in range(count)
    ]


def test_a_thousand_masks_are_added_to_the_scores(tmp_path: Any) -> None:
    nodes = _attention(_sums("s", 1200, "m"), "s1200", "m")
    model = _canonical(nodes, HEADS, {}, tmp_path / "m.onnx")
    assert "Softmax" in {n.op_type for n in model.graph}


@pytest.mark.parametrize("other", ["", "m"], ids=["doubled", "of a thousand"])
def test_a_mask_that_is_a_deep_sum(other: str, tmp_path: Any) -> None:
    count = 1200 if other else 60
    ends = {**HEADS, "n0": [4, 4]}
    nodes = _attention(_sums("n", count, other), "s0", f"n{count}")
    model = _canonical(nodes, ends, {}, tmp_path / "m.onnx")
    assert "Attention" in {n.op_type for n in model.graph}


def test_queries_scaled_a_thousand_times(tmp_path: Any) -> None:
    scaled = [helper.make_node("Mul", [f"q{i}", "c"], [f"q{i + 1}"]) for i in range(1200)]
    nodes = [
        *scaled,
        helper.make_node("MatMul", ["q1200", "k"], ["s"]),
        helper.make_node("Softmax", ["s"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "v"], ["y"]),
    ]
    ends: dict[str, list[Any]] = {"q0": [4, 5, 8], "k": [4, 8, 5], "v": [4, 5, 8]}
    model = _canonical(nodes, ends, {"c": np.float32(1.001)}, tmp_path / "m.onnx")
    assert sum(n.op_type == "Mul" for n in model.graph) >= 1000


@pytest.mark.parametrize("sums", ["a.b,c->", "..ab,cd->", "ab,cd-", "a...b...,cd->"])
def test_an_einsum_on_which_shape_inference_hangs(sums: str, tmp_path: Any) -> None:
    node = helper.make_node("Einsum", ["x", "z"], ["y"], equation=sums)
    with pytest.raises(InputError, match="equation of an Einsum is malformed"):
        _canonical([node], {"x": [2, 2], "z": [2, 2]}, {}, tmp_path / "m.onnx")


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint32])
@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_a_product_of_integers_is_no_fixed_linear(op: str, kind: Any, lab: Any) -> None:
    """ONNX has it and sums in the type itself; hardware holds real weights."""
    name = np.dtype(kind).name
    text = f"({name}[2,3] x) => ({name}[2,2] y) {{ y = {op}(x, w) }}"
    large = np.array([[1, 2], [3, 1 << 24], [(1 << 24) + 1, 6]], kind)  # no float32 holds it
    model = lab.make(text, w=large)
    feeds = {"x": np.arange(6, dtype=kind).reshape(2, 3)}
    steps = recipe.load("stream").passes
    with contextlib.suppress(InputError):  # a refusal is as good
        before = lab.run(model, feeds) if op == "MatMul" and kind != np.uint32 else None
        after = pipeline.canonicalise(model, steps).model
        assert "FixedLinear" not in {n.op_type for n in after.graph}
        if before is not None:
            np.testing.assert_array_equal(lab.run(after, feeds)["y"], before["y"])


@pytest.mark.parametrize("epsilon", [1e300, 1e-300])
def test_an_epsilon_beyond_float32(epsilon: float, lab: Any) -> None:
    text = """(double[2,4] x) => (double[2,4] y) {
        s = Mul(x, x) m = ReduceMean<keepdims=1>(s, axes) a = Add(m, eps) r = Sqrt(a)
        d = Div(x, r) y = Mul(d, gain) }"""
    held = {"axes": np.array([-1]), "eps": np.array(epsilon), "gain": np.arange(1.0, 5.0)}
    x = np.array([[1e150, 2e150, -3e150, 4e150], [0, 0, 0, 0]])
    lab.same(lab.make(text, **held), lab.canonical, {"x": x})
    model = lab.make(text, **held)
    lab.apply(model, lab.canonical)
    assert "RMSNormalization" not in {n.op_type for n in model.graph}
