"""Equal nodes become one; nodes with weights of their own never do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pfmc.passes.merge_equal import MergeEqual

Floats = Callable[..., np.ndarray]


def test_equal_chains_become_one(lab: Any, floats: Floats) -> None:
    body = "a = Mul(x, two) b = Mul(x, zwei) c = Exp(a) d = Exp(b) y = Add(c, d)"
    two = {"two": np.array(2, np.float32), "zwei": np.array(2, np.float32)}
    model = lab.make(f"(float[B,4] x) => (float[B,4] y) {{ {body} }}", **two)
    lab.same(model, [MergeEqual()], {"x": floats(2, 4)})
    assert lab.counts(model) == {"Mul": 1, "Exp": 1, "Add": 1}
    assert model.graph[0].metadata_props["pfmc.src"] == "n0 n1"


def test_products_norms_and_random_numbers_stay(lab: Any, floats: Floats) -> None:
    body = (
        "a = MatMul(x, w) b = MatMul(x, w) c = LayerNormalization(a, g)"
        " d = LayerNormalization(a, g) e = Add(c, d) y = Add(e, b)"
    )
    model = lab.make(f"(float[B,4] x) => (float[B,4] y) {{ {body} }}", w=floats(4, 4), g=floats(4))
    lab.same(model, [MergeEqual()], {"x": floats(2, 4)})
    assert lab.counts(model) == {"MatMul": 2, "LayerNormalization": 2, "Add": 2}


def test_other_attributes_and_other_constants_stay(lab: Any, floats: Floats) -> None:
    body = (
        "a = Softmax<axis=0>(x) b = Softmax<axis=1>(x) c = Mul(a, two) d = Mul(a, three)"
        " e = Add(c, d) y = Add(e, b)"
    )
    numbers = {"two": np.array(2, np.float32), "three": np.array(3, np.float32)}
    model = lab.make(f"(float[3,4] x) => (float[3,4] y) {{ {body} }}", **numbers)
    lab.same(model, [MergeEqual()], {"x": floats(3, 4)})
    assert lab.counts(model) == {"Softmax": 2, "Mul": 2, "Add": 2}
