"""The matcher: commutativity, foreign readers, looking through, and rewriting in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from pfmc.ir import matcher, provenance
from pfmc.ir.matcher import Constant, Either, Op, Scalar, Var


def _graph(text: str, **arrays: Any) -> ir.Graph:
    proto = onnx.parser.parse_graph(f"g {text}")
    proto.initializer.extend(
        numpy_helper.from_array(np.asarray(a, np.float32), n) for n, a in arrays.items()
    )
    model = ir.from_proto(onnx.helper.make_model(proto))
    provenance.stamp(model)
    return model.graph


def _found(graph: ir.Graph, pattern: Op) -> list[dict[str, str | None]]:
    return [{k: v.name for k, v in m.values.items()} for m in matcher.find(graph, pattern)]


SILU = Op("Mul", (Var("x"), Op("Sigmoid", (Var("x"),))))


@pytest.mark.parametrize("product", ["y = Mul(x, s)", "y = Mul(s, x)"])
def test_commutative(product: str) -> None:
    graph = _graph(f"(float[4] x) => (float[4] y) {{ s = Sigmoid(x) {product} }}")
    assert _found(graph, SILU) == [{"x": "x"}]


def test_not_commutative() -> None:
    graph = _graph("(float[4] x) => (float[4] y) { s = Sigmoid(x) y = Div(s, x) }")
    assert _found(graph, Op("Div", (Var("x"), Op("Sigmoid", (Var("x"),))))) == []
    assert _found(graph, Op("Div", (Op("Sigmoid", (Var("x"),)), Var("x")))) == [{"x": "x"}]


def test_the_same_name_is_the_same_value() -> None:
    graph = _graph("(float[4] x, float[4] z) => (float[4] y) { s = Sigmoid(z) y = Mul(x, s) }")
    assert _found(graph, SILU) == []


def test_backtracking_over_both_orders() -> None:
    """Only the second order of the inner product, in the second of the outer, fits."""
    inner = Op("Mul", (Var("a"), Op("Neg", (Var("b"),))))
    pattern = Op("Add", (inner, Op("Mul", (Var("b"), Op("Exp", (Var("a"),))))))
    body = "n = Neg(p) e = Exp(q) l = Mul(n, q) r = Mul(e, p) y = Add(r, l)"
    graph = _graph(f"(float[4] p, float[4] q) => (float[4] y) {{ {body} }}")
    assert _found(graph, pattern) == [{"a": "q", "b": "p"}]


def test_foreign_readers_forbid_unless_shared() -> None:
    text = "(float[4] x) => (float[4] y, float[4] z) { s = Sigmoid(x) y = Mul(x, s) z = Neg(s) }"
    assert _found(_graph(text), SILU) == []
    shared = Op("Mul", (Var("x"), Op("Sigmoid", (Var("x"),), shared=True)))
    assert _found(_graph(text), shared) == [{"x": "x"}]


def test_an_inner_graph_output_forbids() -> None:
    text = "(float[4] x) => (float[4] y, float[4] s) { s = Sigmoid(x) y = Mul(x, s) }"
    assert _found(_graph(text), SILU) == []


def test_identity_and_idle_casts_are_looked_through() -> None:
    body = "i = Identity(x) c = Cast<to=1>(i) s = Sigmoid(x) t = Identity(s) y = Mul(c, t)"
    assert _found(_graph(f"(float[4] x) => (float[4] y) {{ {body} }}"), SILU) == [{"x": "x"}]
    body = body.replace("Cast<to=1>(i)", "Cast<to=10>(i)")
    assert _found(_graph(f"(float[4] x) => (float[4] y) {{ {body} }}"), SILU) == []


@pytest.mark.parametrize(("value", "fits"), [(2.0, True), (2.00001, True), (2.1, False)])
def test_scalars_by_value(value: float, fits: bool) -> None:
    graph = _graph("(float[4] x) => (float[4] y) { y = Pow(x, k) }", k=value)
    assert bool(_found(graph, Op("Pow", (Var("x"), Scalar(2.0))))) is fits


def test_constants_and_either() -> None:
    text = "(float[4] x) => (float[4] y) { y = Mul(x, k) }"
    pattern = Op("Mul", (Var("x"), Either((Scalar(3.0, "n"), Constant("v")))))
    assert _found(_graph(text, k=3), pattern) == [{"x": "x", "n": "k"}]
    assert _found(_graph(text, k=[1, 2, 3, 4]), pattern) == [{"x": "x", "v": "k"}]


def test_an_initialiser_that_is_an_input_is_no_constant() -> None:
    graph = _graph("(float[4] x, float[] k) => (float[4] y) { y = Mul(x, k) }", k=2)
    assert _found(graph, Op("Mul", (Var("x"), Scalar(2.0)))) == []


def test_number_of_inputs_and_attributes() -> None:
    graph = _graph("(float[4,4] x) => (float[4,4] y) { y = Softmax<axis=1>(x) }")
    assert _found(graph, Op("Softmax", (Var("x"),), attributes=(("axis", 1),)))
    assert not _found(graph, Op("Softmax", (Var("x"),), attributes=(("axis", 0),)))
    graph = _graph("(float[4] x, int64[1] a) => (float[1] y) { y = ReduceMean(x, a) }")
    assert not _found(graph, Op("ReduceMean", (Var("x"),)))
    assert _found(graph, Op("ReduceMean", (Var("x"),), more=True))


def test_replace_keeps_name_sources_and_foreign_nodes() -> None:
    body = "a = Exp(x) s = Sigmoid(a) p = Mul(a, s) y = Neg(p) z = Abs(a)"
    graph = _graph(f"(float[4] x) => (float[4] y, float[4] z) {{ {body} }}")
    (found,) = matcher.find(graph, SILU)
    matcher.replace(found, [matcher.fresh("Swish", [found["x"]])])
    assert [n.op_type for n in graph] == ["Exp", "Swish", "Neg", "Abs"]
    node = graph[1]
    assert (node.outputs[0].name, node.metadata_props["pfmc.src"]) == ("p", "n1 n2")
    assert node.outputs[0].uses()[0].node.op_type == "Neg"


def test_names_never_fall_upon_initialisers() -> None:
    graph = _graph("(float[4] x) => (float[4] y) { y = Mul(x, val_0) }", val_0=2)
    (found,) = matcher.find(graph, Op("Mul", (Var("x"), Scalar())))
    first = matcher.fresh("Neg", [found["x"]])
    matcher.replace(found, [first, matcher.fresh("Abs", [first.outputs[0]])])
    names = [v.name for n in graph for v in n.outputs]
    assert names == ["y:Neg", "y"]
    assert matcher.unique_name(graph, "y:Neg") == "y:Neg.1"


def test_chains_of_matches_in_one_sweep() -> None:
    body = "s = Sigmoid(x) a = Mul(x, s) t = Sigmoid(a) y = Mul(t, a)"
    graph = _graph(f"(float[4] x) => (float[4] y) {{ {body} }}")
    for found in matcher.find(graph, SILU):
        matcher.replace(found, [matcher.fresh("Swish", [found["x"]])])
    assert [n.op_type for n in graph] == ["Swish", "Swish"]
