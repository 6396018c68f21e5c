"""Mixtures of experts on the whole road: shares of the tokens in the cost, idle experts, verify."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfmc import store
from pfmc.compile import Compilation, compile_model
from pfmc.hardware import LayerStatistics
from pfmc.ingest import load
from pfmc.ir import routing
from pfmc.passes.unseen import complete
from pfmc.targets import get
from pfmc.technology import load as technology
from pfmc.verify import verify

TESTS = Path(__file__).parent
FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss")


def _checkpoints() -> Any:
    spec = importlib.util.spec_from_file_location(
        "pfmc_tests_checkpoints_moe", TESTS / "ingest" / "checkpoints.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint of each family."""
    cases, made = _checkpoints(), {}
    for name in FAMILIES:
        made[name] = tmp_path_factory.mktemp(name)
        cases.make(cases.DECODERS[name], made[name])
    return made


def _compile(model: Path, out: Path, target: str, length: int = 8) -> Compilation:
    settings = (
        "calibration.sequences=1", f"calibration.length={length}", "quantise.search=clip"
    )  # fmt: skip
    return compile_model(model, out, target=target, settings=settings)


@pytest.mark.parametrize("target", ["rom", "crossbar", "optical"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_compiles_with_calibration_and_verifies(
    family: str, target: str, models: dict[str, Path], tmp_path: Path
) -> None:
    done = _compile(models[family], tmp_path / "x.pfm", target)
    records = {r.name: r for r in store.layer_records(tmp_path / "x.pfm")}
    model = load(models[family]).model
    stacks = routing.groups(model)
    assert stacks
    for names in stacks:  # two of four experts for every token
        assert len(names) == 4
        assert sum(records[n].activity for n in names) == pytest.approx(2.0)
    routed = {n for names in stacks for n in names}
    assert all(r.activity == 1.0 for n, r in records.items() if n not in routed)
    facts = done.report["model"]
    assert facts["active_weights"] < facts["fixed_weights"]
    found = verify(tmp_path / "x.pfm", windows=1, length=8)
    rows = {r.name: r for r in found.rows}
    assert "against transformers" in found.title
    assert rows["float model of the experts"].value < 1e-5
    errors = [r.value for n, r in rows.items() if n.startswith("expert ")]
    assert len(errors) + rows["experts without rows"].value == len(routed)
    assert float(np.median(errors)) < 0.3


@pytest.mark.parametrize("kind", ["rom", "crossbar", "optical"])
def test_activity_weighs_energy_and_nothing_else(
    kind: str, models: dict[str, Path], tmp_path: Path
) -> None:
    _compile(models["mixtral"], tmp_path / "x.pfm", kind)
    tech, target = technology(kind), get(kind)
    layers = [r.summary for r in store.layer_records(tmp_path / "x.pfm")]
    from pfmc.hardware import Workload

    def cost(share: float) -> Any:
        some = [replace(s, activity=share) for s in layers]
        return target.cost(some, [], tech, Workload("decode", 16))

    whole, half, few = cost(1.0), cost(0.55), cost(0.1)
    energies = [c["energy__token"].typical for c in (whole, half, few)]
    assert energies[1] == pytest.approx((energies[0] + energies[2]) / 2)
    assert energies[2] < energies[1] < energies[0]
    for key in ("area__total", "latency__token"):
        assert whole[key].typical == few[key].typical


def test_an_expert_without_rows_is_inferred_and_named(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """One token goes to two of four experts: the others borrow their stack's input range."""
    done = _compile(models["mixtral"], tmp_path / "x.pfm", "crossbar", length=2)
    idle = done.report["passes"]["calibrate"]["layers_without_rows"]
    assert idle
    assert all(".experts." in n for n in idle)
    records = {r.name: r for r in store.layer_records(tmp_path / "x.pfm")}
    assert all(records[n].activity == 0.0 and records[n].input_scale for n in idle)


def test_inferred_statistics(models: dict[str, Path]) -> None:
    model = load(models["mixtral"]).model
    names = routing.groups(model)[0]

    def seen(samples: int, peak: float) -> LayerStatistics:
        return LayerStatistics(
            peak, {1.0: peak}, np.full(32, peak**2 / 4), np.full(64, 3.0, np.float32),
            np.ones(64, np.float32), samples,
        )  # fmt: skip

    given = {names[0]: seen(3, 1.0), names[1]: seen(0, 0.0), names[2]: seen(2, 2.0)}
    found, idle = complete(model, given)
    assert names[1] in idle
    assert names[3] in idle
    made = found[names[1]]
    assert (made.samples, made.input_peak) == (0, 2.0)
    np.testing.assert_allclose(made.input_power, (0.25 + 1.0) / 2)
    weight = next(n for n in model.graph if n.name == names[1]).inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    rms = np.sqrt(made.input_power @ weight.const_value.numpy().astype(np.float64) ** 2)
    np.testing.assert_allclose(made.output_rms, rms, rtol=1e-6)
    np.testing.assert_allclose(made.output_peak, 3 * rms, rtol=1e-6)
    assert complete(model, {}) == ({}, ())


def test_inspect_shows_the_shares(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pfmc.cli.inspect import inspect_

    _compile(models["mixtral"], tmp_path / "x.pfm", "rom")
    inspect_(tmp_path / "x.pfm", layer="*experts*", json=True)
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert sum(r["activity"] for r in rows) == pytest.approx(2.0 * 3 * 3)
