"""Shape arithmetic shrinks to constants and input lengths; unequal symbols are kept apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pfmc.passes.fold import Fold
from pfmc.passes.shape_arithmetic import ShapeArithmetic

Floats = Callable[..., np.ndarray]
PASSES = (ShapeArithmetic(), Fold())


def test_reshape_by_computed_lengths_becomes_constant(lab: Any, floats: Floats) -> None:
    body = (
        "n = Shape(x) b = Gather(n, zero) s = Gather(n, one) b1 = Unsqueeze(b, ax)"
        " s1 = Unsqueeze(s, ax) to = Concat<axis=0>(b1, s1, minus, eight) y = Reshape(x, to)"
    )
    model = lab.make(
        f"(float[B,S,32] x) => (float[B,S,4,8] y) {{ {body} }}",
        zero=np.array(0),
        one=np.array(1),
        ax=np.array([0]),
        minus=np.array([-1]),
        eight=np.array([8]),
    )
    lab.same(model, PASSES, {"x": floats(2, 3, 32)})
    assert lab.counts(model) == {"Reshape": 1}
    np.testing.assert_array_equal(model.graph[0].inputs[1].const_value.numpy(), [0, 0, 4, 8])


def test_lengths_are_read_from_inputs_not_activations(lab: Any, floats: Floats) -> None:
    body = "h = Exp(x) n = Shape<start=1, end=2>(h) m = Squeeze(n) y = Range(zero, m, one)"
    text = f"(float[B,S,4] x) => (int64[S] y, float[B,S,4] h) {{ {body} }}"
    model = lab.make(text, zero=np.array(0), one=np.array(1))
    lab.same(model, PASSES, {"x": floats(2, 3, 4)})
    (shape,) = [n for n in model.graph if n.op_type == "Shape"]
    assert shape.inputs[0].name == "x"


def test_idle_expand_and_reshape_go(lab: Any, floats: Floats) -> None:
    body = "n = Shape(x) e = Expand(x, n) r = Reshape(e, n) y = Neg(r)"
    model = lab.make(f"(float[B,S,4] x) => (float[B,S,4] y) {{ {body} }}")
    lab.same(model, PASSES, {"x": floats(2, 3, 4)})
    assert lab.counts(model) == {"Neg": 1}


def test_an_expand_that_may_widen_stays(lab: Any, floats: Floats) -> None:
    body = "n = Shape(z) y = Expand(x, n)"
    model = lab.make(f"(float[B,4] x, float[C,4] z) => (float[C,4] y) {{ {body} }}")
    lab.same(model, PASSES, {"x": floats(1, 4), "z": floats(3, 4)})
    assert lab.counts(model)["Expand"] == 1


@pytest.mark.parametrize("length", [1, 5])
def test_two_open_dimensions_stay_computed(lab: Any, floats: Floats, length: int) -> None:
    body = "n = Shape(z) y = Reshape(x, n)"
    model = lab.make(f"(float[N] x, float[A,B] z) => (float[A,B] y) {{ {body} }}")
    lab.same(model, PASSES, {"x": floats(2 * length), "z": floats(2, length)})
    assert lab.counts(model)["Reshape"] == 1
