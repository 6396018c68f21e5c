"""Stacks of weights: products of all, and rows sent to the expert that is chosen at run time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pfmc.errors import InputError
from pfmc.ir import check, vocabulary
from pfmc.ir.vocabulary import Stage
from pfmc.passes.fold import Fold
from pfmc.passes.linears import Linears
from pfmc.passes.shape_arithmetic import ShapeArithmetic


@pytest.mark.parametrize("shape", [(3, 5, 6), (2, 3, 5, 6), (5, 6), (1, 5, 6)])
def test_a_stack_of_matrices(lab: Any, floats: Any, shape: tuple[int, ...]) -> None:
    """One linear for each matrix, whether x has as many or one."""
    dims = ",".join(map(str, shape))
    text = f"(float[{dims}] x) => (float[A,B,C] y) {{ y = MatMul(x, w) }}"
    if len(shape) == 4:
        text = text.replace("A,B,C", "A,B,C,D")
    model = lab.make(text, w=floats(3, 6, 4))
    assert lab.same(model, [Linears()], {"x": floats(*shape)}) == []
    assert len(vocabulary.fixed_linears(model)) == 3


@pytest.mark.parametrize("shape", [(3, 6, 5), (6, 5), (2, 3, 6, 5)])
def test_a_stack_on_the_left(lab: Any, floats: Any, shape: tuple[int, ...]) -> None:
    """SigLIP's pooling head: the queries are weights."""
    dims, outs = ",".join(map(str, shape)), ",".join("ABCD"[: max(3, len(shape))])
    text = f"(float[{dims}] x) => (float[{outs}] y) {{ y = MatMul(w, x) }}"
    model = lab.make(text, w=floats(3, 4, 6))
    assert lab.same(model, [Linears()], {"x": floats(*shape)}) == []
    assert len(vocabulary.fixed_linears(model)) == 3


FORMS = {
    "left": (
        "u = Unsqueeze(x, two) m = MatMul(g, u) s = Squeeze(m, two)", (4, 7, 6),
    ),
    "right": (
        "u = Unsqueeze(x, one) m = MatMul(u, g) s = Squeeze(m, one)", (4, 6, 7),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gather", ["GatherND", "Gather"])
def test_gathered_experts(lab: Any, floats: Any, form: str, biased: bool, gather: str) -> None:
    """``batched_mm``: the weights stay, the rows travel; an expert without rows is no matter."""
    body, shape = FORMS[form]
    index = "i = Unsqueeze(which, one)" if gather == "GatherND" else "i = Identity(which)"
    tail = f"h = {gather}(b, i) y = Add(s, h)" if biased else "y = Identity(s)"
    text = f"""(float[N,6] x, int64[N] which) => (float[N,7] y) {{
        {index} g = {gather}(w, i) {body} {tail}
    }}"""
    extra = {"b": floats(4, 7)} if biased else {}
    model = lab.make(
        text, w=floats(*shape), one=np.array([1], np.int64), two=np.array([2], np.int64), **extra
    )
    feeds = {"x": floats(9, 6), "which": np.array([2, 0, 2, 3, 0, 0, 2, 3, 3])}
    lab.same(model, [Fold(), ShapeArithmetic(), Linears(), Fold()], feeds)
    assert len(vocabulary.fixed_linears(model)) == 4
    counts = lab.counts(model)
    assert not counts["MatMul"]
    assert not counts["GatherND"]
    assert counts["Add"] == 0  # a gathered bias becomes the experts' own


def test_other_gathered_weights_are_refused(lab: Any, floats: Any) -> None:
    """Several rows for each gathered matrix: named, not silently built as a table."""
    text = """(float[N,5,6] x, int64[N] which) => (float[N,5,7] y) {
        g = Gather(w, which) y = MatMul(x, g)
    }"""
    model = lab.make(text, w=floats(4, 6, 7))
    (declined,) = lab.apply(model, [Linears()])
    assert "gathered at run time" in declined.reason
    with pytest.raises(InputError, match="gathered at run time"):
        check.require_stage(model, Stage.CANONICAL)


def test_experts_of_a_split_stack_stay_lazy(lab: Any, floats: Any) -> None:
    """Split and Squeeze of a stack: one lazy matrix for each expert, named after the stack."""
    text = """(float[N,6] x) => (float[N,7] y, float[N,7] z) {
        a, b = Split<axis=0, num_outputs=2>(w) c = Squeeze(a, zero) d = Squeeze(b, zero)
        y = MatMul(x, c) z = MatMul(x, d)
    }"""
    model = lab.make(text, w=floats(2, 6, 7), zero=np.array([0], np.int64))
    model.graph.initializers["w"].metadata_props["pfmc.weight"] = "mlp.experts.up_proj"
    lab.same(model, [Fold(), Linears(), Fold()], {"x": floats(3, 6)})
    names = [n.name for n in vocabulary.fixed_linears(model)]
    assert names == ["mlp.experts.0.up_proj", "mlp.experts.1.up_proj"]


@pytest.mark.parametrize("heads", [1, 4])
def test_a_stack_with_an_axis_of_one_says_which_axis_counts(
    lab: Any, floats: Any, heads: int
) -> None:
    """``bhwc,hkc->bhwk`` (SAM's relative positions): one linear for each row of the table."""
    model = lab.make(
        "(float[4,N,5,6] x) => (float[4,N,5,7] y) { y = MatMul(x, w) }", w=floats(heads, 1, 6, 7)
    )
    lab.same(model, [Linears(), Fold()], {"x": floats(4, 3, 5, 6)})
    assert len(vocabulary.fixed_linears(model)) == heads
