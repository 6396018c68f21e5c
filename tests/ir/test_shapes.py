"""Symbolic shapes: the algebra against integers, and whole graphs against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfmc.ingest.load import load
from pfmc.ir import shapes
from pfmc.ir.shapes import Dim, Shapes

ZOO = Path(__file__).resolve().parents[3] / "shared" / "zoo"
SIZES = {"a": 3, "b": 5, "c": 7}


def _dims() -> st.SearchStrategy[Dim]:
    atoms = st.one_of(st.integers(0, 9), st.sampled_from("abc").map(shapes.symbol))
    two = (shapes.add, shapes.multiply)
    return st.recursive(
        atoms,
        lambda d: st.builds(lambda f, x, y: f(x, y), st.sampled_from(two), d, d),
        max_leaves=5,
    )


@given(_dims(), _dims())
def test_sums_and_products(x: Dim, y: Dim) -> None:
    a, b = shapes.value_at(x, SIZES), shapes.value_at(y, SIZES)
    assert shapes.value_at(shapes.add(x, y), SIZES) == a + b
    assert shapes.value_at(shapes.multiply(x, y), SIZES) == a * b
    assert shapes.add(x, y) == shapes.add(y, x)
    assert shapes.multiply(x, y) == shapes.multiply(y, x)


@given(_dims(), _dims())
def test_a_product_divides_exactly(x: Dim, y: Dim) -> None:
    if y != 0:
        assert shapes.divide(shapes.multiply(x, y), y) == x


@given(_dims(), _dims())
def test_a_quotient_that_is_given_is_right(x: Dim, y: Dim) -> None:
    found = shapes.divide(x, y)
    if found is not None and not (isinstance(x, int) and isinstance(y, int)):
        assert shapes.multiply(found, y) == x


def test_no_quotient_where_none_is_exact() -> None:
    a, b = shapes.symbol("a"), shapes.symbol("b")
    assert shapes.divide(a, b) is None
    assert shapes.divide(a, 2) is None
    assert shapes.divide(shapes.add(a, 1), a) is None
    assert shapes.divide(7, 2) == 3


@pytest.mark.parametrize(
    ("written", "read"),
    [("12", 12), ("batch", "batch"), ("past + 1", "past + 1"), ("1 + past", "past + 1")],
)
def test_parse(written: str, read: object) -> None:
    found = shapes.parse(ir.SymbolicDim(written))
    assert (found if isinstance(found, int) else str(found)) == read


def test_broadcast() -> None:
    a, b = shapes.symbol("a"), shapes.symbol("b")
    assert shapes.broadcast([(a, 1, 4), (3, 4)]) == (a, 3, 4)
    assert shapes.broadcast([(a,), (a,)]) == (a,)
    assert shapes.broadcast([(a,), (b,)]) is None


def _sizes(dims: list[shapes.Dims]) -> dict[str, int]:
    names = sorted(set().union(*(shapes.symbols_of(d) for d in dims)))
    return {n: s for n, s in zip(names, (2, 5, 6, 3), strict=False)}


@pytest.mark.parametrize(
    "name", ["llama__ts", "llama__t_dyn", "gpt2__ts", "bert__ts", "mistral__h_dyn", "vit__ts"]
)
def test_every_shape_is_what_onnx_runtime_computes(name: str) -> None:
    """All values are made outputs, run once, and their shapes compared at those lengths."""
    if not (ZOO / f"{name}.onnx").is_file():
        pytest.skip("the zoo of tiny models is absent")
    model = load(ZOO / f"{name}.onnx").model
    known = Shapes(model.graph)
    sizes = _sizes([known.shape(v) or () for v in model.graph.inputs])
    feeds = {}
    for value in model.graph.inputs:
        dims = [shapes.value_at(d, sizes) for d in known.shape(value) or ()]
        feeds[value.name] = np.ones(dims, value.dtype.numpy())
    if "s43" in sizes and "s72" in sizes:  # two names for one batch
        sizes["s72"] = sizes["s43"]
        feeds = {n: np.ones((sizes["s43"], sizes["s53"]), np.int64) for n in feeds}
    proto = ir.to_proto(model)
    wanted = {v.name: v for n in model.graph for v in n.outputs if known.shape(v) is not None}
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in wanted)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    checked = 0
    for name_, array in zip(wanted, session.run(list(wanted), feeds), strict=True):
        dims = known.shape(wanted[name_]) or ()
        if shapes.symbols_of(dims) <= set(sizes):
            assert tuple(shapes.value_at(d, sizes) for d in dims) == array.shape, name_
            checked += 1
        content = known.content(wanted[name_])
        if content is not None and shapes.symbols_of(content) <= set(sizes):
            got = [shapes.value_at(d, sizes) for d in content]
            assert got == array.reshape(-1).tolist(), name_
    assert checked >= 0.95 * len(wanted)
