"""Which fixed linears a router chooses, and how often a token uses each."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from pfmc.distill.shapes import probe_shapes
from pfmc.ir import routing, vocabulary


def _model(chosen: int) -> ir.Model:
    """A router over three experts, each of two products in a row, and a head for all tokens."""
    lines = [
        "x = Reshape(text, rows)",
        "logits = pfmc.FixedLinear(x, gate, zeros)",
        "best, which = TopK(logits, k)",
    ]
    lines += ["flat = Reshape(which, minus)", "count = Shape(flat)"]
    for i in range(3):
        lines += [
            f"hit{i} = Equal(flat, i{i})", f"found{i} = NonZero(hit{i})",
            f"rows{i} = Squeeze(found{i}, zero)", f"of{i} = Div(rows{i}, k)",
            f"x{i} = Gather(x, of{i})", f"h{i} = pfmc.FixedLinear(x{i}, w, b)",
            f"r{i} = Relu(h{i})", f"y{i} = pfmc.FixedLinear(r{i}, w, b)",
        ]  # fmt: skip
    lines += ["all = Concat<axis=0>(rows0, rows1, rows2)", "at = Unsqueeze(all, one)"]
    lines += ["ys = Concat<axis=0>(y0, y1, y2)", "wide = Concat<axis=0>(count, four)"]
    lines += ["empty = ConstantOfShape(wide)", "s = ScatterND(empty, at, ys)"]
    lines += [f"p = Reshape(s, shape{chosen})", "sum = ReduceSum<keepdims=0>(p, one)"]
    lines += ["z = pfmc.FixedLinear(sum, head, none)"]
    numbers = {
        "rows": [-1, 4], "k": [chosen], "minus": [-1], "zero": [0], "one": [1], "four": [4],
        f"shape{chosen}": [-1, chosen, 4],
    }  # fmt: skip
    constants = [f"int64[{len(v)}] {n} = {{{', '.join(map(str, v))}}}" for n, v in numbers.items()]
    constants += [f"int64 i{i} = {{{i}}}" for i in range(3)]
    for name, shape in (("gate", (4, 3)), ("zeros", (3,)), ("w", (4, 4)), ("b", (4,)),
                        ("head", (4, 2)), ("none", (2,))):  # fmt: skip
        size = 1
        for n in shape:
            size *= n
        dims = ",".join(map(str, shape))
        constants.append(f"float[{dims}] {name} = {{{', '.join(['0.5'] * size)}}}")
    text = (
        '<ir_version: 11, opset_import: ["" : 24, "pfmc" : 1]>\n'
        f"g (float[B,N,4] text) => (float[M,2] z) <{', '.join(constants)}> {{\n"
        + "\n".join(lines) + "\n}"
    )  # fmt: skip
    model = ir.from_onnx_text(text)
    names = ["router"]
    names += [n for i in range(3) for n in (f"mlp.experts.{i}.up", f"mlp.experts.{i}.down")]
    for node, name in zip(vocabulary.fixed_linears(model), [*names, "head"], strict=True):
        node.name = name
    for index, node in enumerate(model.graph):
        node.name = node.name or f"n{index}"
    vocabulary.install(model)
    return model


@pytest.mark.parametrize("chosen", [1, 2])
def test_experts_are_found_and_share_the_tokens(chosen: int) -> None:
    model = _model(chosen)
    assert routing.groups(model) == [
        tuple(f"mlp.experts.{i}.{part}" for i in range(3)) for part in ("up", "down")
    ]
    shapes = probe_shapes(model)
    equal = routing.activity(model, shapes, {})
    assert set(equal) == {n for group in routing.groups(model) for n in group}
    assert list(equal.values()) == pytest.approx([chosen / 3] * 6)
    seen = {"mlp.experts.0.up": 6, "mlp.experts.1.up": 2, "mlp.experts.2.up": 0}
    found = routing.activity(model, shapes, seen)
    measured = [found[f"mlp.experts.{i}.up"] for i in range(3)]
    assert measured == pytest.approx([chosen * 0.75, chosen * 0.25, 0.0])
    assert found["mlp.experts.0.down"] == pytest.approx(chosen / 3)


def test_a_model_without_a_router_has_no_groups() -> None:
    text = """<ir_version: 11, opset_import: ["" : 24, "pfmc" : 1]>
    g (float[N,2] x, int64[M] rows) => (float[M,2] y)
    <float[2,2] w = {1.0, 2.0, 3.0, 4.0}, float[2] b = {0.0, 0.0}> {
        r = Gather(x, rows) y = pfmc.FixedLinear(r, w, b)
    }"""
    model = ir.from_onnx_text(text)
    assert routing.groups(model) == []
    assert routing.activity(model, {}, {}) == {}
