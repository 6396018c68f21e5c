"""Every product with a constant becomes a fixed linear, lazily, and the numbers stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from pfmc.ir import vocabulary
from pfmc.passes.fold import Fold
from pfmc.passes.linears import Linears

Floats = Callable[..., np.ndarray]


def _only(model: ir.Model) -> ir.Node:
    (node,) = vocabulary.fixed_linears(model)
    return node


@pytest.mark.parametrize("bias", ["y = Add(p, b)", "y = Add(b, p)", "y = Identity(p)"])
@pytest.mark.parametrize("shape", ["B,S,6", "B,6"])
def test_product_and_bias(lab: Any, floats: Floats, shape: str, bias: str) -> None:
    text = f"(float[{shape}] x) => (float[{shape[:-1]}4] y) {{ p = MatMul(x, w) {bias} }}"
    arrays = {"w": floats(6, 4)} | ({"b": floats(4)} if "b" in bias else {})
    model = lab.make(text, **arrays)
    x = floats(*([2, 3, 6] if "S" in shape else [2, 6]))
    assert lab.same(model, [Fold(), Linears()], {"x": x}) == []
    node = _only(model)
    assert lab.counts(model)["Add"] == lab.counts(model)["MatMul"] == 0
    assert node.metadata_props["pfmc.value"] == "y"
    np.testing.assert_array_equal(node.inputs[1].const_value.numpy(), arrays["w"])
    np.testing.assert_array_equal(node.inputs[2].const_value.numpy(), arrays.get("b", np.zeros(4)))


def test_value_is_the_product_if_the_sum_is_no_bias(lab: Any, floats: Floats) -> None:
    text = "(float[B,S,6] x, float[B,S,4] r) => (float[B,S,4] y) { p = MatMul(x, w) y = Add(p, r) }"
    model = lab.make(text, w=floats(6, 4))
    lab.same(model, [Linears()], {"x": floats(2, 3, 6), "r": floats(2, 3, 4)})
    assert _only(model).metadata_props["pfmc.value"] == "p"
    assert lab.counts(model)["Add"] == 1


def test_a_bias_that_others_read_before_is_kept(lab: Any, floats: Floats) -> None:
    text = "(float[B,6] x) => (float[B,4] y, float[B,4] p) { p = MatMul(x, w) y = Add(p, b) }"
    model = lab.make(text, w=floats(6, 4), b=floats(4))
    lab.same(model, [Linears()], {"x": floats(2, 6)})
    assert lab.counts(model)["Add"] == 1


def test_column_constant_is_no_bias(lab: Any, floats: Floats) -> None:
    text = "(float[3,6] x) => (float[3,4] y) { p = MatMul(x, w) y = Add(p, b) }"
    model = lab.make(text, w=floats(6, 4), b=floats(3, 1))
    lab.same(model, [Linears()], {"x": floats(3, 6)})
    assert lab.counts(model)["Add"] == 1


@pytest.mark.parametrize("call", ["MatMul(w, x)", "MatMul(x, w)"])
@pytest.mark.parametrize("rank", [2, 3])
def test_a_product_over_one_number_is_no_linear(
    lab: Any, floats: Floats, rank: int, call: str
) -> None:
    shape = (1, 4, 1) if "(w" in call else (1, 1, 4)
    sizes = "B,1,5" if "(w" in call else "B,5,1"
    result = "B,4,5" if "(w" in call else "B,5,4"
    model = lab.make(f"(float[{sizes}] x) => (float[{result}] y) {{ y = {call} }}",
                     w=floats(*shape[3 - rank :]))  # fmt: skip
    lab.same(model, [Linears()], {"x": floats(*((2, 1, 5) if "(w" in call else (2, 5, 1)))})
    assert lab.counts(model) == {"Mul": 1}


def test_constant_on_the_left(lab: Any, floats: Floats) -> None:
    text = "(float[B,6,5] x) => (float[B,4,5] y) { y = MatMul(w, x) }"
    model = lab.make(text, w=floats(4, 6))
    lab.same(model, [Linears()], {"x": floats(2, 6, 5)})
    node = _only(model)
    assert node.metadata_props["pfmc.perm"] == "0 2 1"
    assert lab.counts(model) == {"Transpose": 2, "FixedLinear": 1}


@pytest.mark.parametrize("a", [0, 1])
@pytest.mark.parametrize("b", [0, 1])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("c", [(), (4,), (1, 4), (1,)])
def test_gemm(
    lab: Any, floats: Floats, a: int, b: int, alpha: float, beta: float, c: tuple[int, ...]
) -> None:
    options = f"transA={a}, transB={b}, alpha={alpha}, beta={beta}"
    shape = "6,3" if a else "3,6"
    text = f"(float[{shape}] x) => (float[3,4] y) {{ y = Gemm<{options}>(x, w, c) }}"
    model = lab.make(text, w=floats(4, 6) if b else floats(6, 4), c=floats(*c))
    lab.same(model, [Linears()], {"x": floats(6, 3) if a else floats(3, 6)})
    assert lab.counts(model) == ({"Transpose": 1, "FixedLinear": 1} if a else {"FixedLinear": 1})


def test_gemm_with_a_matrix_added(lab: Any, floats: Floats) -> None:
    text = "(float[3,6] x, float[3,4] c) => (float[3,4] y) { y = Gemm<beta=0.5>(x, w, c) }"
    model = lab.make(text, w=floats(6, 4))
    lab.same(model, [Linears()], {"x": floats(3, 6), "c": floats(3, 4)})
    assert lab.counts(model) == {"FixedLinear": 1, "Mul": 1, "Add": 1}
    assert "pfmc.value" not in _only(model).metadata_props


def test_transposed_weight_stays_lazy(lab: Any, floats: Floats) -> None:
    text = "(float[B,6] x) => (float[B,4] y) { t = Transpose<perm=[1,0]>(w) y = MatMul(x, t) }"
    model = lab.make(text, w=floats(4, 6))
    lab.same(model, [Fold(), Linears()], {"x": floats(2, 6)})
    assert isinstance(_only(model).inputs[1].const_value, ir.LazyTensor)
    assert lab.counts(model) == {"FixedLinear": 1}


def test_dequantised_weight(lab: Any, floats: Floats, rng: np.random.Generator) -> None:
    text = (
        "(float[B,6] x) => (float[B,4] y)"
        " { w = DequantizeLinear<axis=1>(codes, scale) y = MatMul(x, w) }"
    )
    codes = rng.integers(-127, 128, (6, 4)).astype(np.int8)
    model = lab.make(text, codes=codes, scale=np.abs(floats(4)))
    lab.same(model, [Fold(), Linears()], {"x": floats(2, 6)}, 1e-4)
    assert lab.counts(model) == {"FixedLinear": 1}


@pytest.mark.parametrize("image", [8, 9])
@pytest.mark.parametrize("bias", [True, False])
def test_patch_embedding(lab: Any, floats: Floats, image: int, bias: bool) -> None:
    arguments = "x, w, b" if bias else "x, w"
    text = (
        f"(float[B,3,{image},{image}] x) => (float[B,4,5] y)"
        f" {{ c = Conv<strides=[4,4]>({arguments})"
        " r = Reshape(c, shape) y = Transpose<perm=[0,2,1]>(r) }"
    )
    arrays = {"w": floats(5, 3, 4, 4), "shape": np.array([-1, 5, 4], np.int64)}
    model = lab.make(text, **arrays, **({"b": floats(5)} if bias else {}))
    lab.same(model, [Linears()], {"x": floats(2, 3, image, image)})
    node = _only(model)
    assert node.metadata_props["pfmc.value"] == "y"
    assert lab.counts(model)["Conv"] == 0
    assert tuple(node.inputs[1].const_value.shape) == (48, 5)


@pytest.mark.parametrize("kernel", [1, 2])
def test_convolution_as_linear(lab: Any, floats: Floats, kernel: int) -> None:
    size = 6 // kernel
    text = (
        f"(float[B,3,6,6] x) => (float[B,5,{size},{size}] y)"
        f" {{ y = Conv<strides=[{kernel},{kernel}]>(x, w, b) }}"
    )
    model = lab.make(text, w=floats(5, 3, kernel, kernel), b=floats(5))
    lab.same(model, [Linears()], {"x": floats(2, 3, 6, 6)})
    assert _only(model).metadata_props["pfmc.perm"] == "0 3 1 2"


def test_a_constant_of_rank_three_is_declined(lab: Any, floats: Floats) -> None:
    text = "(float[N,3,6] x) => (float[N,3,4] y) { y = MatMul(x, w) }"
    model = lab.make(text, w=floats(2, 6, 4))
    declined = lab.same(model, [Linears()], {"x": floats(2, 3, 6)})
    assert declined[0].reason == "constant factor of rank 3, not a matrix"
