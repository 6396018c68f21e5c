"""Checks of graphs: what is broken or illegal is found, and named."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from pfmc.errors import InputError, InternalError
from pfmc.ir import check
from pfmc.ir.vocabulary import DOMAIN, KEY_SOURCE, Stage, install


def constant(name: str, array: np.ndarray) -> ir.Value:
    return ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.tensor(array, name=name),
    )  # fmt: skip


def stamped(node: ir.Node, name: str, source: str) -> ir.Node:
    node.outputs[0].name = name
    node.metadata_props[KEY_SOURCE] = source
    return node


def chain(count: int = 3) -> ir.Model:
    """x -> FixedLinear -> Add(b) -> Softmax -> ``count`` Adds -> y."""
    x = ir.Value(name="x", shape=ir.Shape([2, 4]), type=ir.TensorType(ir.DataType.FLOAT))
    w, b = constant("w", np.ones((4, 4), np.float32)), constant("b", np.ones(4, np.float32))
    linear = stamped(ir.node("FixedLinear", [x, w, b], domain=DOMAIN, name="fc"), "h", "n0")
    nodes = [linear, stamped(ir.node("Add", [linear.outputs[0], b]), "a", "n1 n2")]
    for i in range(count):
        nodes.append(stamped(ir.node("Add", [nodes[-1].outputs[0], b]), f"v{i}", f"n{i + 3}"))
    graph = ir.Graph(
        [x], nodes[-1].outputs, nodes=nodes, initializers=[w, b], opset_imports={"": 24}, name="g"
    )
    model = ir.Model(graph, ir_version=11)
    install(model)
    return model


def test_a_whole_graph_passes_at_its_stage() -> None:
    model = chain()
    check.check(model, check.snapshot(model))
    check.require_stage(model, Stage.CANONICAL)
    check.require_stage(model, Stage.SOURCE)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("name", "a second time"),
        ("order", "not defined before it"),
        ("output", "nothing defines it"),
        ("source", "no source id"),
        ("tensor", "its tensor is missing"),
    ],
)
def test_broken_graphs_are_named(damage: str, says: str) -> None:
    model = chain()
    graph = model.graph
    nodes = list(graph)
    if damage == "name":
        nodes[2].outputs[0].name = "a"
    elif damage == "order":
        graph.remove(nodes[0])
        graph.append(nodes[0])
    elif damage == "output":
        graph.outputs.append(ir.Value(name="nowhere"))
    elif damage == "source":
        del nodes[1].metadata_props[KEY_SOURCE]
    else:
        graph.initializers["w"].const_value = None
    assert any(says in str(v) for v in check.broken(model))
    with pytest.raises(InternalError):
        check.check(model)


def test_a_kept_value_may_not_lose_its_sources() -> None:
    model = chain()
    before = check.snapshot(model)
    node = list(model.graph)[1]
    node.metadata_props[KEY_SOURCE] = "n1"
    with pytest.raises(InternalError, match="lost its sources n2") as caught:
        check.check(model, before)
    assert "(Add)" in caught.value.where


def test_a_dead_node_takes_its_sources_along() -> None:
    model = chain(2)
    before = check.snapshot(model)
    last = list(model.graph)[-1]
    last.outputs[0].replace_all_uses_with(last.inputs[0], replace_graph_outputs=True)
    model.graph.remove(last, safe=True)
    check.check(model, before)


def test_an_initialiser_changed_in_place_is_found() -> None:
    model = chain()
    before = check.snapshot(model)
    model.graph.initializers["w"].const_value.numpy()[0, 0] = 5.0
    with pytest.raises(InternalError, match="changed in place"):
        check.check(model, before)
    model = chain()
    before = check.snapshot(model)
    model.graph.initializers["w"].const_value = ir.tensor(np.zeros((4, 4), np.float32), name="w")
    with pytest.raises(InternalError, match="replaced in place"):
        check.check(model, before)


def test_what_is_illegal_at_a_stage() -> None:
    model = chain()
    assert [v.what for v in check.illegal(model, Stage.QUANTISED)] == [
        "pfmc.FixedLinear may not stand at stage quantised"
    ]
    first = next(iter(model.graph))
    foreign = stamped(ir.node("Gelu", [first.outputs[0]], domain="com.microsoft"), "m", "n8")
    product = stamped(ir.node("MatMul", [foreign.outputs[0], first.inputs[1]]), "p", "n9")
    loop = stamped(ir.node("Gemm", [product.outputs[0], first.inputs[1]], name="g7"), "q", "n10")
    model.graph.extend([foreign, product, loop])
    what = [v.what for v in check.illegal(model, Stage.CANONICAL)]
    assert what == [
        "operator of foreign domain com.microsoft",
        "a product with a constant that did not become a fixed linear",
        "Gemm cannot be built at stage canonical",
    ]
    assert not check.illegal(model, Stage.SOURCE)
    with pytest.raises(InputError, match=r"and 2 more"):
        check.require_stage(model, Stage.CANONICAL)
    model.graph.remove([foreign, product, loop][::-1], safe=True)
    model.graph.append(stamped(ir.node("Loop", [], name="l"), "r", "n11"))
    with pytest.raises(InputError, match="because") as caught:
        check.require_stage(model, Stage.CANONICAL, {"scope (l)": "because"})
    assert "'l' (Loop) n11" in caught.value.where


def test_two_layers_of_one_name_and_wrong_shapes() -> None:
    model = chain()
    first = next(iter(model.graph))
    again = stamped(
        ir.node("FixedLinear", [first.outputs[0], *reversed(first.inputs[1:])], domain=DOMAIN,
                name="fc"),
        "again", "n20",
    )  # fmt: skip
    model.graph.append(again)
    what = " ".join(v.what for v in check.illegal(model, Stage.CANONICAL))
    assert "a name of its own" in what
    assert "no [in, out] and [out]" in what
