"""Rotary embeddings are found in Slice and Split form, and only on true halves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pfmc.passes.raise_rotary import RaiseRotary

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
        "(float[B,2,S,8] x, float[1,1,S,4] c, float[1,1,S,4] s) => (float[B,2,S,8] y)"
        f" {{ {body} }}"
    )
    model = lab.make(text)
    feeds = {"x": floats(2, 2, 3, 8), "c": floats(1, 1, 3, 4), "s": floats(1, 1, 3, 4)}
    lab.same(model, [RaiseRotary()], feeds)
