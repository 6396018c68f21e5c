"""Rotary embeddings are found in Slice and Split form, and only on true halves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pfmc.distill.student import Student
from pfmc.passes.raise_rotary import RaiseRotary
from pfmc.passes.shape_arithmetic import ShapeArithmetic

FAR = np.iinfo(np.int64).max


def _text(width: int, take: str) -> str:
    body = f"{take} m = Neg(r) t = Concat<axis=-1>(m, l) p = Mul(x, c) q = Mul(t, s) y = Add(p, q)"
    shape = f"float[B,2,S,{width}]"
    return (
        f"({shape} x, float[1,1,S,{width}] c, float[1,1,S,{width}] s) => ({shape} y) {{ {body} }}"
    )


PARTS = (
    " a = Mul(l, c) b = Mul(r, s) d = Sub(a, b) e = Mul(r, c) f = Mul(l, s) g = Add(e, f)"
    " y = Concat<axis=-1>(d, g)"
)
SLICES = "l = Slice(x, zero, half, axis, one) r = Slice(x, half, far, axis, one)"
SPLIT = "l, r = Split<axis=-1, num_outputs=2>(x)"


def _numbers(width: int, half: int, axis: int = 3) -> dict[str, np.ndarray]:
    values = {"zero": 0, "half": half, "far": FAR, "axis": axis, "one": 1}
    return {name: np.array([v], np.int64) for name, v in values.items()}


@given(half=st.integers(1, 8), axis=st.sampled_from([3, -1]))
@settings(
    max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
def test_slices(lab: Any, half: int, axis: int) -> None:
    rng = np.random.default_rng(half)
    width = 2 * half
    model = lab.make(_text(width, SLICES), **_numbers(width, half, axis))
    x, c, s = (
        rng.standard_normal(d).astype(np.float32)
        for d in [(2, 2, 3, width)] + [(1, 1, 3, width)] * 2
    )
    assert lab.same(model, [RaiseRotary()], {"x": x, "c": c, "s": s}) == []
    assert lab.counts(model) == {"Rotary": 1}
    assert [v.name for v in model.graph[0].inputs] == ["x", "c", "s"]


def test_split(lab: Any, floats: Callable[..., np.ndarray]) -> None:
    model = lab.make(_text(8, SPLIT))
    feeds = {"x": floats(2, 2, 3, 8), "c": floats(1, 1, 3, 8), "s": floats(1, 1, 3, 8)}
    lab.same(model, [RaiseRotary()], feeds)
    assert lab.counts(model) == {"Rotary": 1}


@pytest.mark.parametrize("half", [3, 5])
def test_unequal_parts_are_declined(lab: Any, floats: Callable[..., np.ndarray], half: int) -> None:
    model = lab.make(_text(8, SLICES), **_numbers(8, half))
    feeds = {"x": floats(2, 2, 3, 8), "c": floats(1, 1, 3, 8), "s": floats(1, 1, 3, 8)}
    declined = lab.same(model, [RaiseRotary()], feeds)
    assert "not the two halves" in declined[0].reason
    assert lab.counts(model)["Rotary"] == 0


@pytest.mark.parametrize("take", [SLICES, SPLIT])
def test_parts_turned_one_by_one(lab: Any, floats: Callable[..., np.ndarray], take: str) -> None:
    """gpt-oss: tables of half the width, doubled for the operator."""
    text = (
        "(float[B,2,S,8] x, float[1,1,S,4] c, float[1,1,S,4] s) => (float[B,2,S,8] y)"
        f" {{ {take}{PARTS} }}"
    )
    model = lab.make(text, **(_numbers(8, 4) if take is SLICES else {}))
    feeds = {"x": floats(2, 2, 3, 8), "c": floats(1, 1, 3, 4), "s": floats(1, 1, 3, 4)}
    assert lab.same(model, [RaiseRotary()], feeds) == []
    assert lab.counts(model) == {"Rotary": 1, "Concat": 2}


def test_parts_with_the_signs_the_other_way_stay(
    lab: Any, floats: Callable[..., np.ndarray]
) -> None:
    body = f"{SPLIT}{PARTS}".replace("Sub(a, b)", "Sub(b, a)")
    text = (
        f"(float[B,2,S,8] x, float[1,1,S,4] c, float[1,1,S,4] s) => (float[B,2,S,8] y) {{ {body} }}"
    )
    model = lab.make(text)
    feeds = {"x": floats(2, 2, 3, 8), "c": floats(1, 1, 3, 4), "s": floats(1, 1, 3, 4)}
    lab.same(model, [RaiseRotary()], feeds)


PASSES = (ShapeArithmetic(), RaiseRotary())
EVEN_ODD = {
    "slices": "e = Slice(x, zero, far, axis, two) o = Slice(x, one, far, axis, two)",
    "gathers": "z = Reshape(x, pairs) e = Gather<axis=-1>(z, i0) o = Gather<axis=-1>(z, i1)",
    "split": (
        "z = Reshape(x, pairs) e1, o1 = Split<axis=-1, num_outputs=2>(z)"
        " e = Squeeze(e1, last) o = Squeeze(o1, last)"
    ),
}
JOIN = "a1 = Unsqueeze(a, last) b1 = Unsqueeze(b, last) p = Concat<axis=-1>(a1, b1)"
TURNED = f" a = Neg(o) b = Identity(e) {JOIN} t = Reshape(p, flat)"
STACKED = (
    " ec = Mul(e, c) os = Mul(o, s) a = Sub(ec, os) oc = Mul(o, c) es = Mul(e, s) b = Add(oc, es)"
    f" {JOIN} y = Reshape(p, flat)"
)


def _pairs(body: str) -> dict[str, np.ndarray]:
    vectors = {
        "zero": [0], "one": [1], "two": [2], "far": [FAR], "axis": [3], "last": [-1],
        "pairs": [0, 0, 0, 4, 2], "flat": [0, 0, 0, 8],
    }  # fmt: skip
    held = {n: np.array(v, np.int64) for n, v in vectors.items()}
    held |= {f"i{i}": np.array(i, np.int64) for i in (0, 1)}
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return {n: a for n, a in held.items() if n in words}


@pytest.mark.parametrize("take", EVEN_ODD)
def test_neighbours(lab: Any, floats: Callable[..., np.ndarray], take: str) -> None:
    """GPT-J: pairs of neighbours; torch runs what ONNX Runtime ran on the pieces."""
    body = f"{EVEN_ODD[take]}{TURNED} u = Mul(x, c) w = Mul(t, s) y = Add(u, w)"
    shape = "float[B,2,S,8]"
    model = lab.make(
        f"({shape} x, float[1,1,S,8] c, float[1,1,S,8] s) => ({shape} y) {{ {body} }}",
        **_pairs(body),
    )
    feeds = {"x": floats(2, 2, 3, 8), "c": floats(1, 1, 3, 8), "s": floats(1, 1, 3, 8)}
    before = lab.run(model, feeds)["y"]
    assert lab.same(model, PASSES, feeds) == []
    assert lab.counts(model) == {"Rotary": 1}
    assert next(iter(model.graph)).attributes["interleaved"].value == 1
    got = Student(model)(**{n: torch.from_numpy(a) for n, a in feeds.items()})["y"]
    np.testing.assert_allclose(got.numpy(), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("take", EVEN_ODD)
def test_neighbours_turned_one_by_one(
    lab: Any, floats: Callable[..., np.ndarray], take: str
) -> None:
    body = EVEN_ODD[take] + STACKED
    text = (
        f"(float[B,2,S,8] x, float[1,1,S,4] c, float[1,1,S,4] s) => (float[B,2,S,8] y) {{ {body} }}"
    )
    model = lab.make(text, **_pairs(body))
    feeds = {"x": floats(2, 2, 3, 8), "c": floats(1, 1, 3, 4), "s": floats(1, 1, 3, 4)}
    assert lab.same(model, PASSES, feeds) == []
    assert lab.counts(model) == {"Rotary": 1, "Unsqueeze": 2, "Concat": 2, "Reshape": 2}


@pytest.mark.parametrize(
    "take",
    [
        "e = Slice(x, one, far, axis, two) o = Slice(x, zero, far, axis, two)",  # exchanged
        "e = Slice(x, zero, far, axis, two) o = Slice(x, zero, far, axis, two)",  # twice the same
    ],
)
def test_what_are_no_neighbours_stays(
    lab: Any, floats: Callable[..., np.ndarray], take: str
) -> None:
    body = f"{take}{TURNED} u = Mul(x, c) w = Mul(t, s) y = Add(u, w)"
    shape = "float[B,2,S,8]"
    model = lab.make(
        f"({shape} x, float[1,1,S,8] c, float[1,1,S,8] s) => ({shape} y) {{ {body} }}",
        **_pairs(body),
    )
    feeds = {"x": floats(2, 2, 3, 8), "c": floats(1, 1, 3, 8), "s": floats(1, 1, 3, 8)}
    (declined,) = lab.same(model, PASSES, feeds)
    assert "not the even and the odd" in declined.reason
    assert lab.counts(model)["Rotary"] == 0


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("near", [0, 1])
@pytest.mark.parametrize("turned", [0, 4])
@pytest.mark.parametrize("positions", [False, True])
def test_the_standard_operator(
    lab: Any, floats: Callable[..., np.ndarray], flat: bool, near: int, turned: int, positions: bool
) -> None:
    """Both layouts of RotaryEmbedding, whole and partial, with and without positions."""
    half = (turned or 8) // 2
    shape, heads = ("float[B,S,16]", 2) if flat else ("float[B,2,S,8]", 0)
    table = f"float[9,{half}]" if positions else f"float[B,S,{half}]"
    inputs = f"{shape} x, {table} c, {table} s" + (", int64[B,S] at" if positions else "")
    options = f"interleaved={near}, rotary_embedding_dim={turned}, num_heads={heads}"
    call = f"RotaryEmbedding<{options}>(x, c, s{', at' if positions else ''})"
    model = lab.make(f"({inputs}) => ({shape} y) {{ y = {call} }}")
    size = (9, half) if positions else (2, 3, half)
    feeds = {"x": floats(*((2, 3, 16) if flat else (2, 2, 3, 8))), "c": floats(*size)}
    feeds |= {"s": floats(*size)} | ({"at": np.array([[4, 0, 8], [1, 2, 3]])} if positions else {})
    assert lab.same(model, PASSES, feeds) == []
    assert (lab.counts(model)["Rotary"], lab.counts(model)["RotaryEmbedding"]) == (1, 0)
