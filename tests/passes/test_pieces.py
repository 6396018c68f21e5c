"""What stays in pieces is listed with its work and the reason."""

from __future__ import annotations

from typing import Any

import pytest

from pfmc.distill.shapes import probe_shapes
from pfmc.passes import pipeline, recipe
from pfmc.passes.pieces import left_in_pieces
from pfmc.targets.fabric.work import fabric_ops


def _pieces(model: Any) -> list[dict[str, Any]]:
    outcome = pipeline.canonicalise(model, recipe.load("stream", ()).passes)
    notes = {s.label: s.report() for s in outcome.steps}
    ops = fabric_ops(outcome.model, probe_shapes(outcome.model))
    return left_in_pieces(outcome.model, ops, notes)


@pytest.mark.parametrize("name", ["llama__t_dyn", "bert__ts", "gpt2__t_kv"])
def test_a_plain_transformer_leaves_none(lab: Any, name: str) -> None:
    assert _pieces(lab.load(name)) == []


def test_a_router_is_listed_with_its_work(lab: Any) -> None:
    """Mixtral: softmax, choice and count of experts in each of two layers."""
    found = _pieces(lab.load("mixtral__h_dyn"))
    assert [p["operator"] for p in found] == ["Softmax", "TopK", "ScatterElements"] * 2
    assert found[0]["reason"] == "a softmax of other than four dimensions"
    assert found[0]["work"]["exps"] == 4.0
    assert found[0]["scope"].startswith("model.layers.0.mlp")


def test_a_product_of_activations_is_priced(lab: Any) -> None:
    """CLIP compares 3 texts with 3 images: one product that is no linear and no attention."""
    (piece,) = _pieces(lab.load("clip__t_static"))
    assert piece["operator"] == "MatMul"
    assert piece["work"]["macs8"] > 0
