"""Each form of a normalisation becomes the operator, and the numbers stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pfmc.passes.raise_norms import RaiseNorms

SQUARES = {"pow": "s = Pow(x, two)", "mul": "s = Mul(x, x)"}
ROOTS = {
    "reciprocal": "r = Sqrt(a) i = Reciprocal(r) n = Mul(x, i)",
    "one over": "r = Sqrt(a) i = Div(one, r) n = Mul(i, x)",
    "divide": "r = Sqrt(a) n = Div(x, r)",
    "power": "n0 = Pow(a, minushalf) n = Mul(n0, x)",
}
SCALARS = {
    "two": np.float32(2),
    "one": np.float32(1),
    "minushalf": np.float32(-0.5),
    "eps": np.float32(1e-5),
    "last": np.array([-1], np.int64),
}


def _used(body: str) -> dict[str, np.ndarray]:
    return {k: np.asarray(v) for k, v in SCALARS.items() if k in body}


def _rms(square: str, root: str, scale: str = "y = Mul(g, n)") -> str:
    body = f"{SQUARES[square]} m = ReduceMean(s, last) a = Add(eps, m) {ROOTS[root]} {scale}"
    return f"(float[B,S,16] x) => (float[B,S,16] y) {{ {body} }}"


@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("scale", ["y = Mul(g, n)", "y = Mul(n, g)"])
def test_rms(
    lab: Any, floats: Callable[..., np.ndarray], square: str, root: str, scale: str
) -> None:
    text = _rms(square, root, scale)
    model = lab.make(text, g=floats(16), **_used(text))
    assert lab.same(model, [RaiseNorms()], {"x": floats(2, 3, 16)}) == []
    assert lab.counts(model) == {"RMSNormalization": 1}
    (node,) = model.graph
    assert node.attributes["epsilon"].value == pytest.approx(1e-5)
    assert node.metadata_props["pfmc.src"].split()[0] == "n0"


def test_rms_without_scale_of_known_width(lab: Any, floats: Callable[..., np.ndarray]) -> None:
    text = _rms("pow", "divide", "y = Identity(n)")
    model = lab.make(text, **_used(text))
    lab.same(model, [RaiseNorms()], {"x": floats(2, 3, 16)})
    assert lab.counts(model)["RMSNormalization"] == 1


def test_mean_over_another_axis_is_declined(lab: Any, floats: Callable[..., np.ndarray]) -> None:
    text = _rms("pow", "divide")
    model = lab.make(text, g=floats(16), **(_used(text) | {"last": np.array([1], np.int64)}))
    declined = lab.same(model, [RaiseNorms()], {"x": floats(2, 3, 16)})
    assert "not over the last axis" in declined[0].reason
    assert lab.counts(model)["RMSNormalization"] == 0


def test_a_foreign_reader_inside_forbids(lab: Any, floats: Callable[..., np.ndarray]) -> None:
    text = _rms("pow", "reciprocal").replace(
        "=> (float[B,S,16] y)", "=> (float[B,S,16] y, float[B,S,1] i)"
    )
    model = lab.make(text, g=floats(16), **_used(text))
    lab.same(model, [RaiseNorms()], {"x": floats(2, 3, 16)})
    assert lab.counts(model)["RMSNormalization"] == 0


def test_half_precision_with_casts(lab: Any, floats: Callable[..., np.ndarray]) -> None:
    body = (
        "w = Cast<to=1>(x) s = Pow(w, two) m = ReduceMean(s, last) a = Add(m, eps) r = Sqrt(a)"
        " i = Reciprocal(r) n = Mul(w, i) h = Cast<to=10>(n) y = Mul(g, h)"
    )
    text = f"(float16[B,S,16] x) => (float16[B,S,16] y) {{ {body} }}"
    model = lab.make(text, g=floats(16).astype(np.float16), **_used(text))
    lab.same(model, [RaiseNorms()], {"x": floats(2, 3, 16).astype(np.float16)}, 2e-3)
    assert lab.counts(model) == {"RMSNormalization": 1}


@given(width=st.integers(2, 40), eps=st.sampled_from([1e-6, 1e-5, 1e-12]))
@settings(
    max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@pytest.mark.parametrize("root", ["divide", "reciprocal"])
def test_layer_norm(lab: Any, root: str, width: int, eps: float) -> None:
    rng = np.random.default_rng(width)
    rest = ROOTS[root].replace("(x", "(c").replace(" x)", " c)")
    body = (
        "m0 = ReduceMean(x, last) c = Sub(x, m0) s = Pow(c, two) m = ReduceMean(s, last)"
        f" a = Add(m, eps) {rest} z = Mul(n, g) y = Add(z, b)"
    )
    text = f"(float[B,S,{width}] x) => (float[B,S,{width}] y) {{ {body} }}"
    arrays = _used(text) | {"eps": np.asarray(np.float32(eps))}
    g, b = (rng.standard_normal(width).astype(np.float32) for _ in range(2))
    model = lab.make(text, g=g, b=b, **arrays)
    x = rng.standard_normal((2, 3, width)).astype(np.float32)
    assert lab.same(model, [RaiseNorms()], {"x": x}, 1e-4) == []
    assert lab.counts(model) == {"LayerNormalization": 1}


def test_layer_norm_without_shift(lab: Any, floats: Callable[..., np.ndarray]) -> None:
    body = (
        "m0 = ReduceMean(x, last) c = Sub(x, m0) s = Mul(c, c) m = ReduceMean(s, last)"
        " a = Add(m, eps) r = Sqrt(a) n = Div(c, r) y = Mul(g, n)"
    )
    text = f"(float[B,S,16] x) => (float[B,S,16] y) {{ {body} }}"
    model = lab.make(text, g=floats(16), **_used(text))
    assert lab.same(model, [RaiseNorms()], {"x": floats(2, 3, 16)}) == []
    assert lab.counts(model) == {"LayerNormalization": 1}


@pytest.mark.parametrize("shape", ["B,6,4", "B,6,4,5", "B,6"])
def test_batch_norm(lab: Any, floats: Callable[..., np.ndarray], shape: str) -> None:
    """At inference it is one factor and one summand for each channel."""
    text = (
        f"(float[{shape}] x) => (float[{shape}] y)"
        " { y = BatchNormalization<epsilon=0.01>(x, g, b, m, v) }"
    )
    model = lab.make(text, g=floats(6), b=floats(6), m=floats(6), v=np.abs(floats(6)))
    sizes = [3 if d == "B" else int(d) for d in shape.split(",")]
    assert lab.same(model, [RaiseNorms()], {"x": floats(*sizes)}) == []
    assert lab.counts(model) == {"Mul": 1, "Add": 1}
