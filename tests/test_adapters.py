"""Adapters on the whole road: their cost rows, the same bytes twice, and verification."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from pfmc.adapt import adapt
from pfmc.artifact import problems, read_manifest
from pfmc.calibration import beside
from pfmc.calibration.calibrate import calibrate
from pfmc.calibration.choices import COURSE
from pfmc.calibration.choices import Choices as CalibrationChoices
from pfmc.compile import Compilation, compile_model
from pfmc.errors import InputError, UsageError
from pfmc.oracle import Oracle
from pfmc.simulate import open_machine
from pfmc.verify import verify
from pfmc.with_adapter import find_adapter

TESTS = Path(__file__).parent
QUICK = ("calibration.sequences=2", "calibration.length=8")
EIGHT = (*QUICK, "quantise.weight_bits=8", "quantise.search=clip")


def _module(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


L = _module("pfmc_tests_lora_road", TESTS / "passes" / "lora.py")
C = _module("pfmc_tests_checkpoints_road", TESTS / "ingest" / "checkpoints.py")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in one file."""
    return Path(L.llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on four of its layers."""
    return Path(L.write_adapter(tmp_path_factory.mktemp("lora") / "adapter", L.ADAPTED))


Make = Callable[..., Compilation]


@pytest.fixture(scope="module")
def make(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Compiles the tiny Llama with the adapter."""
    folder = tmp_path_factory.mktemp("out")

    def call(name: str, target: str = "rom", **options: Any) -> Compilation:
        options = {"adapter": adapter, "settings": EIGHT if target == "rom" else QUICK} | options
        return compile_model(base, folder / f"{name}.pfm", target=target, **options)

    return call


# -- cost ----------------------------------------------------------------------------------------


def terms(report: dict[str, Any], metric: str) -> dict[str, float]:
    return {t["name"]: t["typical"] for t in report["cost"]["metrics"][metric]["terms"]}


@pytest.mark.parametrize("target", ["rom", "crossbar", "optical"])
def test_cost_rows_of_every_target(target: str, make: Make) -> None:
    beside = make(f"{target}-cost", target).report
    plain = make(f"{target}-plain", target, adapter=None).report
    down, up = (3 * sum(s[i] for s in L.ADAPTED.values()) for i in (0, 1))
    assert beside["model"]["adapters"] == {
        n: {"rank": 3, "parameters": 3 * (i + o)} for n, (i, o) in L.ADAPTED.items()
    }
    assert beside["model"]["fabric_kinds"]["side_path"] == 4
    assert beside["model"]["fixed_weights"] == plain["model"]["fixed_weights"]
    energy = terms(beside, "energy__token")
    formulas = {
        t["name"]: t["formula"] for t in beside["cost"]["metrics"]["energy__token"]["terms"]
    }
    for key, count in (
        ("macs8", down), ("macs16", up), ("adapter_read_values", down + up),
        ("adds", sum(o for _, o in L.ADAPTED.values())),
    ):  # fmt: skip
        assert formulas[f"fabric.side_path.{key}"].startswith(f"{count} {key} ")
        assert energy[f"fabric.side_path.{key}"] > 0
    area = beside["cost"]["metrics"]["area__total"]
    held = next(t for t in area["terms"] if t["name"] == "fabric.adapters")
    assert held["formula"].startswith(f"{down + up} adapter numbers")
    for metric in ("energy__token", "area__total"):
        whole = beside["cost"]["metrics"][metric]
        assert sum(terms(beside, metric).values()) == pytest.approx(whole["typical"])
        assert whole["typical"] > plain["cost"]["metrics"][metric]["typical"]
        assert not any("side_path" in n or "adapters" in n for n in terms(plain, metric))
    assert "adapters" not in plain["model"]


def test_a_merged_adapter_costs_nothing(make: Make) -> None:
    merged, plain = make("m", merge=True).report, make("p", adapter=None).report
    assert merged["cost"]["metrics"] == plain["cost"]["metrics"]
    assert (
        next(v for k, v in merged["passes"].items() if "merge-adapter" in k)["notes"]["layers"] == 4
    )


# -- the same bytes ------------------------------------------------------------------------------


def test_the_same_bytes_twice_and_other_bytes_for_another_adapter(
    make: Make, adapter: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(adapter, tmp_path / "elsewhere")
    first, second = make("one"), make("two", adapter=moved)
    assert first.path is not None
    assert second.path is not None
    assert read_manifest(first.path).tree == read_manifest(second.path).tree
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 5}))
    other = make("three", adapter=moved)
    assert other.path is not None
    assert read_manifest(first.path).tree != read_manifest(other.path).tree
    with pytest.raises(UsageError, match="not the adapter"):
        find_adapter(open_machine(first.path), moved)
    assert find_adapter(open_machine(first.path), None).resolve() == adapter.resolve()


# -- another adapter -----------------------------------------------------------------------------


def test_another_adapter_without_compiling(
    make: Make, base: Path, adapter: Path, tmp_path: Path, here: Any
) -> None:
    """Without calibration the copy is, number for number, what a compile would give."""
    options = {"settings": (*EIGHT, "calibration.source=none", "quantise.inputs=token")}
    first = make("frozen", **options).path
    assert first is not None
    other = L.write_adapter(tmp_path / "other", L.ADAPTED)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2.0}))
    wanted = make("wanted", adapter=other, **options).path
    assert wanted is not None
    done = adapt(first, other, tmp_path / "b.pfm")
    assert set(done.layers) == set(L.ADAPTED)
    for name in ("model.onnx", "netlist.json", "layers.json"):
        ours, theirs = ((p / name).read_bytes() for p in (tmp_path / "b.pfm", wanted))
        assert ours == theirs, name
    assert problems(tmp_path / "b.pfm") == []
    assert done.manifest["config"]["adapted_from"] == read_manifest(first).tree
    words = ("adapt", first, "--adapter", other, "-o", tmp_path / "c.pfm", "--json")
    told = here(*words).json()
    assert told["tree_sha256"] == done.manifest.tree
    assert set(told["layers"]) == set(L.ADAPTED)
    back = adapt(tmp_path / "b.pfm", adapter, tmp_path / "a.pfm")
    feeds = {"input_ids": np.arange(8)[None]}
    logits = [
        open_machine(p).run(feeds)["logits"]
        for p in (first, back.manifest.path, tmp_path / "b.pfm", wanted)
    ]
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_array_equal(logits[2], logits[3])
    assert np.abs(logits[0] - logits[2]).max() > 1e-3
    rows = {r.name: r.value for r in verify(tmp_path / "b.pfm", windows=2, length=12).rows}
    assert rows["median layer"] < 0.04


def test_a_smaller_adapter_fits_and_a_larger_one_does_not(make: Make, tmp_path: Path) -> None:
    first = make("small").path
    assert first is not None
    few = dict(list(L.ADAPTED.items())[:2])
    small = L.write_adapter(tmp_path / "small", few, rank=2)
    done = adapt(first, small, tmp_path / "small.pfm")
    assert set(done.layers) == set(few)
    rows = {r.name: r.value for r in verify(tmp_path / "small.pfm", windows=2, length=12).rows}
    assert rows["median layer"] < 0.06
    large = L.write_adapter(
        tmp_path / "large", {**L.ADAPTED, "model.layers.0.mlp.up_proj": (32, 48)}, 4
    )
    with pytest.raises(InputError, match=r"has no side path.*rank 4, its memory only 3"):
        adapt(first, large, tmp_path / "large.pfm")
    with pytest.raises(UsageError, match="no writable side paths"):
        adapt(make("none2", adapter=None).path, small, tmp_path / "no.pfm")


def test_a_corrected_die_keeps_its_correction_and_knows_its_adapter(
    make: Make, adapter: Path, tmp_path: Path
) -> None:
    """The correction of a layer that the adapter leaves alone was overwritten with zeros."""
    first = make("die", "crossbar_gaussian10").path
    assert first is not None
    course = replace(COURSE, steps=0, sequences=24, held_out=8, length=8, batch=4)
    (tmp_path / "deeper").mkdir()
    corrected = tmp_path / "deeper" / "corrected.pfm"
    calibrate(first, corrected, choices=CalibrationChoices(die=3, course=course, rank=2))
    found = find_adapter(open_machine(corrected), None)
    assert found.resolve() == adapter.resolve()
    adapt(corrected, adapter, tmp_path / "same.pfm")
    files = ("model.onnx", "model.data")
    for name in files:
        assert (corrected / name).read_bytes() == (tmp_path / "same.pfm" / name).read_bytes()
    other = L.write_adapter(tmp_path / "other", dict(list(L.ADAPTED.items())[:2]), rank=1)
    adapt(corrected, other, tmp_path / "other.pfm")
    before, after = (
        beside.take(ir.load(place / "model.onnx")) for place in (corrected, tmp_path / "other.pfm")
    )
    assert any(side.down.any() for side in before.values())
    for name, side in before.items():
        for part in ("gain", "offset", "down", "up"):
            np.testing.assert_array_equal(getattr(after[name], part), getattr(side, part))


# -- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", [False, True])
def test_the_machine_equals_onnx_runtime_on_merged_weights(
    merge: bool, make: Make, base: Path, adapter: Path
) -> None:
    """As near as the 8-bit machine without adapter comes to the base."""
    feeds = {"input_ids": np.random.default_rng(9).integers(0, 50, (3, 8))}
    truths = []
    for file in (L.merged(base, adapter), base):
        with Oracle(file) as oracle:
            truths.append(oracle.run(feeds)["logits"])

    def far(done: Compilation, truth: np.ndarray) -> float:
        assert done.path is not None
        ours = open_machine(done.path).run(feeds)["logits"]
        return float(np.linalg.norm(ours - truth) / np.linalg.norm(truth))

    adapted, plain = make(f"numbers{merge}", merge=merge), make("numbers", adapter=None)
    assert far(adapted, truths[0]) < 1.5 * far(plain, truths[1]) < 0.06
    assert far(adapted, truths[1]) > 0.3


@pytest.mark.parametrize("merge", [False, True])
def test_verification_compares_with_merged_weights(merge: bool, make: Make) -> None:
    done = make(f"verify{merge}", merge=merge)
    assert done.path is not None
    found = verify(done.path, windows=2, length=12)
    rows = {r.name: r for r in found.rows}
    judge = "ONNX Runtime with the adapter merged in float"
    assert found.title.endswith(f"against {judge}")
    assert f"perplexity of {judge}" in rows
    assert rows["median layer"].value < 0.04
    for layer in L.ADAPTED:
        assert rows[f"layer {layer}"].value < 0.08
    assert abs(rows["perplexity ratio"].value - 1) < 0.02
    assert rows["top-1 agreement"].value > 0.8


@pytest.mark.parametrize("family", ["llama", "llama_bias_tied"])
def test_a_checkpoint_with_an_adapter(family: str, tmp_path: Path) -> None:
    """Against transformers; the head of the second is tied to its embedding, which stays."""
    (tmp_path / "base").mkdir()
    C.make(C.DECODERS[family], tmp_path / "base")
    sizes = {"model.layers.1.mlp.up_proj": (32, 64), "lm_head": (32, 96)}
    L.write_adapter(tmp_path / "adapter", sizes)
    out = tmp_path / "x.pfm"
    compile_model(
        tmp_path / "base", out, target="rom", recipe="stream", adapter=tmp_path / "adapter",
        settings=("quantise.weight_bits=8",),
    )  # fmt: skip
    found = verify(out, windows=2, length=12)
    rows = {r.name: r.value for r in found.rows}
    assert "transformers with the adapter merged in float" in found.title
    assert rows["layer model.layers.1.mlp.up_proj"] < 0.05
    assert rows["layer lm_head"] < 0.05
    assert rows["top-1 agreement"] > 0.8


# -- what is wrong -------------------------------------------------------------------------------


def test_errors_say_what_is_missing(make: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"adapter_config\.json"):
        make("none", adapter=tmp_path)
    with pytest.raises(UsageError, match="no adapter to merge"):
        make("nothing", adapter=None, merge=True)
    strange = L.write_adapter(tmp_path / "strange", {"model.layers.9.mlp.up_proj": (32, 48)})
    with pytest.raises(InputError, match=r"layers\.9\.mlp\.up_proj is no layer") as caught:
        make("strange", adapter=strange)
    assert "base model" in caught.value.mend
    wrong = L.write_adapter(tmp_path / "wrong", {"lm_head": (31, 50)})
    with pytest.raises(InputError, match="31 to 3"):
        make("wrong", adapter=wrong)
    (wrong / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="missing"):
        make("empty", adapter=wrong)
