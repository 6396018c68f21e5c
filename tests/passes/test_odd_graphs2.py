"""More graphs that no exporter writes: operands of other types, ranks, counts and magnitudes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from pfmc.errors import InputError
from pfmc.ingest.load import load
from pfmc.passes import pipeline, recipe

from ..ingest.agreement import agree

Floats = Callable[..., np.ndarray]
F32 = np.float32

QKV = "float[1,2,4,8] q, float[1,2,4,8] k, float[1,2,4,8] v"
HEAD = "n = Neg(k) kt = Transpose<perm=[0,1,3,2]>(n) s = MatMul(q, kt)"
TAIL = "p = Softmax<axis=-1>(t) w = Neg(v) y = MatMul(p, w)"
EXPERTS = "g = Gather(stack, w) p = MatMul(x, g) q = Squeeze(p, one)"
TEXTS = {
    "a norm rounded to integers": """(int64[2,8] x) => (int64[2,8] y) {
        f = Cast<to=1>(x) a = Mul(f, f) b = ReduceMean(a, last) c = Add(b, eps) d = Sqrt(c)
        n = Div(f, d) i = Cast<to=7>(n) y = Mul(i, gain) }""",
    "hidden scores made small": f"""({QKV}, bool[4,4] m) => (float[1,2,4,8] y) {{
        {HEAD} h = Where(m, low, s) t = Mul(h, tiny) {TAIL} }}""",
    "hidden scores in a sum made small": f"""({QKV}, bool[4,4] m) => (float[1,2,4,8] y) {{
        {HEAD} z = Where(m, low, nought) h = Add(s, z) t = Mul(h, tiny) {TAIL} }}""",
    "scores scaled beyond float32": f"""({QKV}) => (float[1,2,4,8] y) {{
        {HEAD} a = Mul(s, tinier) t = Mul(a, tinier) {TAIL} }}""",
    "neighbours turned and rows moved": """(float[2,6,8] x, float[6,4] c, float[6,4] s)
        => (float[3,4,8] y) {
        e = Slice(x, zero, eight, last, two) o = Slice(x, one, eight, last, two)
        ec = Mul(e, c) os = Mul(o, s) oc = Mul(o, c) es = Mul(e, s) a = Sub(ec, os)
        b = Add(oc, es) u = Unsqueeze(a, last) v = Unsqueeze(b, last)
        t = Concat<axis=-1>(u, v) y = Reshape(t, moved) }""",
    "a vector of keys, scaled by head": """(float[3,8] q, float[8] k) => (float[2,1,3] y) {
        s = MatMul(q, k) t = Mul(s, heads) y = Softmax(t) }""",
    "a guard of five axes": """(float[1,2,n,8] q) => (float[1,1,2,n,8] y) {
        kt = Transpose<perm=[0,1,3,2]>(q) s = MatMul(q, kt) p = Softmax<axis=-1>(s) w = Neg(q)
        o = MatMul(p, w) rows = Shape<start=2, end=3>(q) size = Concat<axis=0>(ones, rows, one)
        empty = Expand(never, size) y = Where(empty, five, o) }""",
    "more biases than experts": f"""(int64[3] w, float[3,1,8] x) => (float[3,6] y) {{
        {EXPERTS} h = Gather(biases, w) y = Add(q, h) }}""",
    "biases gathered along their width": f"""(int64[6] w, float[6,1,8] x) => (float[6,6] y) {{
        {EXPERTS} h = Gather<axis=1>(square, w) y = Add(q, h) }}""",
    "an attention thrice causal": """(float[1,2,4,8] q) => (float[1,2,4,8] y) {
        k = Neg(q) v = Abs(q) y = Attention<is_causal=3>(q, k, v) }""",
    "a kept axis of minus one": """(float[2,3] x) => (float[2] y) {
        y = ReduceSum<keepdims=-1>(x, last) }""",
}  # fmt: skip
DECLINED = {
    "a convolution with a bias of its own": """(float[1,3,4,4] x, float[2] b)
        => (float[1,2,2,2] y) { y = Conv<strides=[2,2]>(x, kernel, b) }""",
    "experts without elements": """(int64[3] w, float[3,1,8] x) => (float[3,1,6] y) {
        g = Gather(no_stack, w) y = MatMul(x, g) }""",
    "rows broadcast over gathered experts": """(int64[3] w, float[1,1,8] x)
        => (float[3,1,6] y) { g = Gather(stack, w) y = MatMul(x, g) }""",
    "an einsum over a stretched label": """(float[2,1] a, float[5,3] b) => (float[2,3] y) {
        y = Einsum<equation="ij,jk->ik">(a, b) }""",
}  # fmt: skip


def _held() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    numbers: dict[str, Any] = {
        "last": [-1], "zero": [0], "one": [1], "two": [2], "eight": [8], "moved": [3, 4, 8],
        "ones": [1, 1], "gain": np.arange(8), "eps": F32(1e-5), "low": F32(-1e4),
        "tiny": F32(1e-4), "tinier": F32(1e-30), "nought": F32(0),
        "heads": np.array([[[1]], [[2]]], F32), "never": np.zeros((1, 1, 1, 1), bool),
        "five": np.zeros((1,) * 5, F32), "no_stack": np.zeros((0, 8, 6), F32),
        "stack": rng.normal(size=(4, 8, 6)).astype(F32),
        "biases": rng.normal(size=(5, 6)).astype(F32),
        "square": rng.normal(size=(6, 6)).astype(F32),
        "kernel": rng.normal(size=(2, 3, 2, 2)).astype(F32),
    }  # fmt: skip
    return {name: np.asarray(value) for name, value in numbers.items()}


def _saved(text: str, to: Path, held: dict[str, np.ndarray]) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 23]> g {text}')
    inputs = {v.name for v in model.graph.input}
    read = {name for node in model.graph.node for name in node.input} - inputs
    tensors = [numpy_helper.from_array(a, n) for n, a in held.items() if n in read]
    model.graph.initializer.extend(tensors)
    to.write_bytes(model.SerializeToString())
    return model


def _canonical(path: Path) -> Any:
    return pipeline.canonicalise(load(path).model, recipe.load("stream").passes).model


def _feeds(model: onnx.ModelProto, floats: Floats) -> dict[str, np.ndarray]:
    feeds = {}
    for value in model.graph.input:
        kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        shape = [d.dim_value or 5 for d in value.type.tensor_type.shape.dim]
        array = floats(*shape)
        feeds[value.name] = array > 0 if kind.kind == "b" else array.astype(kind)
        if kind == np.int64:
            feeds[value.name] = np.arange(array.size).reshape(shape) % 4
    return feeds


@pytest.mark.parametrize("title", TEXTS)
def test_what_it_computes_stays(title: str, tmp_path: Path, floats: Floats) -> None:
    path = tmp_path / "m.onnx"
    model = _saved(TEXTS[title], path, _held())
    outcome = agree(path, _feeds(model, floats))
    assert (outcome.fate, outcome.wrong) == ("accepted", "")


@pytest.mark.parametrize("title", DECLINED)
def test_what_is_no_such_thing_is_refused(title: str, tmp_path: Path) -> None:
    _saved(DECLINED[title], path := tmp_path / "m.onnx", _held())
    with pytest.raises(InputError, match=r"cannot be|no matrix|weights gathered"):
        _canonical(path)


def test_codes_whose_scale_is_an_output_too(tmp_path: Path) -> None:
    text = """(float[2,8] x) => (float[2,4] y, float[4] z) {
        z = Identity(scale) w = DequantizeLinear<axis=1>(codes, z) y = MatMul(x, w) }"""
    codes, scale = np.arange(32).reshape(8, 4).astype(np.int8), np.arange(4, dtype=F32)
    path = tmp_path / "m.onnx"
    _saved(text, path, {"codes": codes, "scale": scale})
    (linear,) = [n for n in _canonical(path).graph if n.op_type == "FixedLinear"]
    np.testing.assert_array_equal(linear.inputs[1].const_value.numpy(), codes * scale)


# -- on which onnx's shape inference ends the process ----------------------------------------------


@pytest.mark.parametrize("parts", [1, 0, 1 << 40])
def test_a_split_into_another_number_of_parts(parts: int, tmp_path: Path) -> None:
    text = "(float[6] x) => (float[3] y, float[3] z) { y, z = Split<num_outputs=NUMBER>(x) }"
    _saved(text.replace("NUMBER", str(parts)), path := tmp_path / "m.onnx", {})
    with pytest.raises(InputError, match="num_outputs of a Split"):
        load(path)


@pytest.mark.parametrize("axis", [1 << 31, (1 << 63) - 1, -(1 << 63)])
def test_a_norm_along_an_axis_far_away(axis: int, tmp_path: Path) -> None:
    text = (
        "(float[2,3] x, float[3] g) => (float[2,3] y) { y = LayerNormalization<axis=NUMBER>(x, g) }"
    )
    _saved(text.replace("NUMBER", str(axis)), path := tmp_path / "m.onnx", {})
    with pytest.raises(InputError, match="axis of a LayerNormalization"):
        load(path)


@pytest.mark.parametrize("step", [1 << 31, (1 << 63) - 1, 1 << 62, -(1 << 31) - 1])
@pytest.mark.parametrize("made", [False, True], ids=["held", "made"])
def test_a_slice_in_steps_beyond_int32(step: int, made: bool, tmp_path: Path) -> None:
    source = "t = Mul(step, one)" if made else "t = Identity(step)"
    text = f"""(float[8] x) => (float[n] y) {{
        {source} s = Slice(x, start, end, zero, t) y = Relu(s) }}"""
    ends = (7, -9) if step < 0 else (1, 8)
    held = {"step": [step], "one": [1], "zero": [0], "start": ends[:1], "end": ends[1:]}
    _saved(text, path := tmp_path / "m.onnx", {n: np.array(a) for n, a in held.items()})
    assert [str(v.name) for v in _canonical(path).graph.outputs] == ["y"]
