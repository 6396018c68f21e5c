"""Folding removes what is constant or idle, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from pfmc.passes.fold import Fold

Floats = Callable[..., np.ndarray]


@pytest.mark.parametrize(
    "idle",
    [
        "h = Identity(x)",
        "h = Cast<to=1>(x)",
        "h = Dropout(x)",
        "h = Transpose<perm=[0,1]>(x)",
        "h = Concat<axis=0>(x)",
        "h = Mul(x, one)",
        "h = Add(x, zero)",
        "k = Identity(x) h = Identity(k)",
    ],
)
def test_idle_nodes_go(lab: Any, floats: Floats, idle: str) -> None:
    constants = {"one": np.float32(1), "zero": np.float32(0)}
    used = {n: np.asarray(v) for n, v in constants.items() if f" {n})" in idle}
    model = lab.make(f"(float[B,4] x) => (float[B,4] y) {{ {idle} y = Neg(h) }}", **used)
    lab.same(model, [Fold()], {"x": floats(2, 4)})
    assert lab.counts(model) == {"Neg": 1}


def test_a_neutral_vector_that_broadcasts_stays(lab: Any, floats: Floats) -> None:
    text = "(float[B,1] x) => (float[B,4] y) { y = Mul(x, one) }"
    model = lab.make(text, one=np.ones(4, np.float32))
    lab.same(model, [Fold()], {"x": floats(2, 1)})
    assert lab.counts(model) == {"Mul": 1}


def test_identity_between_input_and_output_stays(lab: Any, floats: Floats) -> None:
    model = lab.make("(float[B,4] x) => (float[B,4] y) { y = Identity(x) }")
    lab.same(model, [Fold()], {"x": floats(2, 4)})


def test_constants_are_computed_in_a_chain(lab: Any, floats: Floats) -> None:
    body = "c = Constant<value_floats=[1.0, 2.0]>() d = Add(c, e) f = Mul(d, d) y = Add(x, f)"
    model = lab.make(f"(float[B,2] x) => (float[B,2] y) {{ {body} }}", e=floats(2))
    lab.same(model, [Fold()], {"x": floats(3, 2)})
    assert lab.counts(model) == {"Add": 1}
    assert list(model.graph.initializers) == ["f"]


def test_large_constants_stay_lazy(lab: Any, floats: Floats) -> None:
    text = "(float[64,200] x) => (float[64,200] y) { s = Mul(w, w) y = Add(x, s) }"
    model = lab.make(text, w=floats(64, 200))
    lab.same(model, [Fold(largest=1024)], {"x": floats(64, 200)})
    assert lab.counts(model) == {"Mul": 1, "Add": 1}


def test_the_source_weight_is_not_touched(lab: Any, floats: Floats) -> None:
    text = "(float[B,6] x) => (float[B,4] y, float[B,6] z) {"
    text += " t = Transpose<perm=[1,0]>(w) y = MatMul(x, t) z = MatMul(y, w) }"
    weight = floats(4, 6)
    model = lab.make(text, w=weight)
    lab.same(model, [Fold()], {"x": floats(2, 6)})
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), weight)
    lazy = model.graph.initializers["w:lazy"].const_value
    assert isinstance(lazy, ir.LazyTensor)
    np.testing.assert_array_equal(lazy.numpy(), weight.T)


def test_random_numbers_are_not_folded(lab: Any) -> None:
    text = "() => (float[2] y) { y = RandomUniformLike<seed=1.0>(c) }"
    model = lab.make(text, c=np.zeros(2, np.float32))
    lab.apply(model, [Fold()])
    assert lab.counts(model) == {"RandomUniformLike": 1}


def test_a_large_weight_norm_becomes_one_lazy_constant(lab: Any, floats: Floats) -> None:
    """wav2vec2 keeps direction and length of a kernel apart: ``v * (g / |v|)``."""
    text = """(float[2,8,9] x) => (float[2,64,7] y) {
        n = ReduceL2<keepdims=1>(v, axes) r = Div(g, n) w = Mul(v, r) y = Conv(x, w)
    }"""
    model = lab.make(
        text, v=floats(64, 8, 3), g=floats(64, 1, 1), axes=np.array([1, 2], np.int64)
    )
    shapes = {"n": (64, 1, 1), "r": (64, 1, 1), "w": (64, 8, 3)}
    for node in model.graph:
        if (shape := shapes.get(str(node.outputs[0].name))) is not None:
            node.outputs[0].shape = ir.Shape(shape)
    lab.same(model, [Fold(largest=64)], {"x": floats(2, 8, 9)})
    assert lab.counts(model) == {"Conv": 1}
    assert isinstance(model.graph[0].inputs[1].const_value, ir.LazyTensor)


def test_views_of_a_slice_read_no_more_than_the_slice(lab: Any, floats: Floats) -> None:
    text = """(float[N,4] x) => (float[N,6] y) {
        a, b = Split<axis=0, num_outputs=2>(w) c = Squeeze(b, zero)
        d = Transpose<perm=[1,0]>(c) y = MatMul(x, d)
    }"""
    model = lab.make(text, w=floats(2, 6, 4), zero=np.array([0], np.int64))
    lab.same(model, [Fold(largest=8)], {"x": floats(3, 4)})
    assert lab.counts(model) == {"MatMul": 1}
    assert model.graph[0].inputs[1].meta["pfmc.slice"] == 1
