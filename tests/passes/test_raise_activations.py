"""GELU, SiLU and SwiGLU are found in every grouping, and the numbers stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pfmc.passes.raise_activations import RaiseActivations

NUMBERS = {
    "half": 0.5,
    "one": 1.0,
    "two": 2.0,
    "three": 3.0,
    "rt2": np.sqrt(2),
    "ir2": 1 / np.sqrt(2),
    "c": 0.044715,
    "k": np.sqrt(2 / np.pi),
    "quick": 1.702,
}
GROUPINGS = {
    "x half first": "h = Mul(x, half) y = Mul(h, e)",
    "half last": "h = Mul(x, e) y = Mul(h, half)",
    "half inside": "h = Mul(half, e) y = Mul(x, h)",
    "over two": "h = Mul(x, e) y = Div(h, two)",
}
ERF = {
    "div": "d = Div(x, rt2) f = Erf(d) e = Add(f, one)",
    "mul": "d = Mul(ir2, x) f = Erf(d) e = Add(one, f)",
}
TANH = {
    "pow": "p = Pow(x, three) q = Mul(p, c) u = Add(x, q) v = Mul(u, k) t = Tanh(v)"
    " e = Add(t, one)",
    "products": "s = Mul(x, x) p = Mul(x, s) q = Mul(c, p) u = Add(q, x) v = Mul(k, u) t = Tanh(v)"
    " e = Add(one, t)",
    "factored": "s = Mul(x, x) q = Mul(s, c) r = Add(q, one) u = Mul(x, r) v = Mul(u, k)"
    " t = Tanh(v) e = Add(t, one)",
}


def _model(lab: Any, body: str, inputs: str = "float[B,8] x") -> Any:
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    used = {n: np.asarray(v, np.float32) for n, v in NUMBERS.items() if n in words}
    return lab.make(f"({inputs}) => (float[B,8] y) {{ {body} }}", **used)


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("form", ERF)
def test_gelu_erf(lab: Any, floats: Callable[..., np.ndarray], form: str, grouping: str) -> None:
    model = _model(lab, f"{ERF[form]} {GROUPINGS[grouping]}")
    lab.same(model, [RaiseActivations()], {"x": 3 * floats(4, 8)})
    assert lab.counts(model) == {"Gelu": 1}
    assert model.graph[0].attributes["approximate"].value == "none"


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("form", TANH)
def test_gelu_tanh(lab: Any, floats: Callable[..., np.ndarray], form: str, grouping: str) -> None:
    model = _model(lab, f"{TANH[form]} {GROUPINGS[grouping]}")
    lab.same(model, [RaiseActivations()], {"x": 3 * floats(4, 8)})
    assert lab.counts(model) == {"Gelu": 1}
    assert model.graph[0].attributes["approximate"].value == "tanh"


def test_another_constant_is_no_gelu(lab: Any, floats: Callable[..., np.ndarray]) -> None:
    model = _model(lab, f"{ERF['div']} {GROUPINGS['half last']}".replace("rt2", "two"))
    lab.same(model, [RaiseActivations()], {"x": floats(4, 8)})
    assert lab.counts(model)["Gelu"] == 0


def test_silu(lab: Any, floats: Callable[..., np.ndarray]) -> None:
    model = _model(lab, "s = Sigmoid(x) y = Mul(s, x)")
    lab.same(model, [RaiseActivations()], {"x": 3 * floats(4, 8)})
    assert lab.counts(model) == {"Swish": 1}


def test_quick_gelu_is_swish_with_alpha(lab: Any, floats: Callable[..., np.ndarray]) -> None:
    model = _model(lab, "a = Mul(x, quick) s = Sigmoid(a) y = Mul(x, s)")
    lab.same(model, [RaiseActivations()], {"x": 3 * floats(4, 8)})
    assert lab.counts(model) == {"Swish": 1}
    assert model.graph[0].attributes["alpha"].value == pytest.approx(1.702)


@pytest.mark.parametrize("product", ["y = Mul(w, up)", "y = Mul(up, w)"])
def test_swiglu(lab: Any, floats: Callable[..., np.ndarray], product: str) -> None:
    body = f"s = Sigmoid(x) w = Mul(x, s) {product}"
    model = _model(lab, body, "float[B,8] x, float[B,8] up")
    lab.same(model, [RaiseActivations()], {"x": floats(4, 8), "up": floats(4, 8)})
    assert lab.counts(model) == {"SwiGLU": 1}
    assert ("pfmc", "SwiGLU", "") in model.functions


def test_broadcast_gate_is_declined(lab: Any, floats: Callable[..., np.ndarray]) -> None:
    model = _model(
        lab, "s = Sigmoid(x) w = Mul(x, s) y = Mul(w, up)", "float[B,8] x, float[B,1] up"
    )
    declined = lab.same(model, [RaiseActivations()], {"x": floats(4, 8), "up": floats(4, 1)})
    assert [d.reason for d in declined] == ["gate and up differ in width or rank"]
    assert lab.counts(model) == {"Swish": 1, "Mul": 1}
