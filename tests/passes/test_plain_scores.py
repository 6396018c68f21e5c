"""Scores with a floor, with a scale for each head, and weights reshaped there and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pfmc.passes.merge_equal import MergeEqual
from pfmc.passes.raise_attention import RaiseAttention
from pfmc.passes.shape_arithmetic import ShapeArithmetic

Floats = Callable[..., np.ndarray]
PASSES = (ShapeArithmetic(), MergeEqual(), RaiseAttention())


def test_a_scale_of_its_own_for_each_head_goes_to_the_queries(lab: Any, floats: Floats) -> None:
    """Swin V2: cosines times a learnt factor of each head, and a bias."""
    model = lab.make(
        """(float[2,4,5,8] q, float[2,4,5,8] k, float[2,4,5,8] v) => (float[2,4,5,8] y) {
        kt = Transpose<perm=[0,1,3,2]>(k) s = MatMul(q, kt) a = Mul(s, c) b = Add(a, bias)
        p = Softmax<axis=-1>(b) y = MatMul(p, v) }""",
        c=np.abs(floats(4, 1, 1)),
        bias=floats(1, 4, 5, 5),
    )
    feeds = {n: floats(2, 4, 5, 8) for n in "qkv"}
    lab.same(model, PASSES, feeds)
    assert lab.counts(model)["Attention"] == 1
    assert not {"Softmax", "MatMul"} & set(lab.counts(model))


def test_flat_heads_with_a_floor_and_weights_shown_by_head(lab: Any, floats: Floats) -> None:
    """XGLM and the older BART family: ``[B * H, S, D]``, ``max(s, lowest)``, weights as 4-D."""
    model = lab.make(
        """(float[2,4,5,8] q, float[2,4,5,8] k, float[2,4,5,8] v, float[2,1,5,5] mask)
        => (float[2,4,5,8] y) {
        q3 = Reshape(q, flat) k3 = Reshape(k, flat) v3 = Reshape(v, flat)
        kt = Transpose<perm=[0,2,1]>(k3) s3 = MatMul(q3, kt) s4 = Reshape(s3, wide)
        m4 = Add(s4, mask) f4 = Max(m4, low) f3 = Reshape(f4, square) p3 = Softmax<axis=-1>(f3)
        p4 = Reshape(p3, wide) w3 = Reshape(p4, square) y3 = MatMul(w3, v3)
        y = Reshape(y3, heads) }""",
        flat=np.asarray([8, 5, 8]),
        wide=np.asarray([2, 4, 5, 5]),
        square=np.asarray([8, 5, 5]),
        heads=np.asarray([2, 4, 5, 8]),
        low=np.asarray(np.finfo(np.float32).min),
    )
    feeds = {n: floats(2, 4, 5, 8) for n in "qkv"}
    feeds["mask"] = np.where(floats(2, 1, 5, 5) > 1, np.float32(-1e30), np.float32(0))
    lab.same(model, PASSES, feeds)
    assert lab.counts(model)["Attention"] == 1
    assert not {"Softmax", "MatMul", "Max"} & set(lab.counts(model))
