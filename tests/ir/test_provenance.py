"""Ids, scopes and weight names: read once at ingest, united by passes."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfmc.ir import provenance
from pfmc.ir.vocabulary import KEY_SCOPE, KEY_SOURCE, KEY_WEIGHT

TRACE = "pkg.torch.onnx.stack_trace"


def weight(name: str, dims: tuple[int, ...] = (2, 2), **metadata: str) -> ir.Value:
    size = 1
    for dim in dims:
        size *= dim
    tensor = ir.Tensor(__import__("numpy").zeros(dims, "float32"), name=name)
    return ir.Value(
        name=name,
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape(dims),
        const_value=tensor,
        metadata_props=dict(metadata),
    )


def model_of(nodes: list[ir.Node], weights: list[ir.Value]) -> ir.Model:
    graph = ir.Graph(
        [], list(nodes[-1].outputs), nodes=nodes, initializers=weights, opset_imports={"": 24}
    )
    return ir.Model(graph, ir_version=11)


def product(value: ir.Value, name: str = "", **metadata: str) -> ir.Node:
    x = ir.Value(name=f"x_{value.name}")
    return ir.node("MatMul", [x, value], name=name or None, metadata_props=metadata)


def stamped(node: ir.Node, *weights: ir.Value) -> ir.Node:
    provenance.stamp(model_of([node], list(weights)))
    return node


@pytest.mark.parametrize(
    ("name", "metadata", "scope"),
    [
        ("n", {provenance.NAME_SCOPES: "['', 'model', 'model.fc', 'linear']"}, "model.fc"),
        ("n", {provenance.NAME_SCOPES: "['', 'linear']"}, ""),
        ("n", {provenance.NAME_SCOPES: "['_empty_nn_module_stack_from_metadata_hook', 'x']"}, ""),
        ("n", {provenance.NAME_SCOPES: "broken ["}, ""),
        (
            "n",
            {provenance.NAMESPACE: ": a.Net/model: a.Model/model.fc: Linear/linear: aten"},
            "model.fc",
        ),
        ("/model/layers.0/self_attn/q_proj/MatMul", {}, "model.layers.0.self_attn.q_proj"),
        ("/MatMul", {}, ""),
        ("node_7", {}, "h.0.fc"),
    ],
)
def test_scope_is_read_from_what_there_is(name: str, metadata: dict[str, str], scope: str) -> None:
    known = weight("h.0.fc.weight")
    if "node_7" not in name:
        known.name = "val_3"
    node = stamped(product(known, name, **metadata), known)
    assert provenance.scope(node) == scope


def test_stamp_counts_nodes_and_forgets_the_exporting_machine() -> None:
    value = weight("val_1", **{provenance.FOLDED_FROM: "['fc.weight']", TRACE: "File /home/me"})
    first = product(value, "a", **{TRACE: "File /home/me/model.py, line 3"})
    second = ir.node("Relu", [first.outputs[0]], doc_string="/home/me/model.py(3): forward")
    model = model_of([first, second], [value])
    model.doc_string = "made in /home/me"
    model.metadata_props["path"] = "/home/me"
    provenance.stamp(model)
    assert [provenance.sources(n) for n in model.graph] == [("n0",), ("n1",)]
    assert provenance.weight(value) == "fc.weight"
    assert "/home/me" not in str(ir.to_proto(model))


def test_weight_names() -> None:
    scoped = {provenance.NAME_SCOPES: "['', 'a.fc', 'linear']"}
    cases = [
        (weight("a.fc.weight"), product, "a.fc.weight"),
        (weight("onnx::MatMul_12"), product, "a.fc.weight"),
        (
            weight("val_9", **{provenance.FOLDED_FROM: "['a.q.weight', 'val_3']"}),
            product,
            "a.q.weight",
        ),
        (weight("val_9", **{provenance.FOLDED_FROM: "['b.w', 'a.w']"}), product, "a.w b.w"),
        (weight("val_2", ()), product, ""),
    ]
    for value, make, expected in cases:
        stamped(make(value, "n", **scoped), value)
        assert provenance.weight(value) == expected
        assert value.metadata_props.get(KEY_WEIGHT, "") == expected


def test_bias_of_a_gemm_is_a_bias() -> None:
    w, b = weight("val_1"), weight("val_2", (2,))
    node = ir.node("Gemm", [ir.Value(name="x"), w, b], name="/fc/Gemm")
    stamped(node, w, b)
    assert (provenance.weight(w), provenance.weight(b)) == ("fc.weight", "fc.bias")


def labelled(sources: str, scope: str = "") -> ir.Node:
    metadata = {KEY_SOURCE: sources, **({KEY_SCOPE: scope} if scope else {})}
    return ir.node("Relu", [ir.Value(name="x")], metadata_props=metadata)


def test_union_is_in_file_order_and_finds_the_common_scope() -> None:
    new = ir.node("Relu", [ir.Value(name="x")])
    old = [labelled("n12 n3", "m.layers.0.attn.q"), labelled("n100", "m.layers.0.attn.k")]
    assert provenance.union_sources(new, old) is new
    assert provenance.sources(new) == ("n3", "n12", "n100")
    assert provenance.scope(new) == "m.layers.0.attn"


def test_union_keeps_what_the_node_has() -> None:
    new = labelled("n1", "mine")
    provenance.union_sources(new, [labelled("n0", "other")])
    assert (provenance.sources(new), provenance.scope(new)) == (("n0", "n1"), "mine")


def test_common_scope() -> None:
    assert provenance.common_scope() == ""
    assert provenance.common_scope(labelled("n0"), labelled("n1", "a.b")) == "a.b"
    assert provenance.common_scope(labelled("n0", "a.b"), labelled("n1", "c")) == ""
    assert provenance.common_scope(labelled("n0", "a.bc"), labelled("n1", "a.b")) == "a"


@given(st.lists(st.lists(st.integers(0, 999), max_size=5), max_size=5))
def test_union_loses_and_repeats_nothing(groups: list[list[int]]) -> None:
    new = ir.node("Relu", [ir.Value(name="x")])
    provenance.union_sources(new, [labelled(" ".join(f"n{i}" for i in g)) for g in groups])
    numbers = [int(s[1:]) for s in provenance.sources(new)]
    assert numbers == sorted({i for g in groups for i in g})


def test_invented_names() -> None:
    for name in ("val_76", "onnx::MatMul_123", "704", "_to_copy_1", "linear", "onnx::w.x"):
        assert provenance.invented(name), name
    for name in ("model.layers.0.mlp.up_proj.weight", "fc.bias"):
        assert not provenance.invented(name), name
