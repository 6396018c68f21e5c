"""Number formats, learned rounding, budgets and scaling on the whole road, on the shipped model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfmc import formats, technology
from pfmc.compile import compile_model
from pfmc.errors import InfeasibleError, UsageError
from pfmc.numbers import price_of
from pfmc.targets import get
from pfmc.verify import verify

BARD = Path(__file__).resolve().parent.parent / "models" / "bard" / "model.onnx"
SMALL = ("calibration.sequences=2", "calibration.length=16")
needs_bard = pytest.mark.skipif(not BARD.is_file(), reason="models/bard is absent")


def built(out: Path, *settings: str, target: str = "rom", recipe: str = "rom") -> dict[str, Any]:
    made = compile_model(
        BARD, out, target=target, recipe=recipe, settings=(*SMALL, *settings), force=True
    )
    return made.report


@needs_bard
def test_a_block_format_and_a_narrow_memory_are_stored_simulated_and_priced(tmp_path: Path) -> None:
    plain = built(tmp_path / "a.pfm", "quantise.search=clip")
    out = tmp_path / "b.pfm"
    made = built(out, "quantise.search=clip", "quantise.format=mxfp4", "quantise.kv_bits=4")
    metrics, before = made["cost"]["metrics"], plain["cost"]["metrics"]
    assert metrics["memory__kv_user"]["typical"] * 2 == before["memory__kv_user"]["typical"]
    assert made["rounding"]["weight_bits_mean"] == pytest.approx(4.25, abs=0.05)
    assert made["passes"]["fabric-formats"]["notes"]["kv_bits"] == 4
    kinds = {r["format"] for r in json.loads((out / "layers.json").read_bytes())}
    assert kinds == {"mxfp4"}
    rows = {r.name: r for r in verify(out, windows=2, length=16).rows}
    exact = [r for n, r in rows.items() if "ROM image" in n or "block scales" in n]
    assert exact
    assert all(r.passed for r in exact)


@needs_bard
def test_rounding_is_learned_and_reported(tmp_path: Path) -> None:
    made = built(
        tmp_path / "a.pfm", "quantise.search=learned", "quantise.iterations=4",
        "quantise.weight_bits=2", "quantise.layers.lm_head.search=clip",
    )  # fmt: skip
    facts = made["rounding"]
    assert sum(facts["choices"].values()) == made["model"]["fixed_linears"]
    means = facts["errors_geometric_mean"]
    assert means["layer_wise_best"] < means["clip"] < means["plain"]
    for row in facts["layers"].values():
        assert row["errors"]["layer_wise_best"] <= row["errors"]["plain"]
        assert row["choice"] in ("plain", "clip", "compensate", "learned")


@needs_bard
def test_a_budget_is_met_and_its_choice_shown(tmp_path: Path) -> None:
    choice = (
        "quantise.budget.metric=weight bits", "quantise.budget.most=3.2",
        "quantise.budget.sensitivity=error", "quantise.budget.most_bits=5", "quantise.search=clip",
    )  # fmt: skip
    made = built(tmp_path / "a.pfm", *choice, "quantise.scaling=true")
    assert 3.0 < made["rounding"]["weight_bits_mean"] <= 3.2 + 1e-9
    told = made["passes"]["budget"]
    assert told["spent"] == pytest.approx(made["rounding"]["weight_bits_mean"])
    for name, row in told["layers"].items():
        assert row["bits"] == made["rounding"]["layers"][name]["bits"]
    assert made["passes"]["scale"]["notes"]["groups"] > 0


@needs_bard
def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "a.pfm"
    with pytest.raises(UsageError, match="needs calibration"):
        built(out, "calibration.source=none", "quantise.search=learned")
    with pytest.raises(InfeasibleError, match="holds no 'mxfp4'"):
        built(out, "quantise.format=mxfp4", target="crossbar", recipe="crossbar")
    with pytest.raises(InfeasibleError, match="narrowest"):
        built(out, "quantise.budget.metric=weight bits", "quantise.budget.most=1",
              "quantise.budget.sensitivity=error", "quantise.search=clip")  # fmt: skip


@pytest.mark.parametrize("kind", ["rom", "crossbar", "optical"])
def test_prices_are_those_of_the_target(kind: str) -> None:
    tech = technology.load(kind)
    target = get(tech.kind)
    limits = target.limits(tech)
    price = price_of(target, tech, limits, 64)
    form = formats.of("int", 4)
    assert price("weight bits", 64, 32, form, 0) == 4 * 64 * 32
    for metric in ("area", "energy", "tiles"):
        small, large = (price(metric, n, 512, form, 0) for n in (64, 2048))
        assert np.isfinite(small)
        assert 0 < small < large
    if kind == "rom":
        narrow = price("area", 512, 512, formats.of("int", 2), 0)
        assert narrow < price("area", 512, 512, form, 0)
